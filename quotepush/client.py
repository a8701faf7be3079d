"""The Python client: live quotes that look after their own connection.

::

    async with QuoteClient("http://127.0.0.1:8008") as quotes:
        result = await quotes.subscribe(["sh600519", "AAPL"])
        async for row in quotes:
            print(row["code"], row["last"])

It notices a link that is silently dead, comes back with growing, randomly spread pauses, resumes all subscriptions
behind the last row of each, yields no row twice and none out of order, and tells what was lost. A row is always
complete, so it never has to be merged with the one before. What is wanted lives in :mod:`quotepush.client_state`, what
rows mean in :mod:`quotepush.client_rows`, the socket in :mod:`quotepush.client_link`; here they meet whoever uses them.

Law: callers change what is wanted and wait for news; they never touch the connection. Whoever is cancelled while
waiting leaves nothing half done, and a row that was not returned is still there.

What it raises is in :mod:`quotepush.client_errors`. A request that the server refuses is a
:class:`~quotepush.errors.PeerError` with the server's word and sentence. For programs without asyncio there is
:class:`~quotepush.client_blocking.BlockingQuoteClient`.
"""

import asyncio
import ssl as ssl_module
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from quotepush.client_errors import ClientClosed, ClientError, NotAnswered, Refused, WrongUrl
from quotepush.client_events import Listeners
from quotepush.client_frame import frame_of
from quotepush.client_link import ClientLink, StateChange
from quotepush.client_messages import (
    Accepted,
    BadMessage,
    Message,
    Rejected,
    Row,
    SubscribeResult,
    results_of,
    retry_after_ms,
)
from quotepush.client_questions import Questions, SnapshotResult
from quotepush.client_rows import Gap, RowQueue
from quotepush.client_state import ClientState, Options
from quotepush.client_token import Token, TokenSource

__all__ = [
    "Accepted",
    "ClientClosed",
    "ClientError",
    "Gap",
    "NotAnswered",
    "QuoteClient",
    "Refused",
    "Rejected",
    "Row",
    "SnapshotResult",
    "StateChange",
    "SubscribeResult",
    "Token",
    "WrongUrl",
]

# A consumer that never waits lets the connection have its turn after so many rows.
_ROWS_PER_TURN = 256


class QuoteClient:
    """One connection to a server, made again whenever it is lost.

    Iterating yields every row of every subscribed code, also the snapshot rows with which a subscription begins.
    Rows that are not taken wait in a queue; only when it is full they are merged, newest row per code
    (:attr:`merged_locally` counts them). Several tasks that iterate share the rows.

    Args:
        url: of the server, ``http``, ``https``, ``ws`` or ``wss``; ``/ws`` is appended when there is no path.
        headers: sent with the handshake.
        token: for a server that wants one: a text, with whose end the client ends (:class:`Refused`); or a function,
            plain or async, that returns the newest one. It is called for each connection, again before its token
            expires, so that the connection goes on, and again when the server has refused the last one.
        ssl: how a server's certificate is verified; a context for a private authority.
        max_queued_rows: how many rows wait for the caller before they are merged.
        open_timeout_s: for connecting, until the server's first message.
        request_timeout_s: for ``list``, ``snapshot`` and ``ping``, waiting for a connection included.
        min_backoff_s: bound of the pause after the first failure; it doubles with each further one.
        max_backoff_s: bound of all pauses. A pause is anything between 0 and its bound, by chance, so that clients
            that lost one server together do not come back together; what the server asks for is added.

    Raises:
        WrongUrl: the URL cannot be one of a server.
        ValueError: the token cannot be one.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        token: Token | None = None,
        ssl: ssl_module.SSLContext | bool = True,
        max_queued_rows: int = 10_000,
        open_timeout_s: float = 10.0,
        request_timeout_s: float = 10.0,
        min_backoff_s: float = 0.5,
        max_backoff_s: float = 20.0,
    ) -> None:
        self._link = ClientLink(
            url,
            headers=headers or {},
            tokens=TokenSource(token, open_timeout_s),
            ssl=ssl,
            open_timeout_s=open_timeout_s,
            min_backoff_s=min_backoff_s,
            max_backoff_s=max_backoff_s,
            on_message=self._receive,
            on_lost=self._lose,
            on_state=self._change_state,
            on_token=self._bring_token,
        )
        self._core = ClientState()
        self._queue = RowQueue(max_queued_rows)
        self._listeners = Listeners()
        self._feed: str | None = None
        self._feed_age_ms: int | None = None
        self._end: Exception | None = ClientClosed()  # what using the client raises; None: it is alive
        self._resync: asyncio.TimerHandle | None = None
        # Who waits
        self._has_rows = asyncio.Event()
        self._news = asyncio.Event()
        self._turn = 0
        self._questions = Questions(self._core, self._link.say, self._until_greeted, request_timeout_s)

    # The life of a client

    async def __aenter__(self) -> "QuoteClient":
        """Start connecting; return at once."""
        self._end = None
        self._link.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection; whoever iterates stops, whoever waits gets :class:`ClientClosed`. Harmless twice."""
        if self._end is None:
            self._end = ClientClosed()
        self._queue.clear()
        await self._link.close()
        self._tell_news()

    @property
    def url(self) -> str:
        """Where it connects to, without user, password and query."""
        return self._link.url

    @property
    def state(self) -> str:
        """``connecting``, ``open``, ``waiting`` or ``closed``."""
        return self._link.state.state

    @property
    def hello(self) -> Mapping[str, Any] | None:
        """The server's first message on the newest connection; None before the first."""
        return self._core.hello or None

    @property
    def rows(self) -> Mapping[str, Row]:
        """The newest row of each subscribed code that has one, by canonical code."""
        return self._core.stream.rows

    @property
    def merged(self) -> Counter[str]:
        """Per subscribed code how many rows the server merged into newer ones on their way to us."""
        return self._core.stream.merged

    @property
    def gaps(self) -> Counter[str]:
        """Per subscribed code how often rows were lost; the ``gap`` event (:class:`Gap`) says which."""
        return self._core.stream.gaps

    @property
    def merged_locally(self) -> int:
        """How many rows were merged into newer ones because nobody took them from the full queue."""
        return self._queue.merged

    @property
    def feed(self) -> str | None:
        """What the last heartbeat said of the server's feed: ``ok``, ``stale`` or ``down``; None: not connected."""
        return self._feed

    @property
    def feed_age_ms(self) -> int | None:
        """Age of the server's newest tick of any code at the last heartbeat; None: unknown."""
        return self._feed_age_ms

    def frame(self) -> Any:
        """Return :attr:`rows` as a ``pandas.DataFrame``, indexed by code.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame_of(self.rows.values())

    # What a caller asks for

    async def subscribe(
        self, codes: str | Iterable[str], *, fields: Iterable[str] | None = None, max_rate: float | None = None
    ) -> SubscribeResult:
        """Subscribe, now and after every reconnect; return what the server made of each code.

        Subscribing again replaces the options of a code, also with none. Its rows go on; :attr:`rows` has the newest
        in its new form at once. Options that the server refuses leave a subscription as it was.

        Args:
            codes: in any spelling.
            fields: the view: names of docs/protocol.md; ``code``, ``seq`` and ``ts`` always come. None: the usual ones.
            max_rate: most rows a second and code. What was missed while there was no connection is then not made up
                for. None: every row.

        A refused code is forgotten; one that was accepted stays, and should a later connection refuse it, an
        ``error`` event says so. Returns when the server has answered, and as long as there is none it waits: the
        server may come back at any time. Cancelling the wait (``asyncio.timeout``) does not take the wish back.

        Raises:
            Refused: the server wants none of us.
            ClientClosed: closed meanwhile.
        """
        self._require_life()
        options = Options(None if fields is None else tuple(_listed(fields)), max_rate)
        wishes = [self._core.want(spelling, options) for spelling in _listed(codes)]
        self._sync()
        while any(wish.outcome is None for wish in wishes):
            await self._wait_for_news()
        return results_of(wish.outcome for wish in wishes)

    async def unsubscribe(self, codes: str | Iterable[str]) -> tuple[str, ...]:
        """Drop codes, in any spelling, ``"*"`` for all; return the canonical codes that were subscribed.

        From the call on no row of them is yielded. Returns when the server has acknowledged it, or has lost us.

        Raises:
            Refused, ClientClosed: the connection is over for good, and with it all subscriptions.
        """
        self._require_life()
        removed = self._core.unwant(_listed(codes))
        self._queue.drop(removed)
        self._tell_news()  # somebody may wait for the answer to a subscribe that is void now
        self._sync()
        while self._core.is_leaving(removed):
            await self._wait_for_news()  # bounded: the answer comes, or the watchdog ends the connection
        return removed

    async def list(self) -> Sequence[Mapping[str, Any]]:
        """Return the server's list of our subscriptions: code, seq of the last row sent, rows merged.

        Raises:
            PeerError: the server refuses to answer.
            NotAnswered, Refused, ClientClosed: there is no answer.
        """
        answer = await self._questions.ask("list")
        found = answer.get("subscriptions")
        return found if isinstance(found, list) else []

    async def snapshot(self, codes: str | Iterable[str]) -> SnapshotResult:
        """Return the newest rows of codes, subscribed or not; no subscription is made.

        Raises:
            PeerError, NotAnswered, Refused, ClientClosed: as :meth:`list`.
        """
        return await self._questions.snapshot(_listed(codes))

    async def ping(self) -> float:
        """Return the round trip to the server and back in milliseconds.

        Raises:
            PeerError, NotAnswered, Refused, ClientClosed: as :meth:`list`.
        """
        begin = time.perf_counter()
        await self._questions.ask("ping")
        return (time.perf_counter() - begin) * 1000

    def on(self, event: str, fn: Callable[[Any], object]) -> Callable[[], None]:
        """Call ``fn`` on each ``event``, with one argument; return what ends that.

        Events: ``row`` (every new row), ``gap`` (:class:`Gap`, before the row behind it), ``state``
        (:class:`StateChange`), the server's messages ``status``, ``message``, ``error`` and ``heartbeat``, and ``raw``
        (a backend's bare frame; ``data`` is its text or bytes). ``fn`` is a plain function and must be quick; when it
        raises, the loop's exception handler is told and everything goes on.
        """
        return self._listeners.add(event, fn)

    def __aiter__(self) -> AsyncIterator[Row]:
        return self

    async def __anext__(self) -> Row:
        """Return the next row; ends after :meth:`close`.

        Raises:
            Refused: the server wants none of us, and all rows have been taken.
        """
        self._turn += 1
        if not self._turn % _ROWS_PER_TURN:
            await asyncio.sleep(0)
        if not await self._rows_wait():
            raise StopAsyncIteration
        return self._queue.take()

    async def next_rows(self, most: int = 1000) -> Sequence[Row]:
        """Return the rows that wait, in order, at least one; nothing after :meth:`close`.

        The same rows as by iterating, for who handles many at once.

        Raises:
            Refused: the server wants none of us, and all rows have been taken.
        """
        if not await self._rows_wait():
            return ()
        return [self._queue.take() for _ in range(min(most, len(self._queue)))]

    # Waiting

    async def _rows_wait(self) -> bool:
        """Return True when there are rows to take, False when there never will be."""
        while not self._queue:
            if isinstance(self._end, ClientClosed):
                return False
            self._require_life()
            self._has_rows.clear()
            await self._has_rows.wait()  # no timeout: a quiet market is no fault, and a dead link is the watchdog's
        return True

    def _require_life(self) -> None:
        if self._end is not None:
            # A new one each time: whoever raises an exception adds to its traceback.
            raise ClientClosed() if isinstance(self._end, ClientClosed) else self._end

    async def _wait_for_news(self) -> None:
        """Return when something has changed that somebody may wait for; the caller says what bounds it."""
        await self._news.wait()
        self._require_life()

    def _tell_news(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
        if self._end is not None:
            self._has_rows.set()

    async def _until_greeted(self) -> None:
        """Return when there is a connection; whoever asks has a timeout."""
        self._require_life()
        while not self._core.is_greeted:
            await self._wait_for_news()

    # What the server says

    def _lose(self) -> None:
        """Forget what belonged to the connection; who waits for an answer on it hears that there is none."""
        self._core.lose()
        self._feed = self._feed_age_ms = None
        if self._resync is not None:
            self._resync.cancel()
            self._resync = None
        self._questions.lose()
        self._tell_news()

    def _receive(self, message: Message) -> None:
        if not self._core.is_greeted and message["type"] != "hello":
            raise BadMessage("it does not begin with hello")
        receive = _RECEIVERS.get(message["type"])
        if receive is not None:
            receive(self, message)

    def _receive_hello(self, message: Message) -> None:
        self._core.greet(message)
        self._link.greeted(message)
        self._sync()

    def _receive_rows(self, message: Message) -> None:  # hot
        fresh, gaps = self._core.take(message)
        for gap in gaps:
            self._listeners.tell("gap", gap)
        if message["type"] == "snapshot":
            self._questions.take_snapshot(message)
        put = self._queue.put
        for row in fresh:
            put(row)
        if fresh:
            self._has_rows.set()
            for row in fresh:
                self._listeners.tell("row", row)

    def _receive_ack(self, message: Message) -> None:
        self._questions.take_answer(message, self._core.request_id(message))
        for refusal in self._core.acknowledge(message):
            self._listeners.tell(
                "error",
                {
                    "type": "error", "action": "subscribe", "error": refusal.error, "message": refusal.message,
                    "codes": [refusal.spelling],
                },
            )  # fmt: skip
        self._sync()
        self._tell_news()

    def _receive_error(self, message: Message) -> None:
        self._questions.take_answer(message, self._core.request_id(message))
        loop = asyncio.get_running_loop()
        retry_after_s = self._core.refuse(message, loop.time())
        if retry_after_s:
            if self._resync is not None:
                self._resync.cancel()
            # A little later than the core allows it again, or rounding would make it too early.
            self._resync = loop.call_later(retry_after_s + 0.001, self._sync)
        self._listeners.tell("error", message)
        self._tell_news()

    def _receive_heartbeat(self, message: Message) -> None:
        self._link.settled()
        feed, age_ms = message.get("feed"), message.get("feed_age_ms")
        self._feed = feed if isinstance(feed, str) else None
        self._feed_age_ms = age_ms if isinstance(age_ms, int) else None
        self._listeners.tell("heartbeat", message)

    def _receive_status(self, message: Message) -> None:
        if message.get("state") == "closing":
            self._link.stay_away(retry_after_ms(message) / 1000)
        self._listeners.tell("status", message)

    def _receive_message(self, message: Message) -> None:
        self._listeners.tell(message["type"], message)

    # What we say

    def _bring_token(self, token: str) -> None:
        self._link.say(self._core.ask("auth", token=token))

    def _sync(self) -> None:
        """Say what is due to bring the connection's subscriptions to what is wanted."""
        for request in self._core.due_requests(asyncio.get_running_loop().time()):
            self._link.say(request)

    def _change_state(self, change: StateChange) -> None:
        if change.state == "closed" and self._end is None:
            self._end = self._link.failure or ClientClosed()
        self._tell_news()
        self._listeners.tell("state", change)


_RECEIVERS: dict[str, Callable[[QuoteClient, Message], None]] = {
    "hello": QuoteClient._receive_hello,
    "snapshot": QuoteClient._receive_rows,
    "tick": QuoteClient._receive_rows,
    "ack": QuoteClient._receive_ack,
    "pong": QuoteClient._receive_ack,
    "error": QuoteClient._receive_error,
    "heartbeat": QuoteClient._receive_heartbeat,
    "status": QuoteClient._receive_status,
    "message": QuoteClient._receive_message,
    "raw": QuoteClient._receive_message,
}


def _listed(codes: str | Iterable[str]) -> list[str]:
    return [codes] if isinstance(codes, str) else list(dict.fromkeys(codes))
