"""Commands are heard, kept ones stay until they are carried out, and messages for users who are away wait for them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from quotepush.cluster import hearing
from quotepush.cluster import inbox as inbox_module
from quotepush.cluster.commands import ClusterKeys, Command, Kept, Reply, Taken, To, decode_kept, encode
from quotepush.cluster.inbox import Inbox
from quotepush.cluster.kept import Taker, keep
from quotepush.store.clients import Store
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

KEYS = ClusterKeys("qp:")
FD = "n1.0.1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_LOOK_S", 0.05)
    monkeypatch.setattr(inbox_module, "_AGAIN_S", 0.05)
    # What is published while a link is made anew is lost: it goes only where that is wanted.
    monkeypatch.setattr(hearing, "_PROBE_S", 60.0)


@pytest.fixture
def doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is silent is soon taken for lost."""
    monkeypatch.setattr(hearing, "_PROBE_S", 0.2)


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client(decode_responses=False)
    yield client
    await client.aclose()


class Node:
    """A node's inbox, and whoever carries out what it gives."""

    def __init__(self) -> None:
        self.inbox: Inbox
        self.given: list[Command] = []
        self.here: set[str] = set()  # users who take messages
        self.in_work = self.most_in_work = 0
        self.delay_s = 0.0
        self.holds = False  # answers until :meth:`let_go`
        self._held: list[tuple[Command, Any]] = []

    def give(self, command: Command, text: bytes, then: Any) -> None:
        self.given.append(command)
        self.in_work += 1
        self.most_in_work = max(self.most_in_work, self.in_work)
        if self.holds:
            self._held.append((command, then))
        else:
            asyncio.get_running_loop().call_later(self.delay_s, self._answer, command, then)

    def let_go(self) -> None:
        self.holds = False
        for command, then in self._held:
            self._answer(command, then)

    def _answer(self, command: Command, then: Any) -> None:
        self.in_work -= 1
        users = [] if command.to is None else [user for user in command.to.users or () if user in self.here]
        then(Reply(command.id, "n1", len(users), users=users))

    @property
    def told(self) -> list[Any]:
        return [command.data for command in self.given]


@asynccontextmanager
async def working(server: RedisServer, node: Node | None = None, **options: Any) -> AsyncIterator[Node]:
    node = node or Node()
    # Without a timeout of its own, as main's: under one redis-py can swallow a cancellation (bpo-37658).
    client = server.client(decode_responses=False, socket_timeout=None)
    settings: dict[str, Any] = {"concurrency": 10, "kept_max": 5, "kept_ttl_s": 60, "timeout_s": 20.0, **options}
    node.inbox = Inbox(client, Store(server.url).links(), KEYS, "n1", node.give, **settings)
    task = asyncio.create_task(node.inbox.run())
    try:
        # What is there before it has begun is a former life's.
        await wait_until(lambda: node.inbox.is_up and node.inbox._is_begun.is_set())
        yield node
        assert not task.done(), "it ended by itself"
    finally:
        task.cancel()
        await asyncio.wait([task])
        await client.aclose()


def send(*users: str, data: Any = None, **options: Any) -> Command:
    return Command(op="send", id="m1", to=To(users=list(users)), data=data, **options)


def kept(data: Any, *, until_s: float = 60) -> Kept:
    now_ms = time.time_ns() // 1_000_000
    return Kept(now_ms, now_ms + round(until_s * 1000), data)


async def post(redis: Redis, command: Command) -> None:
    await redis.xadd(KEYS.inbox("n1"), {"c": encode(command)})
    await redis.publish(KEYS.to_node("n1"), encode(Command(op="poke")))


async def waiting(redis: Redis, user: str) -> list[Any]:
    found = [decode_kept(text) for text in await redis.lrange(KEYS.kept(user), 0, -1)]
    return [message.data for message in found if message is not None]


# heard


async def test_a_command_is_given_and_its_caller_answered(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server) as node, redis.pubsub() as replies:
        await replies.subscribe("qp:reply:1", "other")
        for reply in ("qp:reply:1", "other", ""):
            for channel in (KEYS.to_node("n1"), KEYS.to_all):
                await redis.publish(channel, encode(send("a", reply=reply)))
        await wait_until(lambda: len(node.given) == 6)
        messages: list[Any] = []

        async def answered() -> bool:
            message = await replies.get_message(ignore_subscribe_messages=True, timeout=0.1)
            if message is not None:
                messages.append((message["channel"], message["data"]))
            return len(messages) == 2

        await wait_until(answered)
        assert messages == [(b"qp:reply:1", encode(Reply("m1", "n1")))] * 2, "nothing is said on other channels"


async def test_what_is_no_command_is_counted_and_logged_once(
    redis_server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(redis_server) as node:
        for text in (b"", b"\xff\xfe", b"{}", b'{"op":"fly"}', b"[" * 5000):
            await redis.publish(KEYS.to_node("n1"), text)
        await redis.publish(KEYS.to_node("n1"), encode(send("a")))
        await wait_until(lambda: node.given)
        assert node.inbox.refused == 5
        assert len([record for record in caplog.records if "no command" in record.message]) == 1


@pytest.mark.usefixtures("doubtful")
async def test_the_link_is_made_anew_whatever_happens_to_redis(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server, timeout_s=1.0) as node:
        redis_server.restart()

        async def is_heard() -> bool:
            await redis.publish(KEYS.to_node("n1"), encode(send("a")))
            return bool(node.given)

        await wait_until(is_heard, 15)
        redis_server.pause()
        await wait_until(lambda: not node.inbox.is_up, 15, "a link that does not answer is noticed")
        redis_server.resume()
        await wait_until(lambda: node.inbox.is_up, 15)


async def test_a_user_of_redis_who_may_not_hear_commands_is_told_apart(redis_server: RedisServer, redis: Redis) -> None:
    await redis.execute_command("ACL", "SETUSER", "deaf", "on", ">secret", "~*", "+@all", "resetchannels")
    node = Node()
    up: list[bool] = []
    links = Store(redis_server.url.replace("//", "//deaf:secret@")).links()
    node.inbox = Inbox(
        redis, links, KEYS, "n1", node.give, concurrency=1, kept_max=1, kept_ttl_s=1, timeout_s=1.0,
        on_up=lambda: up.append(True),
    )  # fmt: skip
    task = asyncio.create_task(node.inbox.run())
    await wait_until(lambda: node.inbox.is_forbidden)
    assert up == [True] and not node.inbox.is_up
    task.cancel()
    await asyncio.wait([task])


# kept commands


async def test_a_kept_command_is_removed_when_it_is_done(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server) as node:
        node.here = {"a"}
        for number in range(25):
            await post(redis, send("a", data=number))
        await wait_until(lambda: len(node.given) == 25)
        await wait_until(lambda: is_empty(redis))
        assert node.told == list(range(25)), "in order, each once"
        assert all(command.keep for command in node.given)
        assert not await redis.exists(KEYS.kept("a"))


async def is_empty(redis: Redis) -> bool:
    return not await redis.xlen(KEYS.inbox("n1"))


async def test_a_bounded_number_is_in_work(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server, concurrency=3) as node:
        node.delay_s = 0.02
        node.here = {"a"}
        for number in range(20):
            await post(redis, send("a", data=number))
        await wait_until(lambda: is_empty(redis))
        assert len(node.given) == 20
        assert node.most_in_work == 3


async def test_a_message_that_nobody_took_waits_for_its_user(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server) as node:
        node.here = {"a"}
        await post(redis, send("a", "b", data=1))
        await post(redis, Command(op="send", to=To(group="g"), data=2))
        await wait_until(lambda: is_empty(redis))
        await wait_until(lambda: redis.exists(KEYS.kept("b")))
        assert await waiting(redis, "b") == [1]
        assert not await redis.exists(KEYS.kept("a"))
        assert 0 < await redis.pttl(KEYS.kept("b")) <= 60_000
        node.here = {"b"}
        node.inbox.users_came(["b", "c"])
        await wait_until(lambda: node.told.count(1) == 2)
        await wait_until(lambda: node.inbox.collected == 1)
        assert not await redis.exists(KEYS.kept("b"))


async def test_what_cannot_be_put_anywhere_stays_in_the_inbox_until_it_can(
    redis_server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(redis_server) as node:
        node.holds = True
        node.here = {"a"}
        await post(redis, send("a", "b", data=1))
        await wait_until(lambda: node.given)
        await redis.config_set("min-replicas-to-write", 1)  # Redis takes nothing
        node.let_go()
        await wait_until(lambda: "NOREPLICAS" in caplog.text)
        await redis.config_set("min-replicas-to-write", 0)
        await wait_until(lambda: is_empty(redis))
        assert await waiting(redis, "b") == [1]
        assert node.told == [1], "nobody here is given it again"


async def test_a_message_for_whom_redis_has_no_place_holds_no_other_up(
    redis_server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.set(KEYS.kept("b"), "no list")
    async with working(redis_server) as node:
        node.here = {"a"}
        await post(redis, send("b", data=1))
        await post(redis, send("c", data=2))
        await post(redis, send("a", data=3))
        await wait_until(lambda: node.told == [1, 2, 3])
        await wait_until(lambda: redis.exists(KEYS.kept("c")))
        await wait_until(lambda: holds(redis, 1))
        await redis.delete(KEYS.kept("b"))
        await wait_until(lambda: is_empty(redis))
        assert (await waiting(redis, "b"), await waiting(redis, "c")) == ([1], [2])
    assert len([record for record in caplog.records if "WRONGTYPE" in record.message]) == 1


async def test_what_has_left_the_inbox_meanwhile_is_not_put_away_again(redis_server: RedisServer, redis: Redis) -> None:
    """Another node may have moved it, while it took this one for dead."""
    await redis.set(KEYS.kept("b"), "no list")
    async with working(redis_server) as node:
        await post(redis, send("b", data=1))
        await post(redis, send("c", data=2))
        await wait_until(lambda: redis.exists(KEYS.kept("c")))
        await wait_until(lambda: holds(redis, 1))
        await redis.delete(KEYS.inbox("n1"))
        # Not sooner is there a place for it: a round that found it in the inbox still may put it away.
        await wait_until(lambda: not node.inbox._unplaced)
        assert await redis.get(KEYS.kept("b")) == b"no list"


async def holds(redis: Redis, count: int) -> bool:
    return bool(await redis.xlen(KEYS.inbox("n1")) == count)


async def test_a_user_who_came_meanwhile_is_looked_for(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server) as node, redis.pubsub() as elsewhere:
        await elsewhere.subscribe(KEYS.to_node("n2"))
        await elsewhere.get_message(timeout=5)
        await redis.sadd(KEYS.user("a"), "n2.0.5", "n1.0.9")
        await post(redis, send("a", data=1))
        message = await wait_until(lambda: elsewhere.get_message(ignore_subscribe_messages=True, timeout=0.1))
        assert message["data"] == encode(Command(op="collect", user="a"))
        await wait_until(lambda: len(node.given) == 2, what="here he is tried again, too")
        await asyncio.sleep(0.2)
        assert len(node.given) == 2, "and not for ever"
        assert await waiting(redis, "a") == [1]


async def test_a_message_that_is_too_old_is_dropped(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server) as node:
        now_ms = time.time_ns() // 1_000_000
        await post(redis, send("a", data="old", sent=now_ms - 2000, until=now_ms - 1000))
        await post(redis, send("a", data="older than the setting", sent=now_ms - 61_000))
        await post(redis, send("a", data="new"))
        await wait_until(lambda: is_empty(redis))
        assert node.told == ["new"]


async def test_what_a_former_life_left_waits_for_its_users(redis_server: RedisServer, redis: Redis) -> None:
    await post(redis, send("a", "b", data=1))
    await post(redis, Command(op="send", to=To(all=True), data=2))
    await post(redis, Command(op="poke"))
    await redis.xadd(KEYS.inbox("n1"), {"c": "?"})
    await redis.xadd(KEYS.inbox("n1"), {"x": "?"})
    async with working(redis_server) as node:
        await wait_until(lambda: is_empty(redis))
        await wait_until(lambda: redis.exists(KEYS.kept("b")))
        assert node.given == []
        assert await waiting(redis, "a") == await waiting(redis, "b") == [1]


@pytest.mark.usefixtures("doubtful")
async def test_kept_commands_survive_a_cut(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server, timeout_s=0.3) as node:
        node.here = {"a"}
        await post(redis, send("a", data=1))
        await wait_until(lambda: node.given)
        redis_server.pause()
        await wait_until(lambda: not node.inbox.is_up, 15)
        redis_server.resume()
        await redis.xadd(KEYS.inbox("n1"), {"c": encode(send("a", data=2))})  # no poke
        await wait_until(lambda: is_empty(redis), 15)
        await wait_until(lambda: node.told == [1, 2], 15, "each once")


# messages that wait


async def test_what_waits_is_brought_once_and_in_order(redis_server: RedisServer, redis: Redis) -> None:
    await keep(redis, KEYS, "a", [kept(n) for n in range(8)], 5)
    assert await waiting(redis, "a") == [3, 4, 5, 6, 7], "the newest"
    async with working(redis_server) as node:
        node.here = {"a"}
        node.inbox.users_came(["a"])
        node.inbox.users_came(["a"])
        await wait_until(lambda: node.inbox.collected == 5)
        assert node.told == [3, 4, 5, 6, 7]
        assert len({command.id for command in node.given}) == 5
        assert not await redis.exists(KEYS.kept("a"))
        await wait_until(lambda: nothing_is_in_hand(redis))


async def test_what_cannot_be_handed_over_goes_back_in_order(redis_server: RedisServer, redis: Redis) -> None:
    await keep(redis, KEYS, "a", [kept(1), kept(2)], 5)
    async with working(redis_server) as node, redis.pubsub() as replies:
        await replies.subscribe("qp:reply:1")
        await replies.get_message(timeout=5)
        command = Command(op="collect", id="c1", reply="qp:reply:1", user="a")
        await redis.publish(KEYS.to_node("n1"), encode(command))
        message = await wait_until(lambda: replies.get_message(ignore_subscribe_messages=True, timeout=0.1))
        assert message["data"] == encode(Reply("c1", "n1"))
        assert await waiting(redis, "a") == [1, 2]
        assert len(node.given) == 2
        await wait_until(lambda: nothing_is_in_hand(redis))


async def test_what_was_taken_goes_back_when_the_node_stops(redis_server: RedisServer, redis: Redis) -> None:
    await keep(redis, KEYS, "a", [kept(1), kept(2)], 5)
    async with working(redis_server) as node:
        node.delay_s = 60
        node.inbox.users_came(["a"])
        await wait_until(lambda: node.given)
        assert await is_gone(redis, "a")
    node.inbox._redis = redis
    await node.inbox.move()
    assert await waiting(redis, "a") == [1, 2]
    assert await nothing_is_in_hand(redis)


async def test_what_was_taken_by_a_node_that_was_killed_is_brought_by_its_next_life(
    redis_server: RedisServer, redis: Redis
) -> None:
    await keep(redis, KEYS, "a", [kept(1), kept(2)], 5)
    async with working(redis_server) as dead:
        dead.delay_s = 60
        dead.inbox.users_came(["a"])
        await wait_until(lambda: len(dead.given) == 2)
    await keep(redis, KEYS, "a", [kept(3)], 5)
    async with working(redis_server) as node:
        node.here = {"a"}
        node.inbox.users_came(["a"])
        await wait_until(lambda: node.inbox.collected == 3)
        assert node.told == [1, 2, 3]
        assert await is_gone(redis, "a")
        await wait_until(lambda: nothing_is_in_hand(redis))


async def test_two_nodes_never_have_the_same_message(redis: Redis) -> None:
    takers = [Taker(redis, KEYS, f"n{n}", most=50, timeout_s=5) for n in range(4)]
    for turn in range(20):
        await keep(redis, KEYS, "a", [kept([turn, n]) for n in range(10)], 50)
        taken = await asyncio.gather(*(taker.take(["a"]) for taker in takers))
        got = [each.message.data for found in taken for each in found.get("a", [])]
        assert sorted(got) == [[turn, n] for n in range(10)]
        for taker, found in zip(takers, taken, strict=True):
            taker.drop(each.entry for each in found.get("a", []))
            await taker.settle()
    assert await redis.keys(KEYS.taken("*")) == []


async def test_what_is_put_back_stands_before_what_came_meanwhile_and_is_no_more_than_may_wait(redis: Redis) -> None:
    taker = Taker(redis, KEYS, "n1", most=3, timeout_s=5)
    await keep(redis, KEYS, "a", [kept(1), kept(2)], 3)
    await taker.take(["a"])
    await redis.rpush(KEYS.taken("n1"), "?")
    await keep(redis, KEYS, "a", [kept(3), kept(4)], 3)
    await redis.sadd(KEYS.user("a"), "n2.0.5")
    assert await taker.restore() == {"a": {"n2"}}
    assert await waiting(redis, "a") == [2, 3, 4]
    assert await taker.restore() == {}
    assert await nothing_is_in_hand(redis)


async def test_a_message_that_was_written_down_and_not_taken_waits_once(redis: Redis) -> None:
    """As after a node that was killed between the two."""
    await keep(redis, KEYS, "a", [kept(1), kept(2)], 5)
    (text, _) = await redis.lrange(KEYS.kept("a"), 0, -1)
    await redis.rpush(KEYS.taken("n1"), encode(Taken("a", msgspec.Raw(text))))
    await Taker(redis, KEYS, "n1", most=5, timeout_s=5).restore()
    assert await waiting(redis, "a") == [1, 2]
    assert await nothing_is_in_hand(redis)


async def test_a_list_that_is_none_holds_nobody_else_s_messages_up(redis_server: RedisServer, redis: Redis) -> None:
    await redis.set(KEYS.kept("bad"), "no list")
    old = Taken("bad", msgspec.Raw(encode(kept(0))))
    await redis.rpush(KEYS.taken("n1"), encode(old))
    await redis.xadd(KEYS.inbox("n1"), {"c": encode(send("bad", data=1))})
    await keep(redis, KEYS, "a", [kept(2)], 5)
    async with working(redis_server) as node:
        node.here = {"a"}
        node.inbox.users_came(["bad", "a"])
        await wait_until(lambda: node.inbox.collected == 1)
        node.inbox._doubt("as if an answer had been lost")
        await keep(redis, KEYS, "a", [kept(3)], 5)
        node.inbox.users_came(["a"])
        await wait_until(lambda: node.inbox.collected == 2)
        await redis.delete(KEYS.kept("bad"))
        await wait_until(lambda: nothing_is_in_hand(redis))
        await wait_until(lambda: is_empty(redis))
    assert sorted(await waiting(redis, "bad")) == [0, 1]


async def test_where_redis_is_full_messages_wait_on_and_one_line_says_why(
    redis_server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await keep(redis, KEYS, "a", [kept(1)], 5)
    await redis.config_set("maxmemory", 1)
    async with working(redis_server) as node:
        node.here = {"a"}
        node.inbox.users_came(["a"])
        await wait_until(lambda: "cannot be brought" in caplog.text)
        assert await waiting(redis, "a") == [1]

        async def was_tried_again() -> bool:
            return bool((await redis.info("commandstats"))["cmdstat_rpush"]["rejected_calls"] >= 3)

        await wait_until(was_tried_again)
        await redis.config_set("maxmemory", 0)
        await wait_until(lambda: node.inbox.collected == 1)
    assert caplog.text.count("cannot be brought") == 1


class CutOff:
    """A client whose Redis stops just when messages are to be taken, and does it when it goes on."""

    def __init__(self, redis: Any, server: RedisServer) -> None:
        self._redis = redis
        self._server = server
        self.is_cut = False

    def pipeline(self, **options: Any) -> Any:
        pipeline = self._redis.pipeline(**options)
        execute = pipeline.execute

        async def pause_first(**options: Any) -> Any:
            if not self.is_cut and any(command[0][0] == "LREM" for command in pipeline.command_stack):
                self.is_cut = True
                self._server.pause()
            return await execute(**options)

        pipeline.execute = pause_first
        return pipeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_what_was_taken_unheard_is_not_lost(redis_server: RedisServer, redis: Redis, is_stopped: bool) -> None:
    await keep(redis, KEYS, "a", [kept(1), kept(2)], 5)
    async with working(redis_server, timeout_s=0.3) as node:
        node.here = {"a"}
        client = CutOff(node.inbox._redis, redis_server)
        node.inbox._taker._redis = client
        node.inbox.users_came(["a"])
        await wait_until(lambda: client.is_cut)
        if is_stopped:
            asyncio.get_running_loop().call_later(0.1, redis_server.resume)
        else:
            await asyncio.sleep(0.5)  # for longer than it waits
            redis_server.resume()
            await wait_until(lambda: node.inbox.collected == 2, 15)
    if is_stopped:
        await Taker(redis, KEYS, "n1", most=5, timeout_s=5).restore()
    told_and_waiting = (node.told, await waiting(redis, "a"))
    assert told_and_waiting == (([], [1, 2]) if is_stopped else ([1, 2], []))


async def test_taking_leaves_out_what_is_too_old_and_what_is_no_message(redis: Redis) -> None:
    await keep(redis, KEYS, "a", [kept(1, until_s=-1), kept(2)], 5)
    await redis.rpush(KEYS.kept("a"), "?")
    taker = Taker(redis, KEYS, "n1", most=5, timeout_s=5)
    assert [each.message.data for each in (await taker.take(["b", "a"]))["a"]] == [2]
    assert await is_gone(redis, "a")
    assert await taker.take(["a"]) == {}


async def test_a_list_lives_as_long_as_its_youngest_message(redis: Redis) -> None:
    await keep(redis, KEYS, "a", [kept(1, until_s=100)], 5)
    await keep(redis, KEYS, "a", [kept(2, until_s=10)], 5)
    assert 10_000 < await redis.pttl(KEYS.kept("a")) <= 100_000
    await keep(redis, KEYS, "b", [kept(1, until_s=-5)], 5)
    await wait_until(lambda: is_gone(redis, "b"))
    await keep(redis, KEYS, "c", [], 5)


async def is_gone(redis: Redis, user: str) -> bool:
    return not await redis.exists(KEYS.kept(user))


async def nothing_is_in_hand(redis: Redis) -> bool:
    return not await redis.exists(KEYS.taken("n1"))
