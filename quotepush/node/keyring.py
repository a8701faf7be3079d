"""The keys of tokens in main: read from files and fetched, again and again, so that they change without a restart.

Law: a source that fails, or holds nothing that tokens can be checked with, keeps the keys that it had, and its trouble
is one line in the log. Whoever asks for newer keys is answered, and cannot make main fetch more often than every
:data:`LEAST_BETWEEN_S`.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp

from quotepush.settings import Settings
from quotepush.token_keys import BadKey, parse_key_set, parse_keys

__all__ = ["LEAST_BETWEEN_S", "CannotFetch", "Keyring", "fetch_key_set"]

log = logging.getLogger("quotepush.main")

LEAST_BETWEEN_S = 5.0
_LOOK_EVERY_S = 2.0
_FETCH_TIMEOUT_S = 8.0
_MOST_BYTES = 1 << 18
# After a failure it is tried sooner than after token_jwks_refresh_s.
_AGAIN_S = 30.0

_URL = "token_jwks_url"  # how the log calls it: in an address may stand what others must not know

_Source = tuple[str, bool]


class CannotFetch(Exception):
    """There is no key set at the address; the argument says why."""


async def fetch_key_set(url: str) -> str:
    """Return the text of the JSON Web Key Set at ``url``, in which there are usable keys.

    Redirects are not followed: they could lead to where nobody has allowed us to ask.

    Raises:
        CannotFetch: not in time, not there, or no such set.
    """
    timeout = aiohttp.ClientTimeout(total=_FETCH_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.get(url, allow_redirects=False, headers={"Accept": "application/json"}) as response,
        ):
            if response.status != 200:
                raise CannotFetch(f"HTTP {response.status}")
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > _MOST_BYTES:
                    raise CannotFetch(f"more than {_MOST_BYTES} bytes")
        text = body.decode()
        parse_key_set(text, is_public=True)
    except TimeoutError:
        raise CannotFetch(f"no answer within {_FETCH_TIMEOUT_S:g} s") from None
    except UnicodeDecodeError:
        raise CannotFetch("it is no UTF-8") from None
    except BadKey as e:
        raise CannotFetch(f"it {e}") from None
    except (aiohttp.ClientError, OSError, ValueError) as e:
        raise CannotFetch(" ".join(str(e).split()) or type(e).__name__) from None
    return text


class Keyring:
    """The keys of all sources.

    Args:
        on_change: gets them whenever they have changed.

    Attributes:
        sources: their texts, and whether each can be read by others too (:func:`quotepush.token_keys.keys_of`).
    """

    def __init__(self, settings: Settings, on_change: Callable[[list[_Source]], None]) -> None:
        self._settings = settings
        self._on_change = on_change
        self._files: dict[str, str] = {}
        self._looks: dict[str, object] = {}
        self._set = ""
        self._troubles: set[str] = set()
        self._fetched_s = float("-inf")
        self._waiting: list[Callable[[], None]] = []
        self._is_wanted = asyncio.Event()
        self._has_begun = False

    @property
    def sources(self) -> list[_Source]:
        texts = [self._settings.token_key, *self._files.values()]
        return [(text, False) for text in texts if text] + ([(self._set, True)] if self._set else [])

    @property
    def lacks_keys(self) -> bool:
        """Whether tokens are wanted and none can be checked."""
        return self._settings.has_tokens and not self.sources

    async def begin(self) -> None:
        """Read and fetch everything once; what fails is tried again by :meth:`run`."""
        self._look()
        if self._settings.token_jwks_url:
            await self._fetch()
        self._has_begun = True

    async def run(self) -> None:
        """Keep the keys new, until cancelled."""
        async with asyncio.TaskGroup() as group:
            if self._settings.token_key_file:
                group.create_task(self._keep_looking())
            if self._settings.token_jwks_url:
                group.create_task(self._keep_fetching())

    def renew(self, then: Callable[[], None]) -> None:
        """A token names an unknown key: look for newer ones, if that was not done just now; then call ``then``."""
        self._look()
        if self._settings.token_jwks_url and time.monotonic() - self._fetched_s >= LEAST_BETWEEN_S:
            self._waiting.append(then)
            self._is_wanted.set()
        else:
            then()

    # Files

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            self._look()

    def _look(self) -> None:
        """Read the files that have changed."""
        before = self.sources
        for path in self._settings.token_key_file:
            try:
                found = os.stat(path)
                look = (found.st_mtime_ns, found.st_ino, found.st_size)
                if look == self._looks.get(path):
                    continue
                text = Path(path).read_text(encoding="utf-8")
                parse_keys(text)
            except (OSError, UnicodeDecodeError) as e:
                self._note_trouble(path, f"cannot be read: {e}")
                continue
            except BadKey as e:
                self._note_trouble(path, str(e))
                continue
            self._looks[path] = look
            self._files[path] = text
            self._note_trouble(path, "")
        self._tell(before)

    # The key set

    async def _keep_fetching(self) -> None:
        refresh_s = self._settings.token_jwks_refresh_s
        while True:
            try:
                async with asyncio.timeout(min(_AGAIN_S, refresh_s) if _URL in self._troubles else refresh_s):
                    await self._is_wanted.wait()
            except TimeoutError:
                pass
            await self._fetch()
            self._is_wanted.clear()  # who has asked while it was fetched is answered, too
            waiting, self._waiting = self._waiting, []
            for then in waiting:
                then()

    async def _fetch(self) -> None:
        before = self.sources
        try:
            self._set = await fetch_key_set(self._settings.token_jwks_url)
            self._note_trouble(_URL, "")
        except CannotFetch as e:
            self._note_trouble(_URL, f"cannot be fetched: {e}")
        finally:
            self._fetched_s = time.monotonic()
        self._tell(before)

    def _note_trouble(self, source: str, trouble: str) -> None:
        """Say once what is wrong with a source, and once that it is well again."""
        if trouble and source not in self._troubles:
            log.warning("keys of tokens: %s %s; the keys that are known stay", source, trouble)
            self._troubles.add(source)
        elif not trouble and source in self._troubles:
            log.info("keys of tokens: %s is well again", source)
            self._troubles.remove(source)

    def _tell(self, before: list[_Source]) -> None:
        if self._has_begun and self.sources != before:
            log.info("keys of tokens have changed")
            self._on_change(self.sources)
