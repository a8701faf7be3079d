"""The library for backends: send to connections, users and groups, close and look at them, publish.

::

    async with quotepush.Backend("redis://127.0.0.1:6379/0") as backend:
        sent = await backend.send_to_user("ann", {"title": "Order filled"})
        print(sent.delivered, "connections took it")

It speaks with the servers through their Redis, so it works from any machine that reaches it, and names hold in the
whole cluster. Law: no call waits without a bound, a call that is cancelled harms no other, and after a lost link the
next call makes it anew.
"""

import asyncio
import contextlib
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from msgspec.structs import replace
from redis.exceptions import RedisError

from quotepush.backend_demand import Demand, DemandChange
from quotepush.backend_events import Events
from quotepush.backend_sending import Sending, SendOptions
from quotepush.cluster.census import Census, Node, Session
from quotepush.cluster.commands import ClusterKeys, Command, is_name, node_of
from quotepush.cluster.line import Line
from quotepush.cluster.pages import Listing, Page
from quotepush.cluster.routing import Answers, Routing, Sent
from quotepush.cluster.schedule import Job, Schedule, Times
from quotepush.errors import BackendUnavailable, CallRefused, NotOnline
from quotepush.publisher import Publisher
from quotepush.quote.code import BadCode, parse_code
from quotepush.store.clients import Store

__all__ = [
    "Backend", "DemandChange", "Done", "Job", "Listing", "Node", "Page", "SendOptions", "Sent", "Session", "Stats",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a call on several connections.

    Attributes:
        count: of how many connections it is true now.
        nodes: the same for each node that answered.
        missing: nodes that hold one of them and did not answer in time; there it may have happened all the same.
    """

    count: int
    nodes: dict[str, int]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stats:
    """The cluster at a glance.

    Attributes:
        nodes: those that are alive, by name.
        conns: how many connections each of them has.
        codes: how many codes are watched.
    """

    nodes: dict[str, Node]
    conns: dict[str, int]
    codes: int


class Backend(Sending):
    """Calls for programs with asyncio; :class:`~quotepush.backend_blocking.BlockingBackend` is the same for others.

    Connections are named by their fd, which ``hello`` calls ``conn``. Calls may be made at the same time, from any
    task of one loop. Open it after a fork, not before: connections cannot be shared.

    Args:
        url: the registry Redis of the servers, in any form of docs/operations.md ("Which Redis").
        feed_url: the Redis that ticks go to; None: the same.
        prefix: the servers' ``redis_prefix``.
        timeout_s: the longest wait for an answer of Redis, and then for the nodes'. Nodes answer after two seconds
            with what their workers have said until then, so a shorter one may miss it.
        inbox_max: as the servers' setting: how many kept messages wait for a node, about; the oldest go first.
        kept_max: as the servers' setting: how many wait for a user who is away; the oldest go first.
        kept_ttl_s: as the servers' setting: how long they wait.
        jobs_max: as the servers' setting: how many messages wait to be sent later; more are refused.

    Raises:
        SettingsError: an address is none.
    """

    def __init__(
        self,
        url: str,
        *,
        feed_url: str | None = None,
        prefix: str = "qp:",
        timeout_s: float = 3.0,
        inbox_max: int = 10_000,
        kept_max: int = 100,
        kept_ttl_s: int = 86_400,
        jobs_max: int = 10_000,
    ) -> None:
        self._pid = os.getpid()
        self._timeout_s = timeout_s
        store = Store(url, timeout_s=timeout_s)
        self._redis = store.client()
        self._links = store.links()
        self._line = Line(self._redis, str(store), timeout_s)
        self._census = Census(self._line, prefix)
        self._routing = Routing(
            self._line, self._links, prefix,
            timeout_s=timeout_s, inbox_max=inbox_max, kept_max=kept_max, kept_ttl_s=kept_ttl_s,
            counts_hearers=not store.is_cluster,
        )  # fmt: skip
        self._schedule = Schedule(self._line.ask, prefix)
        self._jobs_max = jobs_max
        self._publisher = Publisher(feed_url or url, prefix=prefix, give_up_s=timeout_s)
        self._events_channel = ClusterKeys(prefix).events
        self._prefix = prefix
        self._hearing: weakref.WeakSet[Events | Demand] = weakref.WeakSet()

    # Its life

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of the connections; calls that wait raise ``BackendUnavailable``. Harmless twice."""
        for hearing in list(self._hearing):
            await hearing.aclose()
        await self._routing.aclose()
        await self._line.aclose()
        await self._publisher.aclose()
        with contextlib.suppress(RedisError, OSError):
            async with asyncio.timeout(self._timeout_s):
                await self._redis.aclose()

    async def connect(self) -> None:
        """Reach Redis, for a program that wants to know at its start; every call connects by itself.

        Raises:
            BackendUnavailable: there is no Redis now, or it refuses us.
        """
        await self._line.ask(("PING",))

    # Messages that are sent later: send_to_…(at=…, every=…) makes them

    def jobs(self) -> Listing[Job]:
        """Find the messages that are to be sent later, in no order."""
        return self._schedule.jobs()

    async def cancel_job(self, job: str) -> bool:
        """Forget a message that is to be sent later, by its id; say whether it was there.

        What is on its way just now still arrives.
        """
        self._check_process()
        return await self._schedule.cancel(job)

    # Ending connections

    async def close_conn(self, conn: str, *, code: int = 4403, reason: str = "kicked") -> bool:
        """Close a connection; say whether it was there.

        Args:
            code: of the WebSocket's close: 1000, or 3000 to 4999. Our clients do not come back after 4403.
            reason: what the client is told, at most 123 bytes.
        """
        answers = await self._order(Command(op="close", conns=[conn], code=code, reason=reason))
        await self._insist(answers, conn)
        return bool(answers.conns)

    async def close_conns(self, conns: Iterable[str], *, code: int = 4403, reason: str = "kicked") -> Done:
        """Close these connections."""
        return _done(await self._order(Command(op="close", conns=list(conns), code=code, reason=reason)))

    async def kick_user(self, user: str, *, code: int = 4403, reason: str = "kicked") -> Done:
        """Close every connection of a user."""
        return _done(await self._order(Command(op="kick", users=[user], code=code, reason=reason)))

    # What they may have

    async def entitle_conn(self, conn: str, claims: Mapping[str, Any]) -> None:
        """Let a connection have from now on what these claims of a token say, and no longer what its token said.

        It takes effect at once on what is subscribed, and until the connection ends or brings another token.

        Args:
            claims: such as ``codes``, ``max_rate``, ``max_codes``, ``delay_s`` (docs/protocol.md, "Claims"); what is
                left out is unlimited.

        Raises:
            NotOnline: it is not there.
            CallRefused: ``bad_request``: a claim is wrong.
        """
        await self._order_one(Command(op="entitle", conns=[conn], claims=dict(claims)), conn)

    async def entitle_user(self, user: str, claims: Mapping[str, Any]) -> Done:
        """Do the same with every connection that a user has now.

        Raises:
            CallRefused: ``bad_request``: a claim is wrong.
        """
        return _done(await self._order(Command(op="entitle", users=[user], claims=dict(claims))))

    # Users and groups

    async def bind_user(self, conn: str, user: str, *, conn_key: str = "") -> None:
        """Make a connection one of a user's; it leaves the user that it had.

        Returns when the registry has it, so that the next :meth:`send_to_user` finds it, but within ``timeout_s``.

        Args:
            conn_key: from the ``hello`` of the connection; needed where the servers have ``require_conn_key``.

        Raises:
            NotOnline: the connection is not there.
            CallRefused: ``key_needed``, ``wrong_key``.
        """
        await self._order_one(Command(op="bind", conn=conn, user=user, conn_key=conn_key), conn)
        await self._census.wait_for_user(conn, user, self._timeout_s)

    async def unbind_user(self, conn: str) -> None:
        """Take a connection from its user.

        Raises:
            NotOnline: it is not there.
        """
        await self._order_one(Command(op="unbind", conn=conn), conn)

    async def join_group(self, conn: str, group: str) -> None:
        """Put a connection into a group; it leaves it when it closes. Twice is once.

        Returns when the registry has it, as :meth:`bind_user`.

        Raises:
            NotOnline: it is not there.
        """
        await self._order_one(Command(op="join", conns=[conn], group=group), conn)
        await self._census.wait_for_group(conn, group, self._timeout_s)

    async def leave_group(self, conn: str, group: str) -> None:
        """Take a connection out of a group.

        Raises:
            NotOnline: it is not there.
        """
        await self._order_one(Command(op="leave", conns=[conn], group=group), conn)

    async def dissolve_group(self, group: str) -> Done:
        """Take every connection out of a group."""
        return _done(await self._order(Command(op="dissolve", group=group)))

    # Session data

    async def get_session(self, conn: str) -> dict[str, Any]:
        """Return the session data of a connection; it begins with what its token and its address said.

        Raises:
            NotOnline: it is not there.
        """
        return await self._session(Command(op="get_session", conn=conn))

    async def set_session(self, conn: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the session data of a connection; return what it is now.

        Raises:
            NotOnline: it is not there.
            CallRefused: ``too_large``: more than 8 KiB of JSON.
        """
        return await self._session(Command(op="set_session", conn=conn, data=dict(data)))

    async def update_session(self, conn: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Merge into the session data of a connection, None removes; return what it is now.

        Raises:
            NotOnline, CallRefused: as for :meth:`set_session`.
        """
        return await self._session(Command(op="update_session", conn=conn, data=dict(data)))

    # Who is there, as the registry says

    async def is_online(self, conn: str) -> bool:
        """Say whether a connection is there."""
        self._check_process()
        return await self._census.is_online(conn)

    async def is_user_online(self, user: str) -> bool:
        """Say whether a user has a connection anywhere."""
        return await self.user_count(user) > 0

    async def conn_user(self, conn: str) -> str | None:
        """Return the user of a connection; None: it has none, or is not there."""
        self._check_process()
        return (await self._census.session(conn))["user"]

    def user_conns(self, user: str) -> Listing[str]:
        """Find the connections of a user."""
        return self._census.user_conns(_named("user", user))

    async def user_count(self, user: str) -> int:
        """Return how many connections a user has."""
        self._check_process()
        return await self._census.user_count(_named("user", user))

    def users(self) -> Listing[str]:
        """Find the users who are online."""
        return self._census.users()

    def groups(self) -> Listing[str]:
        """Find the groups that have a connection."""
        return self._census.groups()

    def group_conns(self, group: str) -> Listing[str]:
        """Find the connections in a group."""
        return self._census.group_conns(_named("group", group))

    async def group_count(self, group: str) -> int:
        """Return how many connections are in a group."""
        self._check_process()
        return await self._census.group_count(_named("group", group))

    def group_sessions(self, group: str) -> Listing[Session]:
        """Find the sessions in a group."""
        return self._census.group_sessions(_named("group", group))

    def sessions(self) -> Listing[Session]:
        """Find the sessions of all connections."""
        return self._census.sessions()

    async def conn_count(self) -> int:
        """Return how many connections there are in the cluster."""
        self._check_process()
        return sum((await self._census.conn_counts()).values())

    def codes(self) -> Listing[str]:
        """Find the codes that somebody watches."""
        return self._census.codes()

    def code_conns(self, code: str) -> Listing[str]:
        """Find the connections that watch a code.

        Raises:
            CallRefused: ``bad_code``.
        """
        return self._census.code_conns(_canonical(code))

    async def code_count(self, code: str) -> int:
        """Return how many connections watch a code.

        Raises:
            CallRefused: ``bad_code``.
        """
        self._check_process()
        return await self._census.code_audience(_canonical(code))

    async def conn_codes(self, conn: str) -> list[str]:
        """Return the codes that a connection watches."""
        self._check_process()
        return await self._census.conn_codes(conn)

    async def stats(self) -> Stats:
        """Return which nodes are alive, and how much they have to do."""
        self._check_process()
        return Stats(await self._census.nodes(), await self._census.conn_counts(), await self._census.code_count())

    # What happens, and ticks

    def events(self) -> Events:
        """Hear who comes and goes; the servers say it where their setting ``events`` is on."""
        self._check_process()
        events = Events(self._links, self._events_channel, self._timeout_s)
        self._hearing.add(events)
        return events

    def demand(self) -> Demand:
        """Hear which codes have a subscriber anywhere: first all, then what changes."""
        self._check_process()
        demand = Demand(self._redis, self._links, self._prefix, self._timeout_s)
        self._hearing.add(demand)
        return demand

    async def publish(self, ticks: Iterable[Mapping[str, Any]]) -> list[int]:
        """Publish a batch of ticks, in its order and as a whole; return the ``seq`` of each.

        Raises:
            BadTick: one of them is none (``reason`` is the word for it); nothing is published.
            RedisUnavailable: the feed's Redis does not take it within ``timeout_s``.
        """
        self._check_process()
        return await self._publisher.publish(ticks)

    # The nodes' part

    async def _send_now(self, command: Command, is_kept: bool) -> Sent:
        self._check_process()
        return await self._routing.send(command, kept=is_kept)

    async def _send_later(self, command: Command, is_kept: bool, times: Times) -> Job:
        self._check_process()
        return await self._schedule.add(replace(command, keep=is_kept), times, most=self._jobs_max)

    async def _order(self, command: Command) -> Answers:
        self._check_process()
        return await self._routing.order(command)

    async def _order_one(self, command: Command, conn: str) -> Answers:
        """Do something with the one connection of a command.

        Raises:
            NotOnline: it is not there.
        """
        answers = await self._order(command)
        await self._insist(answers, conn)
        if conn not in answers.conns:
            raise NotOnline(conn)
        return answers

    async def _insist(self, answers: Answers, conn: str) -> None:
        """The node of a connection must have answered, if it is alive."""
        if answers.missing and node_of(conn) in await self._census.nodes():
            raise BackendUnavailable(
                f"node {node_of(conn)} has not answered within {self._timeout_s:g} s; it may have been carried out"
            )

    async def _session(self, command: Command) -> dict[str, Any]:
        answers = await self._order_one(command, command.conn)
        (reply,) = answers.replies.values()
        return reply.session or {}

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a Backend belongs to the process that made it: make one after the fork")


def _done(answers: Answers) -> Done:
    return Done(answers.delivered, answers.counts, answers.missing)


def _named(kind: str, name: str) -> str:
    if not is_name(name):
        raise CallRefused("bad_request", f"the name of a {kind} has 1 to 128 characters and no control characters")
    return name


def _canonical(code: str) -> str:
    try:
        return parse_code(code)
    except BadCode as e:
        raise CallRefused("bad_code", f"{code[:60]!r}: {e}") from None
