"""What the Python client raises.

::

    ClientError (a QuotepushError)
    ├── WrongUrl      the URL cannot be one of a server
    ├── Refused       the server, or what answers in its place, wants none of us: no reconnect
    ├── ClientClosed  used outside ``with``, or after ``close()``
    └── NotAnswered   a question was not answered in time

Law: no text here repeats a token, or the user and password of a URL.
"""

from quotepush.errors import QuotepushError

__all__ = ["ClientClosed", "ClientError", "NotAnswered", "Refused", "WrongUrl"]


class ClientError(QuotepushError):
    """The root of what the client raises."""


class WrongUrl(ClientError):
    """The URL cannot be one of a server."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.url!r} is not the address of a server: {self.reason}; write http://HOST:PORT"


class Refused(ClientError):
    """The connection is refused for good; trying again cannot help.

    Attributes:
        url: of the WebSocket.
        status: of the HTTP answer to the handshake; None if there was a connection.
        close_code: of the WebSocket; None if there was none.
        reason: what was said to it.
    """

    def __init__(self, url: str, reason: str, *, status: int | None = None, close_code: int | None = None) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason
        self.status = status
        self.close_code = close_code

    @property
    def is_about_token(self) -> bool:
        """Say whether another token, or one at all, could help."""
        return self.status == 401 or self.close_code == 4401

    def __str__(self) -> str:
        if self.status is not None:
            return f"{self.url} refuses this client: HTTP {self.status} {self.reason}".rstrip()
        if self.close_code is not None:
            return f"{self.url} refuses this client: close code {self.close_code} {self.reason}".rstrip()
        return f"{self.url} cannot be reached at all: {self.reason}"


class ClientClosed(ClientError):
    """The client is not open: it was closed, or is used outside ``with``."""

    def __str__(self) -> str:
        return "the client is closed; use it inside 'with' or 'async with'"


class NotAnswered(ClientError):
    """A question had no answer in time, be it for want of a connection."""

    def __init__(self, action: str, timeout_s: float) -> None:
        super().__init__(action, timeout_s)
        self.action = action
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return f"no answer to {self.action} within {self.timeout_s:g} s"
