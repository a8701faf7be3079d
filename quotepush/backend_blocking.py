"""The library for backends without asyncio: web frameworks with threads, scripts, consoles.

::

    with quotepush.BlockingBackend("redis://127.0.0.1:6379/0") as backend:
        backend.send_to_user("ann", {"title": "Order filled"})

Law: all calls run on one loop in a thread of its own, so any number of threads may share one backend, and after
:meth:`BlockingBackend.close` there is no thread.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, Unpack, overload

from quotepush.backend import Backend, Done, Job, Listing, Page, Sent, Session, Stats
from quotepush.backend_demand import Demand, DemandChange
from quotepush.backend_sending import AtOptions, EveryOptions, JobOptions, SendOptions
from quotepush.cluster.commands import To
from quotepush.errors import BackendUnavailable

__all__ = ["BlockingBackend", "BlockingDemand", "BlockingEvents", "BlockingListing"]

Answer = TypeVar("Answer")
Item = TypeVar("Item")
Heard = TypeVar("Heard", covariant=True)

_PAGE = 500


class BlockingBackend:
    """Calls for programs without asyncio; safe for any number of threads.

    Its thread and its connections begin with the first call. Make it in the process that uses it: under a server that
    forks workers (gunicorn, uWSGI, Celery), after the fork.

    Args:
        url: as for :class:`~quotepush.backend.Backend`.
        options: its other arguments.

    Raises:
        SettingsError: an address is none.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._backend = Backend(url, **options)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    # Its life

    def close(self) -> None:
        """Let go of the connections and end the thread; calls that wait raise. Harmless twice."""
        with self._lock:
            self._is_closed = True
            loop, self._loop = self._loop, None
        if loop is None or self._thread is None or os.getpid() != self._pid:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._backend.aclose(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Reach Redis as :meth:`Backend.connect` does."""
        self._wait_for(self._backend.connect())

    # Messages

    @overload
    def send_to_conn(self, conn: str, data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    def send_to_conn(self, conn: str, data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    def send_to_conn(self, conn: str, data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    def send_to_conn(self, conn: str, data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to one connection as :meth:`Backend.send_to_conn` does."""
        return self.send(To(conns=[conn]), data, options)

    @overload
    def send_to_conns(self, conns: Iterable[str], data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    def send_to_conns(self, conns: Iterable[str], data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    def send_to_conns(self, conns: Iterable[str], data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    def send_to_conns(self, conns: Iterable[str], data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to connections as :meth:`Backend.send_to_conns` does."""
        return self.send(To(conns=list(conns)), data, options)

    @overload
    def send_to_user(self, user: str, data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    def send_to_user(self, user: str, data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    def send_to_user(self, user: str, data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    def send_to_user(self, user: str, data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to a user as :meth:`Backend.send_to_user` does."""
        return self.send(To(users=[user]), data, options)

    @overload
    def send_to_users(self, users: Iterable[str], data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    def send_to_users(self, users: Iterable[str], data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    def send_to_users(self, users: Iterable[str], data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    def send_to_users(self, users: Iterable[str], data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to users as :meth:`Backend.send_to_users` does."""
        return self.send(To(users=list(users)), data, options)

    @overload
    def send_to_group(self, group: str, data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    def send_to_group(self, group: str, data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    def send_to_group(self, group: str, data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    def send_to_group(self, group: str, data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to a group as :meth:`Backend.send_to_group` does."""
        return self.send(To(group=group), data, options)

    @overload
    def send_to_all(self, data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    def send_to_all(self, data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    def send_to_all(self, data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    def send_to_all(self, data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to everybody as :meth:`Backend.send_to_all` does."""
        return self.send(To(all=True), data, options)

    def send(self, to: To, data: Any, options: JobOptions) -> Sent | Job:
        """Send as :meth:`Backend.send` does."""
        return self._wait_for(self._backend.send(to, data, options))

    # Messages that are sent later

    def jobs(self) -> "BlockingListing[Job]":
        """Find the messages that are to be sent later, in no order."""
        return BlockingListing(self, self._backend.jobs())

    def cancel_job(self, job: str) -> bool:
        """Forget a message that is to be sent later as :meth:`Backend.cancel_job` does."""
        return self._wait_for(self._backend.cancel_job(job))

    # Ending connections

    def close_conn(self, conn: str, *, code: int = 4403, reason: str = "kicked") -> bool:
        """Close a connection as :meth:`Backend.close_conn` does."""
        return self._wait_for(self._backend.close_conn(conn, code=code, reason=reason))

    def close_conns(self, conns: Iterable[str], *, code: int = 4403, reason: str = "kicked") -> Done:
        """Close connections as :meth:`Backend.close_conns` does."""
        return self._wait_for(self._backend.close_conns(conns, code=code, reason=reason))

    def kick_user(self, user: str, *, code: int = 4403, reason: str = "kicked") -> Done:
        """Close a user's connections as :meth:`Backend.kick_user` does."""
        return self._wait_for(self._backend.kick_user(user, code=code, reason=reason))

    # What they may have

    def entitle_conn(self, conn: str, claims: Mapping[str, Any]) -> None:
        """Change what a connection may have as :meth:`Backend.entitle_conn` does."""
        self._wait_for(self._backend.entitle_conn(conn, claims))

    def entitle_user(self, user: str, claims: Mapping[str, Any]) -> Done:
        """Change what a user's connections may have as :meth:`Backend.entitle_user` does."""
        return self._wait_for(self._backend.entitle_user(user, claims))

    # Users and groups

    def bind_user(self, conn: str, user: str, *, conn_key: str = "") -> None:
        """Make a connection a user's as :meth:`Backend.bind_user` does."""
        self._wait_for(self._backend.bind_user(conn, user, conn_key=conn_key))

    def unbind_user(self, conn: str) -> None:
        """Take a connection from its user as :meth:`Backend.unbind_user` does."""
        self._wait_for(self._backend.unbind_user(conn))

    def join_group(self, conn: str, group: str) -> None:
        """Put a connection into a group as :meth:`Backend.join_group` does."""
        self._wait_for(self._backend.join_group(conn, group))

    def leave_group(self, conn: str, group: str) -> None:
        """Take a connection out of a group as :meth:`Backend.leave_group` does."""
        self._wait_for(self._backend.leave_group(conn, group))

    def dissolve_group(self, group: str) -> Done:
        """Empty a group as :meth:`Backend.dissolve_group` does."""
        return self._wait_for(self._backend.dissolve_group(group))

    # Session data

    def get_session(self, conn: str) -> dict[str, Any]:
        """Return session data as :meth:`Backend.get_session` does."""
        return self._wait_for(self._backend.get_session(conn))

    def set_session(self, conn: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replace session data as :meth:`Backend.set_session` does."""
        return self._wait_for(self._backend.set_session(conn, data))

    def update_session(self, conn: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Merge into session data as :meth:`Backend.update_session` does."""
        return self._wait_for(self._backend.update_session(conn, data))

    # Who is there

    def is_online(self, conn: str) -> bool:
        """Say whether a connection is there."""
        return self._wait_for(self._backend.is_online(conn))

    def is_user_online(self, user: str) -> bool:
        """Say whether a user has a connection anywhere."""
        return self._wait_for(self._backend.is_user_online(user))

    def conn_user(self, conn: str) -> str | None:
        """Return the user of a connection; None: it has none, or is not there."""
        return self._wait_for(self._backend.conn_user(conn))

    def user_conns(self, user: str) -> "BlockingListing[str]":
        """Find the connections of a user."""
        return BlockingListing(self, self._backend.user_conns(user))

    def user_count(self, user: str) -> int:
        """Return how many connections a user has."""
        return self._wait_for(self._backend.user_count(user))

    def users(self) -> "BlockingListing[str]":
        """Find the users who are online."""
        return BlockingListing(self, self._backend.users())

    def groups(self) -> "BlockingListing[str]":
        """Find the groups that have a connection."""
        return BlockingListing(self, self._backend.groups())

    def group_conns(self, group: str) -> "BlockingListing[str]":
        """Find the connections in a group."""
        return BlockingListing(self, self._backend.group_conns(group))

    def group_count(self, group: str) -> int:
        """Return how many connections are in a group."""
        return self._wait_for(self._backend.group_count(group))

    def group_sessions(self, group: str) -> "BlockingListing[Session]":
        """Find the sessions in a group."""
        return BlockingListing(self, self._backend.group_sessions(group))

    def sessions(self) -> "BlockingListing[Session]":
        """Find the sessions of all connections."""
        return BlockingListing(self, self._backend.sessions())

    def conn_count(self) -> int:
        """Return how many connections there are in the cluster."""
        return self._wait_for(self._backend.conn_count())

    def codes(self) -> "BlockingListing[str]":
        """Find the codes that somebody watches."""
        return BlockingListing(self, self._backend.codes())

    def code_conns(self, code: str) -> "BlockingListing[str]":
        """Find the connections that watch a code."""
        return BlockingListing(self, self._backend.code_conns(code))

    def code_count(self, code: str) -> int:
        """Return how many connections watch a code."""
        return self._wait_for(self._backend.code_count(code))

    def conn_codes(self, conn: str) -> list[str]:
        """Return the codes that a connection watches."""
        return self._wait_for(self._backend.conn_codes(conn))

    def stats(self) -> Stats:
        """Return which nodes are alive, and how much they have to do."""
        return self._wait_for(self._backend.stats())

    # What happens, and ticks

    def events(self) -> "BlockingEvents":
        """Hear who comes and goes, as :meth:`Backend.events` does."""

        return BlockingEvents(self, self._make(self._backend.events))

    def demand(self) -> "BlockingDemand":
        """Hear which codes have a subscriber anywhere, as :meth:`Backend.demand` does."""
        return BlockingDemand(self, self._make(self._backend.demand))

    def publish(self, ticks: Iterable[Mapping[str, Any]]) -> list[int]:
        """Publish a batch of ticks as :meth:`Backend.publish` does."""
        return self._wait_for(self._backend.publish(list(ticks)))

    # The other thread

    def _make(self, kind: Callable[[], Answer]) -> Answer:
        async def make() -> Answer:
            return kind()

        return self._wait_for(make())

    def _wait_for(self, doing: Coroutine[Any, Any, Answer]) -> Answer:
        """Return what a coroutine returns on the backend's loop; an interrupted wait cancels it."""
        try:
            loop = self._running_loop()
        except BaseException:
            doing.close()
            raise
        answer = asyncio.run_coroutine_threadsafe(doing, loop)
        try:
            return answer.result()
        except CancelledError:
            raise BackendUnavailable("the backend was closed") from None
        except BaseException:
            answer.cancel()  # Ctrl-C, most of all
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if os.getpid() != self._pid:
            raise RuntimeError("a BlockingBackend belongs to the process that made it: make one after the fork")
        if threading.current_thread() is self._thread:
            raise RuntimeError("this is the backend's own thread: use Backend here")
        with self._lock:
            if self._is_closed:
                raise BackendUnavailable("the backend is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon: whoever forgets to close it can still end the program.
                self._thread = threading.Thread(target=_live, args=(self._loop,), name="quotepush backend", daemon=True)
                self._thread.start()
            return self._loop


class BlockingListing(Generic[Item]):
    """Many things, found a page at a time: ``for conn in backend.user_conns("ann")``; ``all()`` is a list of all."""

    def __init__(self, backend: BlockingBackend, listing: Listing[Item]) -> None:
        self._backend = backend
        self._listing = listing

    def page(self, cursor: str = "", count: int = _PAGE) -> Page[Item]:
        """Return the page that a cursor stands for, as :meth:`Listing.page` does."""
        return self._backend._wait_for(self._listing.page(cursor, count))

    def all(self) -> list[Item]:
        """Return all of it."""
        return self._backend._wait_for(self._listing.all())

    def __iter__(self) -> Iterator[Item]:
        seen: set[str] = set()
        cursor = ""
        while True:
            page = self.page(cursor)
            yield from self._listing.new_of(page, seen)
            cursor = page.cursor
            if not cursor:
                return


class _Hearing(Protocol[Heard]):
    async def __aenter__(self) -> Self: ...

    async def __anext__(self) -> Heard: ...

    async def aclose(self) -> None: ...


class _Blocking(Generic[Item]):
    """What is heard, for programs without asyncio."""

    def __init__(self, backend: BlockingBackend, hearing: _Hearing[Item]) -> None:
        self._backend = backend
        self._hearing = hearing

    def __enter__(self) -> Self:
        self._backend._wait_for(self._hearing.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hear no more; who iterates comes to the end, in whatever thread. Harmless twice."""
        self._backend._wait_for(self._hearing.aclose())

    def next(self, timeout_s: float | None = None) -> Item:
        """Return what comes next.

        Raises:
            TimeoutError: nothing has come for so long.
            EOFError: it is closed.
        """
        return self._backend._wait_for(_within(timeout_s, self._hearing))

    def __iter__(self) -> Iterator[Item]:
        while True:
            try:
                yield self.next()
            except EOFError:
                return


class BlockingEvents(_Blocking[dict[str, Any]]):
    """What happens, as it happens: ``for event in backend.events()``; see :class:`~quotepush.backend_events.Events`."""


class BlockingDemand(_Blocking[DemandChange]):
    """What is wanted: ``for wanted, unwanted in backend.demand()``; see :class:`~quotepush.backend_demand.Demand`."""

    def __init__(self, backend: BlockingBackend, demand: Demand) -> None:
        super().__init__(backend, demand)
        self._demand = demand

    def codes(self) -> frozenset[str]:
        """Return the codes that are wanted, as far as is known at the moment."""
        return self._backend._make(self._demand.codes)


async def _within(timeout_s: float | None, hearing: _Hearing[Item]) -> Item:
    async with asyncio.timeout(timeout_s):
        try:
            return await hearing.__anext__()
        except StopAsyncIteration:
            raise EOFError("it is closed") from None


def _live(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped; the thread that ran it also closes it."""
    try:
        loop.run_forever()
        calls = asyncio.all_tasks(loop)
        for call in calls:
            call.cancel()
        if calls:
            loop.run_until_complete(asyncio.wait(calls))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
