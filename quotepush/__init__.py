"""quotepush: a self-hosted stock-quote push server.

Ticks come in through Redis, rows go out to everybody who watches the code. The
command line (``quotepush serve``) runs the server; :mod:`quotepush.client` is
the Python client; :mod:`quotepush.publisher` brings ticks in; :mod:`quotepush.backend` is
for backends that send to users.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quotepush.backend import Backend
    from quotepush.backend_blocking import BlockingBackend
    from quotepush.client import QuoteClient
    from quotepush.client_blocking import BlockingQuoteClient
    from quotepush.publisher import BlockingPublisher, Publisher

__all__ = [
    "Backend", "BlockingBackend", "BlockingPublisher", "BlockingQuoteClient", "Publisher", "QuoteClient", "__version__",
]  # fmt: skip

__version__ = "0.1.0"

_HOMES = {
    "Backend": "quotepush.backend",
    "BlockingBackend": "quotepush.backend_blocking",
    "QuoteClient": "quotepush.client",
    "BlockingQuoteClient": "quotepush.client_blocking",
    "Publisher": "quotepush.publisher",
    "BlockingPublisher": "quotepush.publisher",
}


def __getattr__(name: str) -> Any:
    # The client brings aiohttp along, the others redis; who only asks for the version does not pay for them.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
