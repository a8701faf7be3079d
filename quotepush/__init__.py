"""quotepush: a self-hosted stock-quote push server.

Ticks come in through Redis, rows go out to everybody who watches the code. The
command line (``quotepush serve``) runs the server; :mod:`quotepush.client` is
the Python client.
"""

__version__ = "0.1.0"
