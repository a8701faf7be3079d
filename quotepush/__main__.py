"""``python -m quotepush``: the command line."""

from quotepush.cli import main

main()
