"""The Python client for scripts and notebooks: the same, without asyncio.

::

    with BlockingQuoteClient("http://127.0.0.1:8008") as quotes:
        quotes.subscribe(["sh600519", "AAPL"])
        for row in quotes.listen(10):
            print(row["code"], row["last"])

Law: the client lives on a loop of its own in a thread of its own, so it works where a loop runs already; everything
is asked of it through that loop, and after :meth:`BlockingQuoteClient.close` there is no thread.
"""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from quotepush.client import ClientClosed, QuoteClient, Row, SnapshotResult, SubscribeResult

__all__ = ["BlockingQuoteClient"]

_Answer = TypeVar("_Answer")

# Rows are fetched from the other thread this many at a time: one by one costs a change of threads each.
_ROWS_PER_TURN = 256


class BlockingQuoteClient:
    """`QuoteClient` for programs without asyncio; not for several threads at once.

    In a notebook, where ``with`` does not reach from one cell to the next: :meth:`open` and :meth:`close`.

    Args:
        url: as for :class:`~quotepush.client.QuoteClient`.
        options: its other arguments. A ``token`` function is called in the client's thread.

    Raises:
        WrongUrl, ValueError: as for :class:`~quotepush.client.QuoteClient`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._quotes = QuoteClient(url, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._taken: deque[Row] = deque()  # fetched, and not yet returned

    # Its life

    def open(self) -> Self:
        """Start connecting; return at once. Once."""
        if self._thread is not None:
            raise RuntimeError("a client is opened once")
        self._loop = asyncio.new_event_loop()
        # A daemon: whoever forgets to close it can still end the program.
        self._thread = threading.Thread(target=_live, args=(self._loop,), name="quotepush client", daemon=True)
        self._thread.start()
        self._wait_for(self._quotes.__aenter__())
        return self

    def close(self) -> None:
        """End the connection and the thread. Harmless twice."""
        if self._loop is None or self._thread is None or self._loop.is_closed():
            return
        try:
            self._wait_for(self._quotes.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._taken.clear()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What it knows

    @property
    def url(self) -> str:
        """Where it connects to, without user, password and query."""
        return self._quotes.url

    @property
    def state(self) -> str:
        """``connecting``, ``open``, ``waiting`` or ``closed``."""
        return self._quotes.state

    @property
    def hello(self) -> Mapping[str, Any] | None:
        """The server's first message on the newest connection; None before the first."""
        return self._quotes.hello

    @property
    def rows(self) -> dict[str, Row]:
        """The newest row of each subscribed code that has one, by canonical code, as of now."""
        return self._ask(lambda: dict(self._quotes.rows))

    @property
    def merged(self) -> Counter[str]:
        """Per subscribed code how many rows the server merged into newer ones, as of now."""
        return self._ask(lambda: Counter(self._quotes.merged))

    @property
    def gaps(self) -> Counter[str]:
        """Per subscribed code how often rows were lost, as of now."""
        return self._ask(lambda: Counter(self._quotes.gaps))

    @property
    def merged_locally(self) -> int:
        """How many rows were merged into newer ones because nobody took them from the full queue."""
        return self._quotes.merged_locally

    @property
    def feed(self) -> str | None:
        """What the last heartbeat said of the server's feed."""
        return self._quotes.feed

    def frame(self) -> Any:
        """Return :attr:`rows` as a ``pandas.DataFrame``, indexed by code.

        Raises:
            ImportError: pandas is not installed.
        """
        return self._ask(self._quotes.frame)

    # What a caller asks for

    def subscribe(
        self,
        codes: str | Iterable[str],
        *,
        fields: Iterable[str] | None = None,
        max_rate: float | None = None,
        timeout: float | None = None,
    ) -> SubscribeResult:
        """Subscribe as :meth:`QuoteClient.subscribe` does; wait for the answer, ``timeout`` seconds at most.

        Raises:
            TimeoutError: no answer yet; the wish stands.
        """
        return self._wait_for(self._quotes.subscribe(codes, fields=fields, max_rate=max_rate), timeout)

    def unsubscribe(self, codes: str | Iterable[str]) -> tuple[str, ...]:
        """Drop codes as :meth:`QuoteClient.unsubscribe` does."""
        removed = self._wait_for(self._quotes.unsubscribe(codes))
        self._taken = deque(row for row in self._taken if row["code"] not in removed)
        return removed

    def list(self) -> Sequence[Mapping[str, Any]]:
        """Return the server's list of our subscriptions, as :meth:`QuoteClient.list` does."""
        return self._wait_for(self._quotes.list())

    def snapshot(self, codes: str | Iterable[str]) -> SnapshotResult:
        """Return the newest rows of codes, as :meth:`QuoteClient.snapshot` does."""
        return self._wait_for(self._quotes.snapshot(codes))

    def ping(self) -> float:
        """Return the round trip to the server and back in milliseconds."""
        return self._wait_for(self._quotes.ping())

    def on(self, event: str, fn: Callable[[Any], object]) -> Callable[[], None]:
        """Call ``fn`` on each ``event``, in the client's thread, as :meth:`QuoteClient.on` does."""
        return self._quotes.on(event, fn)

    def next_row(self, timeout: float | None = None) -> Row:
        """Return the next row.

        Raises:
            TimeoutError: none has come for ``timeout`` seconds.
            Refused, ClientClosed: there will be none.
        """
        if not self._taken:
            rows = self._wait_for(self._quotes.next_rows(_ROWS_PER_TURN), timeout)
            if not rows:
                raise ClientClosed
            self._taken.extend(rows)
        return self._taken.popleft()

    def __iter__(self) -> Iterator[Row]:
        """Yield every row, for ever; end when the client is closed."""
        return self.listen(None)

    def listen(self, seconds: float | None) -> Iterator[Row]:
        """Yield every row for so many seconds.

        Raises:
            Refused: the server wants none of us, and all rows have been taken.
        """
        end_s = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                row = self.next_row(None if end_s is None else max(0.0, end_s - time.monotonic()))
            except (TimeoutError, ClientClosed):
                return
            yield row
            if end_s is not None and time.monotonic() >= end_s:
                return

    # The other thread

    def _wait_for(self, doing: Coroutine[Any, Any, _Answer], timeout: float | None = None) -> _Answer:
        """Return what a coroutine returns on the client's loop; an interrupted wait cancels it."""
        if self._loop is None or self._loop.is_closed():
            doing.close()
            raise ClientClosed
        if self._thread is threading.current_thread():
            doing.close()
            raise RuntimeError("a callback must not wait: its thread is the one that the answer comes by")
        answer = asyncio.run_coroutine_threadsafe(_within(timeout, doing), self._loop)
        try:
            return answer.result()
        except BaseException:
            answer.cancel()  # Ctrl-C, most of all
            raise

    def _ask(self, fn: Callable[[], _Answer]) -> _Answer:
        """Return what a function returns on the client's loop, where nothing changes meanwhile."""
        if self._loop is None or self._loop.is_closed() or self._thread is threading.current_thread():
            return fn()

        async def call() -> _Answer:
            return fn()

        return self._wait_for(call())


def _live(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped; the thread that ran it also closes it."""
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _within(timeout: float | None, doing: Coroutine[Any, Any, _Answer]) -> _Answer:
    async with asyncio.timeout(timeout):
        return await doing
