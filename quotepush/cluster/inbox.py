"""Commands to this node: heard on its channels, found in its inbox, carried out, answered.

Laws:

1. Nothing here waits for a client. A caller who waits gets one reply, or none when Redis is gone.
2. A command that is none is counted and ignored; what is answered goes to channels of replies and to no others.
3. A kept command stays in the inbox until it has been carried out; at most ``concurrency`` are in work. A kept message
   for a user whom nobody here could hand it to goes to where messages wait for him.
"""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import NoPermissionError, RedisError, ResponseError

from quotepush.cluster.commands import (
    BadCommand,
    ClusterKeys,
    Command,
    Kept,
    Reply,
    To,
    encode,
    new_id,
    parse_command,
)
from quotepush.cluster.hearing import hear
from quotepush.cluster.kept import InHand, Taker, keep
from quotepush.cluster.mail import Mail, move_mail, put_back
from quotepush.store.clients import Links

__all__ = ["Give", "Inbox"]

log = logging.getLogger("quotepush.main")

# Carries out a command on this node's sessions; the callback gets the reply, once, in bounded time.
Give = Callable[[Command, bytes, Callable[[Reply], None]], None]

_LOOK_S = 2.0  # into the inbox, in case the poke was lost
_MAX_WAITING = 10_000  # replies
_AGAIN_S = 1.0
_FORBIDDEN_AGAIN_S = 30.0
_PER_SLICE = 100
_MAX_UNPLACED = 1_000
_TROUBLE = (RedisError, OSError, TimeoutError)


class Inbox:
    """Hears what the cluster wants of this node.

    Args:
        redis: a client of the registry that answers with bytes.
        links: make the connection on which commands are heard.
        give: see :data:`Give`.
        concurrency: kept commands in work at a time.
        kept_max: messages that wait for one user.
        kept_ttl_s: how long a message waits that says nothing itself.
        on_up: called when commands are heard, or may not be.
        may_work: whether nobody takes this node for dead.

    Attributes:
        heard: commands that were carried out.
        refused: messages that were no command.
        kept: messages that were put where messages for users who are away wait.
        collected: messages that were taken from there and delivered.
        is_up: commands are heard.
        is_forbidden: they are not, for this user of Redis may not hear them.
    """

    def __init__(
        self,
        redis: Any,
        links: Links,
        keys: ClusterKeys,
        node: str,
        give: Give,
        *,
        concurrency: int,
        kept_max: int,
        kept_ttl_s: int,
        timeout_s: float,
        on_up: Callable[[], None] = lambda: None,
        may_work: Callable[[], bool] = lambda: True,
    ) -> None:
        self._redis = redis
        self._links = links
        self._keys = keys
        self._node = node
        self._give = give
        self._concurrency = concurrency
        self._kept_max = kept_max
        self._kept_ttl_s = kept_ttl_s
        self._timeout_s = timeout_s
        self._on_up = on_up
        self._may_work = may_work
        self._replies: deque[tuple[str, bytes]] = deque(maxlen=_MAX_WAITING)
        self._has_replies = asyncio.Event()
        self._has_mail = asyncio.Event()
        self._mail = Mail(redis, keys, node, ttl_s=kept_ttl_s, timeout_s=timeout_s)
        self._after = b"-"  # where the inbox has been read to
        # Entries, and those of their users for whom Redis would not let them wait.
        self._unplaced: dict[bytes, tuple[Command, list[str]]] = {}
        # Users for whom messages may wait, and the commands that say so, as far as somebody waits for their outcome.
        self._came: dict[str, list[Command]] = {}
        self._has_come = asyncio.Event()
        self._is_begun = asyncio.Event()  # what a former life has left waits for its users
        self._taker = Taker(redis, keys, node, most=kept_max, timeout_s=timeout_s)
        self._is_doubtful = False  # something may have been taken, or put back, that Redis has not told us of
        self._is_troubled = False  # and the log says so
        self.heard = 0
        self.refused = 0
        self.kept = 0
        self.collected = 0
        self.is_up = False
        self.is_forbidden = False

    async def run(self) -> None:
        """Hear and carry out until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(), name="commands")
            group.create_task(self._answer(), name="replies")
            group.create_task(self._work(), name="inbox")
            group.create_task(self._collect(), name="kept")

    def users_came(self, users: Sequence[str]) -> None:
        """These users have got a connection here, and Redis knows of it."""
        for user in users:
            self._came.setdefault(user, [])
        self._has_come.set()

    async def move(self) -> None:
        """Let what is in the inbox, or was taken and not delivered, wait for its users; not while :meth:`run` is at it.

        Raises:
            RedisError, OSError, TimeoutError: some of it stays.
        """
        await self._taker.settle()
        await move_mail(
            self._redis, self._keys, self._node,
            kept_max=self._kept_max, kept_ttl_s=self._kept_ttl_s, timeout_s=self._timeout_s,
        )  # fmt: skip

    # ------------------------------------------------------------------ heard at once

    async def _listen(self) -> None:
        wait_s = 0.0
        while True:
            try:
                await self._hear()
            except NoPermissionError as e:
                if not self.is_forbidden:
                    log.warning("commands are not heard: this user of Redis may not: %s", e)
                self.is_up, self.is_forbidden = False, True
                self._on_up()
                wait_s = _FORBIDDEN_AGAIN_S
            except _TROUBLE as e:
                if self.is_up or not wait_s:
                    log.warning("commands are not heard: %s; trying again", str(e) or type(e).__name__)
                wait_s = random.uniform(0.02, 0.1) if self.is_up else random.uniform(0.05, min(2.0, wait_s * 2 + 0.1))
                self.is_up = False
            await asyncio.sleep(wait_s)

    async def _hear(self) -> None:
        """Hear commands on one connection until it is lost."""
        channels = self._keys.to_node(self._node), self._keys.to_all
        async with contextlib.aclosing(hear(self._links, *channels, timeout_s=self._timeout_s)) as said:
            async for text in said:
                if text is not None:
                    self._take(text)
                    continue
                self.is_up, self.is_forbidden = True, False
                self._has_mail.set()  # a poke may have been lost
                self._on_up()

    def _take(self, text: bytes) -> None:
        try:
            command = parse_command(text)
        except BadCommand as e:
            self._refuse(e)
            return
        if command.op == "poke":
            self._has_mail.set()
        elif command.op == "collect":
            self._came.setdefault(command.user, []).append(command)
            self._has_come.set()
        else:
            self.heard += 1
            self._give(command, text, lambda reply: self._say(command.reply, reply))

    def _refuse(self, fault: BadCommand) -> None:
        self.refused += 1
        if self.refused == 1:
            log.warning("ignored what is no command (%s); further ones are counted only", fault)
        self._say(fault.reply, Reply(fault.id, self._node, error=fault.error, message=str(fault)))

    # ------------------------------------------------------------------ answers

    def _say(self, channel: str, reply: Reply) -> None:
        if channel.startswith(f"{self._keys.prefix}reply:"):
            self._replies.append((channel, encode(reply)))
            self._has_replies.set()

    async def _answer(self) -> None:
        while True:
            await self._has_replies.wait()
            self._has_replies.clear()
            try:
                while self._replies:
                    pipeline = self._redis.pipeline(transaction=False)
                    for _ in range(min(_PER_SLICE, len(self._replies))):
                        pipeline.publish(*self._replies.popleft())
                    async with asyncio.timeout(self._timeout_s):
                        await pipeline.execute()
            except _TROUBLE:
                self._replies.clear()  # whoever waits for them does not wait for ever

    # ------------------------------------------------------------------ kept commands

    async def _work(self) -> None:
        is_well = True
        while True:
            self._has_mail.clear()
            try:
                if not self._is_begun.is_set():
                    await self.move()
                    self._is_begun.set()
                await self._carry_out_mail()
                is_well = True
            except _TROUBLE as e:
                if is_well:
                    log.warning("inbox: Redis does not answer: %s; trying again", str(e) or type(e).__name__)
                is_well = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._has_mail.wait()

    async def _carry_out_mail(self) -> None:
        await self._mail.remove([])
        # Whoever is taken for dead leaves its mail alone: another node has put it elsewhere, or is about to.
        if self._may_work():
            await self._place_again()
        while self._may_work() and len(self._unplaced) < _MAX_UNPLACED:
            page = await self._mail.page(self._after, self._concurrency)
            if not page:
                return
            self._after = b"(" + page[-1][0]
            async with asyncio.TaskGroup() as group:
                for entry, text in page:
                    group.create_task(self._carry_out(entry, text))
            await self._mail.remove([entry for entry, _ in page if entry not in self._unplaced])

    async def _carry_out(self, entry: bytes, text: bytes) -> None:
        try:
            command = self._mail.command(entry, text)
        except BadCommand as e:
            self._refuse(e)
            return
        if command is None or command.op in ("poke", "collect"):
            return
        self.heard += 1
        reply = await self._given(command)
        self._say(command.reply, reply)
        users = command.to.users if command.to is not None else None
        missed = [user for user in users or () if user not in reply.users]
        if missed:
            self.kept += len(missed)
            self._unplaced[entry] = command, missed
            try:
                await self._place(entry)
            except _TROUBLE as e:
                why = str(e) or type(e).__name__
                log.warning("inbox: a message cannot wait for %d users yet: %s; trying again", len(missed), why)

    async def _place(self, entry: bytes) -> None:
        """Let a message wait for those of its users who were not here.

        Raises:
            RedisError, OSError, TimeoutError: for some of them it cannot yet.
        """
        command, users = self._unplaced[entry]
        nodes, refused = await put_back(self._redis, self._keys, command, users, self._kept_max, self._timeout_s)
        if self._node in nodes:  # should nobody hear what is said on our channel just now
            self.users_came(users)
        if refused:
            self._unplaced[entry] = command, list(refused)
            raise ResponseError(next(iter(refused.values())))
        del self._unplaced[entry]

    async def _place_again(self) -> None:
        for entry, (command, _) in list(self._unplaced.items()):
            if await self._mail.is_wanted(entry, command):
                with contextlib.suppress(ResponseError):  # which may be about this one only
                    await self._place(entry)
            else:
                del self._unplaced[entry]
            if entry not in self._unplaced:
                await self._mail.remove([entry])

    async def _given(self, command: Command) -> Reply:
        answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def then(reply: Reply) -> None:
            if not answered.done():
                answered.set_result(reply)

        self._give(command, encode(command), then)
        return await answered  # in bounded time: see Give

    # ------------------------------------------------------------------ messages that wait

    async def _collect(self) -> None:
        await self._is_begun.wait()
        while True:
            await self._has_come.wait()
            self._has_come.clear()
            while self._came or self._is_doubtful:
                if not self._may_work():  # their connections may have been removed; who is there comes again
                    await asyncio.sleep(_AGAIN_S)
                    continue
                users = list(self._came)[:_PER_SLICE]
                try:
                    if self._is_doubtful:
                        await self._restore()
                    taken = await self._taker.take(users)
                except _TROUBLE as e:
                    self._doubt(str(e) or type(e).__name__)
                    await asyncio.sleep(_AGAIN_S)  # what waits does so in Redis, and they wait here
                    continue
                callers = {user: self._came.pop(user) for user in users}
                while users:
                    some, users = users[: self._concurrency], users[self._concurrency :]
                    async with asyncio.TaskGroup() as group:
                        for user in some:
                            group.create_task(self._bring(user, taken.get(user, []), callers[user]))
                try:
                    await self._taker.settle()
                except _TROUBLE as e:
                    self._doubt(str(e) or type(e).__name__)
                self._is_troubled = self._is_doubtful
                if self._is_doubtful:
                    await asyncio.sleep(_AGAIN_S)

    async def _restore(self) -> None:
        nodes = await self._taker.restore()
        self._is_doubtful = False
        if self._taker.refused:
            self._doubt(self._taker.refused)
        self.users_came([user for user, where in nodes.items() if self._node in where])

    async def _bring(self, user: str, taken: Sequence[InHand], callers: Sequence[Command]) -> None:
        """Hand a user what was taken for him, and tell those who wait for that to how many connections it went."""
        # All at once: they are carried out in this order, behind one another.
        replies = await asyncio.gather(*(self._given(_command_of(user, each.message)) for each in taken))
        left: list[InHand] = []
        delivered = 0
        for each, reply in zip(taken, replies, strict=True):
            delivered += reply.delivered
            if user in reply.users:
                self._taker.drop([each.entry])
                self.collected += 1
            else:
                left.append(each)
        await self._put_first(user, left)
        for command in callers:
            self._say(command.reply, Reply(command.id, self._node, delivered))

    async def _put_first(self, user: str, left: Sequence[InHand]) -> None:
        """Put messages that nobody took back to where they were."""
        messages = [each.message for each in left]
        try:
            async with asyncio.timeout(self._timeout_s):
                await keep(self._redis, self._keys, user, messages, self._kept_max, are_older=True)
            self._taker.drop(each.entry for each in left)
        except _TROUBLE as e:
            self._doubt(str(e) or type(e).__name__)

    def _doubt(self, why: str) -> None:
        if not self._is_troubled:
            log.warning("kept: messages that wait for users cannot be brought: %s; trying again", why)
        self._is_doubtful = self._is_troubled = True


def _command_of(user: str, message: Kept) -> Command:
    return Command(
        op="send", id=message.id or new_id(), to=To(users=[user]), data=message.data, encoding=message.encoding,
        raw=message.raw, sender=message.sender, keep=True, sent=message.at, until=message.until,
    )  # fmt: skip
