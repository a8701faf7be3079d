"""Where the Python client's tokens come from, and when the next one is due.

Law: a token goes to the server and nowhere else: not into a log, a message or an exception.
"""

import asyncio
import base64
import binascii
import inspect
import logging
import re
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import orjson

__all__ = ["NoToken", "Token", "TokenSource", "renewal_in_s"]

log = logging.getLogger("quotepush.client")

Token: TypeAlias = str | Callable[[], "str | Awaitable[str]"]
"""A token, or a function, plain or async, that returns one whenever it is called."""

# A new token is asked for in the last fifth of the old one's life, at most this long before its end.
_LEAD_SHARE = 0.2
_MAX_LEAD_S = 60.0
# A source that has no newer token is not asked more often.
_MIN_WAIT_S = 1.0
# An hour too early costs one token; a timer of years would be lost in the arithmetic of the loop.
_MAX_WAIT_S = 86_400.0


class NoToken(Exception):
    """The source had none; the argument says why, without what the source itself said."""


class TokenSource:
    """The tokens of one client.

    Args:
        token: one for ever, or what returns the newest.
        timeout_s: for what returns it.

    Raises:
        ValueError: the token cannot be one.
    """

    def __init__(self, token: Token | None, timeout_s: float) -> None:
        self._source = token
        self._timeout_s = timeout_s
        if isinstance(token, str):
            _check(token)

    @property
    def can_renew(self) -> bool:
        """Say whether there may be another one when one is refused."""
        return callable(self._source)

    async def next(self) -> str | None:
        """Return the newest token, None where none is wanted.

        Raises:
            NoToken: the function failed, took too long, or returned none.
        """
        if self._source is None or isinstance(self._source, str):
            return self._source
        try:
            async with asyncio.timeout(self._timeout_s):
                found = self._source()
                token = await found if inspect.isawaitable(found) else found
            return _check(token)
        except TimeoutError:
            raise NoToken(f"no token within {self._timeout_s:g} s") from None
        except Exception as e:
            # Whatever it raises, its next call may do better; its text could hold the token.
            log.warning("the function that returns tokens failed: %s", type(e).__name__)
            raise NoToken(f"no token: {type(e).__name__}") from None


def renewal_in_s(token: str, now_ms: float) -> float | None:
    """Return after how many seconds the token after this one is due; None: this one does not expire.

    The end is read from the token itself (``exp``, RFC 7519 §4.1.4), ``now_ms`` is by the server's clock.
    """
    expires_s = _expiry_s(token)
    if expires_s is None:
        return None
    left_s = expires_s - now_ms / 1000
    return min(max(left_s - min(_MAX_LEAD_S, left_s * _LEAD_SHARE), _MIN_WAIT_S), _MAX_WAIT_S)


def _expiry_s(token: str) -> float | None:
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = orjson.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return None
    expires = claims.get("exp") if type(claims) is dict else None
    return float(expires) if type(expires) is int or type(expires) is float else None


def _check(token: object) -> str:
    if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):  # a line break from a file, most of all
        raise ValueError("a token is ASCII without blanks and line breaks")
    return token
