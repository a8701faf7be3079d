"""One machine: main, its workers, and what holds them together."""
