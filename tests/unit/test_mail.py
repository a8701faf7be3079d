"""The inbox of a node, and where its messages go."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from quotepush.cluster.commands import (
    BadCommand,
    ClusterKeys,
    Command,
    Kept,
    Taken,
    To,
    decode_kept,
    encode,
    parse_command,
)
from quotepush.cluster.mail import Mail, move_mail, put_back
from quotepush.cluster.presence import redis_us
from tests.support.redis_server import RedisServer

KEYS = ClusterKeys("qp:")
INBOX = KEYS.inbox("n1")


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client(decode_responses=False) as client:
        yield client


@pytest.fixture
def mail(redis: Redis) -> Mail:
    return Mail(redis, KEYS, "n1", ttl_s=60, timeout_s=20.0)


async def test_commands_come_in_order_and_in_pages(redis: Redis, mail: Mail) -> None:
    for n in range(5):
        await redis.xadd(INBOX, {"c": encode(Command(op="send", id=str(n), to=To(all=True), data=n))})
    first = await mail.page(b"-", 3)
    second = await mail.page(b"(" + first[-1][0], 3)
    commands = [mail.command(*entry) for entry in first + second]
    assert [command.data for command in commands if command is not None] == [0, 1, 2, 3, 4]
    await mail.remove([entry for entry, _ in first])
    assert await mail.page(b"-", 9) == second


async def test_what_says_nothing_of_its_age_is_as_old_as_its_entry(redis: Redis, mail: Mail) -> None:
    now_ms = await redis_us(redis) // 1000
    text = encode(Command(op="send", to=To(all=True), data=1))
    await redis.xadd(INBOX, {"c": text}, id=f"{now_ms - 61_000}-1")
    entry = await redis.xadd(INBOX, {"c": text}, id=f"{now_ms - 59_000}-1")
    old, new = [mail.command(*found) for found in await mail.page(b"-", 9)]
    assert old is None
    assert new is not None
    assert (new.sent, new.until, new.id, new.keep) == (now_ms - 59_000, now_ms + 1_000, entry.decode(), True)


async def test_what_is_no_command_is_said_to_be_none(redis: Redis, mail: Mail) -> None:
    await redis.xadd(INBOX, {"c": "?"})
    await redis.xadd(INBOX, {"other": "field"})
    for found in await mail.page(b"-", 9):
        with pytest.raises(BadCommand):
            mail.command(*found)


async def test_entries_that_redis_would_not_remove_are_removed_with_the_next(
    redis_server: RedisServer, redis: Redis, mail: Mail
) -> None:
    for _ in range(2):
        await redis.xadd(INBOX, {"c": encode(Command(op="poke"))})
    one, two = await mail.page(b"-", 9)
    await redis.config_set("min-replicas-to-write", 1)
    with pytest.raises(Exception, match="NOREPLICAS"):
        await mail.remove([one[0]])
    await redis.config_set("min-replicas-to-write", 0)
    await mail.remove([two[0]])
    assert await redis.xlen(INBOX) == 0


async def test_a_message_for_users_waits_and_the_nodes_where_they_are_are_told(redis: Redis) -> None:
    await redis.sadd(KEYS.user("ann"), "n2.0.5", "n3.1.7", "?")
    now_ms = await redis_us(redis) // 1000
    command = Command(op="send", id="m", to=To(users=["ann", "bob"]), data="hi", sent=now_ms, until=now_ms + 60_000)
    async with redis.pubsub() as pubsub:
        await pubsub.psubscribe("qp:*")
        nodes = await put_back(redis, KEYS, command, ["ann", "bob"], kept_max=5, timeout_s=20.0)
        assert nodes == ({"n2", "n3"}, {})
        said = []
        while len(said) < 2:
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
            if message is not None:
                said.append((message["channel"].decode(), message["data"]))
    collect = encode(Command(op="collect", user="ann"))
    assert sorted(said) == [(KEYS.to_node("n2"), collect), (KEYS.to_node("n3"), collect)]
    for user in ("ann", "bob"):
        (kept,) = [decode_kept(text) for text in await redis.lrange(KEYS.kept(user), 0, -1)]
        assert kept is not None
        assert (kept.id, kept.data, kept.until) == ("m", "hi", now_ms + 60_000)
        assert 0 < await redis.pttl(KEYS.kept(user)) <= 60_000


async def test_an_inbox_of_any_length_is_emptied(redis: Redis) -> None:
    now_ms = await redis_us(redis) // 1000
    for n in range(230):
        command = Command(op="send", id=str(n), to=To(users=["ann"]), data=n, until=now_ms + 60_000)
        await redis.xadd(INBOX, {"c": encode(command)})
    assert await move_mail(redis, KEYS, "n1", kept_max=500, kept_ttl_s=60, timeout_s=20.0) == 230
    assert await redis.xlen(INBOX) == 0
    kept = [decode_kept(text) for text in await redis.lrange(KEYS.kept("ann"), 0, -1)]
    assert [message.data for message in kept if message is not None] == list(range(230))


class SlowRedis:
    """A client whose every look at a user takes its time, by the clock of the loop."""

    def __init__(self, redis: Redis, delay_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self._redis = redis
        self._delay_s = delay_s
        self._ahead_s = 0.0
        loop = asyncio.get_running_loop()
        true_s = loop.time
        monkeypatch.setattr(loop, "time", lambda: true_s() + self._ahead_s)

    async def smembers(self, key: str) -> Any:
        self._ahead_s += self._delay_s
        return await self._redis.smembers(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)


async def test_a_message_for_many_users_may_take_longer_than_one_answer_of_redis(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [f"u{n}" for n in range(12)]
    now_ms = await redis_us(redis) // 1000
    command = Command(op="send", id="m", to=To(users=users), data=1, until=now_ms + 60_000)
    await redis.xadd(INBOX, {"c": encode(command)})
    slow = SlowRedis(redis, 5.0, monkeypatch)
    assert await move_mail(slow, KEYS, "n1", kept_max=5, kept_ttl_s=60, timeout_s=20.0) == 1
    assert [await redis.llen(KEYS.kept(user)) for user in users] == [1] * 12
    assert await redis.xlen(INBOX) == 0


async def test_who_cannot_be_put_anything_stays_and_holds_nobody_up(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.set(KEYS.kept("bad"), "no list")
    now_ms = await redis_us(redis) // 1000
    for n, users in enumerate((["bad"], ["ann", "bad", "bob"], ["ann"])):
        command = Command(op="send", id=f"m{n}", to=To(users=users), data=n, until=now_ms + 60_000)
        await redis.xadd(INBOX, {"c": encode(command)})
    await redis.rpush(KEYS.taken("n1"), encode(Taken("bad", msgspec.Raw(encode(Kept(now_ms, now_ms + 60_000, "old"))))))
    for _ in range(2):  # the next life finds it so, too
        await move_mail(redis, KEYS, "n1", kept_max=5, kept_ttl_s=60, timeout_s=20.0)
        assert await waiting(redis, "ann") == [1, 2]
        assert await waiting(redis, "bob") == [1]
        assert [command.to for command in await commands(redis)] == [To(users=["bad"])] * 2
        assert await redis.llen(KEYS.taken("n1")) == 1
    assert len([r for r in caplog.records if "stay with it" in r.message]) == 2
    await redis.delete(KEYS.kept("bad"))
    await move_mail(redis, KEYS, "n1", kept_max=5, kept_ttl_s=60, timeout_s=20.0)
    assert await waiting(redis, "bad") == ["old", 0, 1]
    assert (await redis.xlen(INBOX), await redis.exists(KEYS.taken("n1"))) == (0, 0)


async def waiting(redis: Redis, user: str) -> list[Any]:
    found = [decode_kept(text) for text in await redis.lrange(KEYS.kept(user), 0, -1)]
    return [message.data for message in found if message is not None]


async def commands(redis: Redis) -> list[Command]:
    return [parse_command(fields[b"c"]) for _, fields in await redis.xrange(INBOX)]
