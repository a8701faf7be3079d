"""Who is where, in Redis."""
