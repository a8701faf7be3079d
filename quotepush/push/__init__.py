"""Rows out to clients. Runs in the workers."""
