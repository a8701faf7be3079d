"""Commands to the nodes that hold the recipients, and their answers.

Invariant: a command goes to no node that holds none of its recipients, and a caller has its answers, or knows which
are missing, within the bound. All calls at the same time share one channel of replies; when its link is lost those
who wait are told at once, and the next call makes it anew.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace
from redis.exceptions import RedisError

from quotepush.cluster.census import Census
from quotepush.cluster.commands import (
    MAX_COMMAND_BYTES,
    OPS,
    ClusterKeys,
    Command,
    Kept,
    Reply,
    To,
    decode_reply,
    encode,
    new_id,
    node_of,
)
from quotepush.cluster.hearing import hear
from quotepush.cluster.line import Line, Words
from quotepush.cluster.sets import text
from quotepush.errors import BackendUnavailable, CallRefused
from quotepush.store.clients import Links

__all__ = ["Answers", "Routing", "Sent"]

_GROUP_PAGE = 1_000
# What a node says that cannot do it now.
_PASSING = ("overloaded", "internal")
# Of a command before it has its id and the channel of replies.
_LARGEST = MAX_COMMAND_BYTES - 1_024


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a message.

    Attributes:
        delivered: to how many connections it was written.
        nodes: the same for each node that answered.
        missing: nodes that hold a recipient and did not answer in time; it may have been delivered there all the same.
        kept: how many messages wait, for a user who is away or for a node that is silent; only with ``kept``.
    """

    delivered: int
    nodes: dict[str, int]
    missing: tuple[str, ...] = ()
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """What the nodes said to a command.

    Attributes:
        replies: by node.
        missing: nodes that did not answer in time; they may have carried it out.
    """

    replies: dict[str, Reply]
    missing: tuple[str, ...] = ()

    @property
    def delivered(self) -> int:
        """How many connections were served."""
        return sum(reply.delivered for reply in self.replies.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many connections each node served."""
        return {node: reply.delivered for node, reply in sorted(self.replies.items())}

    @property
    def conns(self) -> tuple[str, ...]:
        """Those of the named connections that were there."""
        return tuple(sorted(conn for reply in self.replies.values() for conn in reply.fds))


# A channel, the command that goes there, and the nodes that are to answer.
_Call = tuple[str, Command, tuple[str, ...]]


@dataclass(slots=True)
class _Question:
    waiting: set[str]
    done: "asyncio.Future[None]"
    replies: dict[str, Reply] = field(default_factory=dict)

    def take(self, reply: Reply) -> None:
        self.replies[reply.node] = reply
        self.waiting.discard(reply.node)
        if not self.waiting and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # nobody may wait for it


class Routing:
    """Finds recipients and speaks with their nodes.

    Every method raises ``BackendUnavailable`` when Redis does not answer in time.

    Args:
        line: for everything but hearing.
        links: for hearing.
        timeout_s: the longest wait for the answers of nodes.
        inbox_max: about how many commands wait for one node at most; the oldest go first.
        kept_max: how many messages wait for one user at most; the oldest go first.
        kept_ttl_s: how long they wait.
        counts_hearers: what PUBLISH answers is how many have heard it; a Redis Cluster counts those of one node.
    """

    def __init__(
        self,
        line: Line,
        links: Links,
        prefix: str,
        *,
        timeout_s: float,
        inbox_max: int = 10_000,
        kept_max: int = 100,
        kept_ttl_s: int = 86_400,
        counts_hearers: bool = True,
    ) -> None:
        self._line = line
        self._links = links
        self._counts_hearers = counts_hearers
        self._keys = ClusterKeys(prefix)
        self._census = Census(line, prefix)
        self._timeout_s = timeout_s
        self._inbox_max = inbox_max
        self._kept_max = kept_max
        self._kept_ttl_s = kept_ttl_s
        self._channel = self._keys.reply()
        self._questions: dict[str, _Question] = {}
        self._link: asyncio.Task[None] | None = None
        self._heard: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_probing = False

    async def aclose(self) -> None:
        """Hear no more; who still waits gets an exception."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # Commands

    async def send(self, command: Command, *, kept: bool = False, name: str = "") -> Sent:
        """Send a message (``op`` is ``send``) to those of its recipients who are there.

        Args:
            kept: where nobody takes it, it waits.
            name: what it is called, where it may be sent again: no connection takes two of one name. Empty: a new one.

        Raises:
            CallRefused: it is no command, or a node refuses it.
        """
        _check(command)
        if name:
            command = replace(command, keep=True)
        name = name or new_id()
        if not kept:
            calls, _ = await self._calls(command)
            answers = await self._ask(calls, name)
            return Sent(answers.delivered, answers.counts, answers.missing)
        ((seconds, micros),) = await self._line.ask(("TIME",))
        sent_ms = seconds * 1000 + micros // 1000
        command = replace(command, keep=True, sent=sent_ms, until=sent_ms + self._kept_ttl_s * 1000)
        calls, absent = await self._calls(command)
        answers = await self._ask(calls, name, is_kept=True)
        collected = await self._keep(absent, name, command)
        # A silent node has it in its inbox, and a user whom no node has found has it in his list.
        users = command.to.users if command.to is not None else None
        took = {user for reply in answers.replies.values() for user in reply.users}
        waiting = len(answers.missing) if users is None else len(set(users) - took)
        return Sent(answers.delivered + collected.delivered, answers.counts, (), waiting)

    async def order(self, command: Command) -> Answers:
        """Have anything else done with the connections that a command names.

        Raises:
            CallRefused: it is no command, or a node refuses it.
        """
        _check(command)
        calls, _ = await self._calls(command)
        return await self._ask(calls, new_id())

    # Where they are

    async def _calls(self, command: Command) -> tuple[list[_Call], list[str]]:
        """Return what to say to which nodes, and the users who are nowhere."""
        to = command.to or To(conns=command.fds(), users=command.users, group=command.group or None)
        if command.op == "collect":
            to = To(users=[command.user])
        if to.all:
            alive = tuple(sorted(await self._census.nodes()))
            return ([(self._keys.to_all, command, alive)] if alive else []), []
        places: defaultdict[str, list[str]] = defaultdict(list)
        absent: list[str] = []
        if to.conns is not None:
            for conn in dict.fromkeys(to.conns):
                places[node_of(conn)].append(conn)
        elif to.users is not None:
            users = list(dict.fromkeys(to.users))
            found = await self._line.ask(*(("SMEMBERS", self._keys.user(user)) for user in users))
            for user, conns in zip(users, found, strict=True):
                holding = {node for node in map(node_of, map(text, conns)) if node}
                for node in holding:
                    places[node].append(user)
                if not holding:
                    absent.append(user)
        elif to.group is not None:
            places.update((node, []) for node in await self._nodes_of_group(to.group))
        calls: list[_Call] = [
            (self._keys.to_node(node), _part(command, names), (node,)) for node, names in sorted(places.items())
        ]
        return calls, absent

    async def _nodes_of_group(self, group: str) -> set[str]:
        """The nodes that hold a member; no more of the group is read than it takes to know that all do."""
        alive = await self._census.nodes()
        key, cursor = self._keys.group(group), 0
        found: set[str] = set()
        if len(alive) == 1:
            (size,) = await self._line.ask(("SCARD", key))
            return set(alive) if size else found
        while True:
            ((cursor, page),) = await self._line.ask(("SSCAN", key, cursor, "COUNT", _GROUP_PAGE))
            found |= {node for node in map(node_of, map(text, page)) if node in alive}
            if not int(cursor) or len(found) == len(alive):
                return found

    # What waits

    async def _keep(self, users: Sequence[str], name: str, message: Command) -> Answers:
        """Let a message wait for users who are nowhere; whoever has come meanwhile is brought it at once."""
        if not users:
            return Answers({})
        entry = encode(
            Kept(
                at=message.sent, until=message.until, id=name,
                data=message.data, encoding=message.encoding, raw=message.raw, sender=message.sender,
            )
        )  # fmt: skip
        commands: list[Words] = []
        for user in users:
            key = self._keys.kept(user)
            commands += [("RPUSH", key, entry), ("LTRIM", key, -self._kept_max, -1), ("EXPIRE", key, self._kept_ttl_s)]
        await self._line.ask(*commands)
        come = [call for user in users for call in (await self._calls(Command(op="collect", user=user)))[0]]
        return await self._ask(come, new_id())

    # Questions and answers

    async def _ask(self, calls: Sequence[_Call], name: str, *, is_kept: bool = False) -> Answers:
        """Say it to the nodes; return what they answer until the bound.

        A kept command is put into the node's inbox first, where it waits for a node that is not listening.
        """
        if not calls:
            return Answers({})
        await self._listen()
        question = self._questions[name] = _Question(
            {node for _, _, nodes in calls for node in nodes}, asyncio.get_running_loop().create_future()
        )
        try:
            deaf = await self._say(name, calls, is_kept)
            for node in deaf:
                question.waiting.discard(node)
            if question.waiting:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._timeout_s):
                        await question.done
            if question.waiting:
                self._doubt()
        finally:
            del self._questions[name]
        missing = (question.waiting | deaf) - question.replies.keys()
        for node, reply in question.replies.items():
            if reply.error in _PASSING:
                raise BackendUnavailable(f"node {node}: {reply.message}")
            if reply.error:
                raise CallRefused(reply.error, f"{reply.message or 'refused'} (node {node})")
        return Answers(question.replies, tuple(sorted(missing)))

    async def _say(self, name: str, calls: Sequence[_Call], is_kept: bool) -> set[str]:
        """Publish the commands; return the nodes that surely have not heard theirs."""
        kept: list[Words] = []
        said: list[Words] = []
        for channel, command, nodes in calls:
            words = encode(replace(command, id=name, reply=self._channel))
            if is_kept:
                bound = ("MAXLEN", "~", self._inbox_max)
                kept += [("XADD", self._keys.inbox(node), *bound, "*", "c", words) for node in nodes]
                words = encode(Command(op="poke"))
            said.append(("PUBLISH", channel, words))
        # In a Redis Cluster inboxes and channels are with several servers: no poke may come before its mail.
        await self._line.ask(*kept)
        heard = await self._line.ask(*said)
        if not self._counts_hearers:
            return set()
        return {node for count, (_, _, nodes) in zip(heard, calls, strict=True) for node in nodes if not count}

    def _take(self, said: bytes) -> None:
        reply = decode_reply(said)  # None: whoever says that on our channel is no node
        question = None if reply is None else self._questions.get(reply.id)
        if reply is not None and question is not None:
            question.take(reply)

    async def _listen(self) -> None:
        """Return when our channel is heard."""
        if self._link is None or self._link.done():
            self._heard = asyncio.get_running_loop().create_future()
            self._link = self._start(self._hear(self._heard))
        assert self._heard is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(self._heard)
        except (RedisError, OSError) as e:
            self._drop_link()
            raise self._line.unavailable(e) from None

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.cancel()
            self._link = None

    def _start(self, doing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(doing, name="quotepush routing")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _hear(self, heard: "asyncio.Future[None]") -> None:
        reason: Exception = ConnectionError("closed")
        try:
            async with contextlib.aclosing(hear(self._links, self._channel)) as said:
                async for text in said:
                    if text is None:
                        heard.set_result(None)
                    else:
                        self._take(text)
        except (RedisError, OSError) as e:
            reason = e
        finally:
            if not heard.done():
                heard.set_exception(reason)
                heard.exception()  # nobody may wait for it
            lost = BackendUnavailable(f"{self._line.unavailable(reason).reason}; it may have been carried out")
            for question in self._questions.values():
                question.fail(lost)

    def _doubt(self) -> None:
        """A node has not answered: is it that, or does our link only look alive?"""
        if not self._is_probing:
            self._is_probing = True
            self._start(self._try_link())

    async def _try_link(self) -> None:
        name = new_id()
        question = self._questions[name] = _Question({""}, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._line.ask(("PUBLISH", self._channel, encode(Reply(name, ""))))
                await question.done
        except (BackendUnavailable, TimeoutError):
            self._drop_link()
        finally:
            self._is_probing = False
            del self._questions[name]


def _part(command: Command, names: list[str]) -> Command:
    """The command for one node, where only some of those whom it names are."""
    to = command.to
    if to is not None and to.conns is not None:
        return replace(command, to=To(conns=names))
    if to is not None and to.users is not None:
        return replace(command, to=To(users=names))
    if to is None and command.conns is not None:
        return replace(command, conns=names)
    if to is None and command.users is not None:
        return replace(command, users=names)
    return command


def _check(command: Command) -> None:
    """Refuse here what every node would refuse.

    Raises:
        CallRefused: with the word and the reason.
    """
    try:
        size = len(encode(command))
    except (TypeError, ValueError, OverflowError, RecursionError) as e:
        raise CallRefused("bad_request", f"not a JSON value: {e}") from None
    if size > _LARGEST:
        raise CallRefused("too_large", f"with its recipients it has {size} bytes of JSON, and may have {_LARGEST}")
    if why := OPS[command.op](command):
        raise CallRefused("bad_request", why)
