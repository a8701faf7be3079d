"""Ticks in from Redis. Runs in main."""
