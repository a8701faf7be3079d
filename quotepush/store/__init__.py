"""An address of Redis, whatever kind it is of, becomes clients and connections here; nobody else makes one."""
