"""What a call finds, a page at a time: for sets that are too large for one answer.

Invariant: no page asks Redis for more than about ``count`` members, and a cursor is a text of its own that anybody
can bring back later, to whichever process.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from quotepush.errors import CallRefused

__all__ = ["Listing", "Page", "next_cursor", "no_cursor", "set_cursor"]

Item = TypeVar("Item")

_PAGE = 500
_SET_CURSOR = re.compile(r"\d{1,20}\Z")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Some of what there is.

    Attributes:
        items: about as many as were asked for; there may be none although more follow.
        cursor: for the next page; empty: this was the last.
    """

    items: tuple[Item, ...]
    cursor: str


class Listing(Generic[Item]):
    """Many things, found as they are asked for.

    ::

        async for conn in backend.user_conns("ann"): ...     # a page at a time
        conns = await backend.user_conns("ann")               # all, in a list
        page = await backend.user_conns("ann").page("", 100)  # one page, and the cursor of the next

    What comes or goes while the pages are read may be among them or not; what stays is. Iterating and awaiting yield
    nothing twice.
    """

    def __init__(self, fetch: Callable[[str, int], Awaitable[Page[Item]]], name: Callable[[Item], str]) -> None:
        self._fetch = fetch
        self._name = name

    async def page(self, cursor: str = "", count: int = _PAGE) -> Page[Item]:
        """Return the page that a cursor stands for, the first one without.

        Raises:
            CallRefused: the cursor is none.
            BackendUnavailable: Redis does not answer.
        """
        return await self._fetch(cursor, count)

    async def all(self) -> list[Item]:
        """Return all of it."""
        return [item async for item in self]

    def new_of(self, page: Page[Item], seen: set[str]) -> list[Item]:
        """Return what of a page is not among ``seen``, and add it there.

        Redis hands out some members of a set that grows or shrinks twice.
        """
        new = []
        for item in page.items:
            name = self._name(item)
            if name not in seen:
                seen.add(name)
                new.append(item)
        return new

    async def __aiter__(self) -> AsyncIterator[Item]:
        seen: set[str] = set()
        cursor = ""
        while True:
            page = await self._fetch(cursor, _PAGE)
            for item in self.new_of(page, seen):
                yield item
            cursor = page.cursor
            if not cursor:
                return

    def __await__(self) -> Generator[Any, None, list[Item]]:
        return self.all().__await__()


def set_cursor(cursor: str) -> str:
    """Return what stands for a cursor of ours in a SCAN of Redis.

    Raises:
        CallRefused: it is none.
    """
    if cursor and not _SET_CURSOR.match(cursor):
        raise no_cursor(cursor)
    return cursor or "0"


def next_cursor(after: Any) -> str:
    """Return the cursor that stands for what a SCAN of Redis said of its next page."""
    return str(int(after)) if int(after) else ""


def no_cursor(cursor: str) -> CallRefused:
    """Return what to raise for a text that is no cursor."""
    return CallRefused("bad_request", f"{cursor[:80]!r} is no cursor of an answer")
