"""quotepush: a self-hosted stock-quote push server.

Ticks come in through Redis, rows go out to everybody who watches the code. The
command line (``quotepush serve``) runs the server; :mod:`quotepush.client` is
the Python client.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quotepush.client import QuoteClient

__all__ = ["QuoteClient", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The client brings aiohttp along; who only asks for the version does not pay for it.
    if name == "QuoteClient":
        from quotepush.client import QuoteClient

        return QuoteClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
