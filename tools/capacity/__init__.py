"""How many machines, cores, bytes and Redis commands a number of viewers takes."""
