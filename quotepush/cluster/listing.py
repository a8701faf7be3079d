"""What a call finds, a page at a time: for sets that are too large for one answer.

Invariant: no page asks Redis for more than about ``count`` members, and a cursor is a text of its own that anybody
can bring back later, to whichever process.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Listing", "Page"]

Item = TypeVar("Item")

_PAGE = 500


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

    async def __aiter__(self) -> AsyncIterator[Item]:
        seen: set[str] = set()  # a set that is growing hands out some members twice
        cursor = ""
        while True:
            page = await self._fetch(cursor, _PAGE)
            for item in page.items:
                name = self._name(item)
                if name not in seen:
                    seen.add(name)
                    yield item
            cursor = page.cursor
            if not cursor:
                return

    def __await__(self) -> Generator[Any, None, list[Item]]:
        return self._all().__await__()

    async def _all(self) -> list[Item]:
        return [item async for item in self]
