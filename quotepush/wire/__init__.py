"""What is said to clients, and its bytes. Pure, no I/O."""
