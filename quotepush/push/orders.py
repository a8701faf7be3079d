"""What the cluster wants done with this worker's sessions: messages to them, and changes of what they are.

Laws:

1. Orders are carried out one behind the other, in the order in which they came.
2. A message is encoded once per codec. It goes to the sockets at once, never behind rows that wait there, and in slices
   of the loop, so that rows go on meanwhile.
3. A socket that has taken too little of what it was sent before is sent no message, and does not count as one that
   took it: what a client that does not read costs stays bounded.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from quotepush.entitlement import Entitlement
from quotepush.errors import PeerError
from quotepush.push.desk import Desk
from quotepush.push.link import SocketLink
from quotepush.push.members import Members
from quotepush.push.session import Session
from quotepush.wire import messages
from quotepush.wire.formats import Codec

__all__ = ["MAX_UNSENT_BYTES", "Audience", "Carrier", "Message", "Orders", "Outcome"]

log = logging.getLogger("quotepush.worker")

MAX_UNSENT_BYTES = 262_144

# A write is a system call: 100 of them take less than half a millisecond.
_PER_SLICE = 100

# A message that comes a second time is known by its name for so many later ones of its kind.
_REMEMBERED = 100

# Orders that wait, in bytes; beyond that they are refused.
_MAX_WAITING_BYTES = 1 << 25


@dataclass(slots=True)
class Outcome:
    """What has become of an order.

    Attributes:
        delivered: sessions that took a message, or with which something was done.
        fds: those of the named sessions that are here.
        users: those of the named users who have a session that took the message.
        session: session data, where that was asked for or changed.
        error: why nothing was done; empty: it was.
    """

    delivered: int = 0
    fds: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    session: dict[str, Any] | None = None
    error: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Audience:
    """To whom a message goes: one of the first four is given."""

    fds: Iterable[str] | None = None
    users: Iterable[str] | None = None
    group: str | None = None
    everybody: bool = False
    exclude: frozenset[str] = frozenset()

    @property
    def origin(self) -> str:
        """What the message says about to whom it goes."""
        if self.fds is not None:
            return "conn"
        return "user" if self.users is not None else "group" if self.group is not None else "all"


class Message:
    """A message for any number of sessions.

    Args:
        payload: a JSON value, or bytes.
        is_raw: the payload alone is sent, as one frame.
        sender: the client who speaks.
        sent_ms: when; None: now.
        kept: its name, when it may come again: no session is sent it twice.
    """

    def __init__(
        self,
        payload: Any,
        *,
        is_raw: bool = False,
        sender: Mapping[str, Any] | None = None,
        sent_ms: int | None = None,
        kept: str = "",
    ) -> None:
        self._payload = payload
        self._is_raw = is_raw
        self._sender = sender
        self.sent_ms = sent_ms
        self.kept = kept

    def frame(self, codec: Codec, origin: str, now_ms: int) -> bytes | None:
        """Return its bytes for connections of this codec; None: they cannot be sent it."""
        payload = self._payload
        if self._is_raw:
            is_ready = isinstance(payload, (str, bytes))
            return codec.bare_frame(payload if is_ready else orjson.dumps(payload).decode())
        fields = codec.binary(payload) if isinstance(payload, bytes) else {"data": payload}
        at_ms = now_ms if self.sent_ms is None else self.sent_ms
        return codec.frame(messages.message(at_ms, origin, fields, self._sender))


class Orders:
    """Carries out orders on the sessions of one worker.

    Args:
        links: by fd.
        needs_key: ``bind`` needs the key of the connection.
        delays: how old quotes may be made by another entitlement.

    Attributes:
        delays: the same.
        delivered: messages that sockets took.
        undelivered: messages that they were too slow for, or could not be sent.
    """

    def __init__(
        self,
        links: Mapping[str, SocketLink],
        members: Members,
        desk: Desk,
        *,
        needs_key: bool,
        delays: Collection[int] = (),
    ) -> None:
        self._links = links
        self._members = members
        self._desk = desk
        self._needs_key = needs_key
        self.delays = delays
        self.delivered = 0
        self.undelivered = 0

    async def send(self, message: Message, to: Audience) -> Outcome:
        """Send a message to all of an audience that is here."""
        outcome = Outcome()
        frames: dict[Codec, bytes | None] = {}
        reached: set[str] = set()
        now_ms = self._desk.clock_ms()
        async for link in self._audience(to):
            session = link.session
            codec = session.codec
            if codec not in frames:
                frames[codec] = message.frame(codec, to.origin, now_ms)
            if to.fds is not None:
                outcome.fds.append(session.fd)
            if self._write(link, frames[codec], message.kept):
                outcome.delivered += 1
                if message.kept and session.member is not None and session.member.user is not None:
                    reached.add(session.member.user)
        if message.kept and to.users is not None:
            outcome.users = [user for user in to.users if user in reached]
        return outcome

    def _write(self, link: SocketLink, frame: bytes | None, kept: str) -> bool:
        session = link.session
        if kept and session.had is not None and kept in session.had:
            return True
        if frame is None or link.unsent_bytes > MAX_UNSENT_BYTES:
            self.undelivered += 1
            return False
        link.write(frame)
        self.delivered += 1
        if kept:
            if session.had is None:
                session.had = deque(maxlen=_REMEMBERED)
            session.had.append(kept)
        return True

    async def _audience(self, to: Audience) -> AsyncIterator[SocketLink]:
        """Yield the links of an audience that can be written to, each once."""
        if to.fds is not None:
            fds: Iterable[str] = dict.fromkeys(to.fds)
        elif to.users is not None:
            fds = [session.fd for user in dict.fromkeys(to.users) for session in self._members.of_user(user)]
        elif to.group is not None:
            fds = [session.fd for session in self._members.in_group(to.group)]
        else:
            fds = list(self._links)
        async for link in self._found(fds):
            session = link.session
            # Who has yet to say who he is may not hear what is said to all.
            is_stranger = to.everybody and session.identity is None and self._desk.needs_identity
            if session.fd not in to.exclude and not is_stranger:
                yield link

    async def _found(self, fds: Iterable[str]) -> AsyncIterator[SocketLink]:
        """Yield the open links of these fds; the loop turns after every few."""
        for count, fd in enumerate(fds, 1):
            link = self._links.get(fd)
            if link is not None and not link.is_sealed:
                yield link
            if count % _PER_SLICE == 0:
                await asyncio.sleep(0)

    async def close(self, fds: Iterable[str], code: int, reason: str) -> Outcome:
        """Close these connections."""
        outcome = Outcome()
        async for link in self._found(fds):
            outcome.fds.append(link.session.fd)
            link.close(code, reason)
        outcome.delivered = len(outcome.fds)
        return outcome

    async def kick(self, users: Iterable[str], code: int, reason: str) -> Outcome:
        """Close the connections of these users."""
        return await self.close([s.fd for user in users for s in self._members.of_user(user)], code, reason)

    async def bind(self, fd: str, user: str, key: str) -> Outcome:
        """Let a connection be a user's; a key that is given, or needed, must be the connection's."""
        if self._needs_key and not key:
            return Outcome(error="key_needed", message="this server wants the conn_key of hello with a bind")
        if key and not self._desk.is_key_of(fd, key):
            return Outcome(error="wrong_key", message="this is not the conn_key of this connection")
        return await self._change([fd], lambda session: self._members.bind(session, user))

    async def unbind(self, fd: str) -> Outcome:
        """Let a connection be nobody's."""
        return await self._change([fd], self._members.unbind)

    async def join(self, fds: Iterable[str], group: str) -> Outcome:
        """Put connections into a group."""
        return await self._change(fds, lambda session: self._members.join(session, group))

    async def leave(self, fds: Iterable[str], group: str) -> Outcome:
        """Take connections out of a group."""
        return await self._change(fds, lambda session: self._members.leave(session, group))

    async def dissolve(self, group: str) -> Outcome:
        """Take everybody out of a group."""
        outcome = await self.leave([session.fd for session in self._members.in_group(group)], group)
        outcome.fds = []
        return outcome

    async def session(self, fd: str, data: dict[str, Any] | None = None, *, is_replaced: bool = False) -> Outcome:
        """Return the session data of a connection, after it has been merged with ``data`` or replaced by it."""

        def change(session: Session) -> None:
            if data is not None:
                (self._members.set_data if is_replaced else self._members.update_data)(session, data)

        outcome = await self._change([fd], change)
        if outcome.fds and not outcome.error:
            member = self._links[fd].session.member
            outcome.session = {} if member is None else dict(member.data)
        return outcome

    async def entitle(
        self, entitlement: Entitlement, fds: Iterable[str] | None = None, users: Iterable[str] = ()
    ) -> Outcome:
        """Give connections, or all of these users, another entitlement."""
        if fds is None:
            fds = [session.fd for user in users for session in self._members.of_user(user)]
        return await self._change(fds, lambda session: session.entitle(entitlement))

    async def _change(self, fds: Iterable[str], change: Callable[[Session], Any]) -> Outcome:
        """Do something with the sessions of these connections; a False says that there was nothing to do."""
        outcome = Outcome()
        async for link in self._found(dict.fromkeys(fds)):
            try:
                is_done = change(link.session)
            except PeerError as e:
                outcome.error, outcome.message = e.error, e.message
                continue
            outcome.fds.append(link.session.fd)
            outcome.delivered += is_done is not False
        return outcome


class Carrier:
    """Carries out orders one behind the other.

    Args:
        tell: gets the question and the outcome of each.
    """

    def __init__(self, tell: Callable[[int, Outcome], None]) -> None:
        self._tell = tell
        self._waiting: deque[tuple[int, int, Callable[[], Coroutine[Any, Any, Outcome]]]] = deque()
        self._waiting_bytes = 0
        self._has_waiting = asyncio.Event()

    def take(self, question: int, size: int, order: Callable[[], Coroutine[Any, Any, Outcome]]) -> None:
        """Carry out ``order`` behind those that wait; refuse it when too many do.

        Args:
            size: of what it holds in memory, in bytes.
        """
        if self._waiting and self._waiting_bytes + size > _MAX_WAITING_BYTES:
            self._tell(question, Outcome(error="overloaded", message="too many orders wait in this worker"))
            return
        self._waiting.append((question, size, order))
        self._waiting_bytes += size
        self._has_waiting.set()

    async def run(self) -> None:
        """Carry out orders until cancelled."""
        while True:
            await self._has_waiting.wait()
            while self._waiting:
                question, size, order = self._waiting.popleft()
                self._waiting_bytes -= size
                try:
                    outcome = await order()
                except Exception:
                    # A bug in one order is that order's end.
                    log.exception("an order could not be carried out")
                    outcome = Outcome(error="internal", message="a fault of the server; its log says more")
                self._tell(question, outcome)
            self._has_waiting.clear()
