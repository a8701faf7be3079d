"""Messages to connections, users and groups, and what else a backend does with connections: two workers, real Redis."""

import asyncio
import base64
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis
from yarl import URL

from tests.support.commands import Caller, calling
from tests.support.door import door_to
from tests.support.event_source import connected
from tests.support.redis_server import RedisServer
from tests.support.registry_truth import registry_equals
from tests.support.server import QuotepushServer
from tests.support.tokens import KEY, token
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

Start = Callable[..., Awaitable[QuotepushServer]]


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client()
    yield client
    await client.aclose()


@pytest.fixture
async def caller(redis: Redis) -> AsyncIterator[Caller]:
    async with calling(redis) as it:
        yield it


def heard(client: RecordingClient) -> list[Any]:
    client.check()
    return [message["data"] for message in client.control if message["type"] == "message"]


async def has_heard(client: RecordingClient, *data: Any) -> None:
    await wait_until(lambda: heard(client) == list(data), 15, f"{client.fd} has heard {data!r}")


@contextlib.asynccontextmanager
async def on_both_workers(url: str) -> AsyncIterator[list[RecordingClient]]:
    """Twelve clients, or as many as it takes until each worker has two: the kernel gives them to either."""
    async with contextlib.AsyncExitStack() as stack:
        clients: list[RecordingClient] = []
        while len(clients) < 12 or min(sum(c.worker == worker for c in clients) for worker in "01") < 2:
            clients.append(await stack.enter_async_context(RecordingClient(url)))
        yield clients


async def test_everything_that_can_be_done_with_connections(start_server: Start, redis: Redis, caller: Caller) -> None:
    server = await start_server()
    async with on_both_workers(server.ws_url) as clients:
        everybody: dict[str, set[str]] = {client.fd: set() for client in clients}
        a = clients[0]
        b = next(client for client in clients if client.worker != a.worker)  # a user and a group are on both workers
        c = next(client for client in clients if client.worker != a.worker and client is not b)
        # users
        reply = await caller.call("bind", conn=a.fd, user="alice")
        assert (reply["node"], reply["delivered"], reply["fds"]) == ("test", 1, [a.fd])
        await caller.call("bind", conn=b.fd, user="alice", conn_key=b.hello["conn_key"])
        assert (await caller.call("bind", conn=c.fd, user="x", conn_key=b.hello["conn_key"]))["error"] == "wrong_key"
        assert (await caller.call("bind", conn="test.0.5", user="x"))["fds"] == []
        assert (await caller.call("send", to={"users": ["alice", "nobody"]}, data={"n": 1}))["delivered"] == 2
        reply = await caller.call("send", to={"conns": [c.fd, "test.0.5"]}, data="hi")
        assert (reply["delivered"], reply["fds"]) == (1, [c.fd])
        # groups
        await caller.call("join", conns=[a.fd, c.fd], group="room")
        assert (await caller.call("send", to={"group": "room"}, data="room", exclude=[a.fd]))["delivered"] == 1
        reply = await caller.call("send", to_all=True, to={"all": True}, data=[1], exclude=[b.fd])
        assert reply["delivered"] == len(clients) - 1
        await has_heard(a, {"n": 1}, [1])
        await has_heard(b, {"n": 1})
        await has_heard(c, "hi", "room", [1])
        members = {a.fd: {"u:alice", "g:room"}, b.fd: {"u:alice"}, c.fd: {"g:room"}}
        await registry_equals(redis, everybody, members)
        # session data
        reply = await caller.call("set_session", conn=a.fd, data={"x": 1, "y": 2})
        assert reply["session"] == {"x": 1, "y": 2}
        await caller.call("update_session", conn=a.fd, data={"x": None})
        assert (await caller.call("get_session", conn=a.fd))["session"] == {"y": 2}
        assert (await caller.call("set_session", conn=a.fd, data={"x": "x" * 9000}))["error"] == "too_large"

        async def described() -> bool:
            said = json.loads(await redis.get(f"qp:conn:{a.fd}"))
            opened = said.pop("opened")
            return said == {"user": "alice", "groups": ["room"], "data": {"y": 2}} and opened > 1_000_000_000_000

        await wait_until(described)
        # leaving
        assert (await caller.call("leave", conns=[a.fd], group="room"))["delivered"] == 1
        assert (await caller.call("dissolve", group="room"))["delivered"] == 1
        assert (await caller.call("unbind", conn=b.fd))["delivered"] == 1
        await registry_gone(redis, "qp:group:room", f"qp:conn:{b.fd}", f"qp:conn:{c.fd}", f"qp:member:{c.fd}")
        # entitlement of live connections
        reply = await caller.call("entitle", users=["alice"], claims={"max_codes": 2})
        assert reply["delivered"] == 1
        assert (await a.request("subscribe", codes=["X", "Y", "Z"]))["limit"] == 2
        assert (await caller.call("entitle", conns=[a.fd], claims={"max_codes": "?"}))["error"] == "bad_request"
        # goodbye
        assert (await caller.call("kick", users=["alice"]))["fds"] == [a.fd]
        assert (await caller.call("close", conns=[c.fd], code=4000, reason="enough"))["delivered"] == 1
        await wait_until(lambda: a.has_ended and c.has_ended)
        assert (a.close_code, a.close_reason) == (4403, "kicked")
        assert (c.close_code, c.close_reason) == (4000, "enough")
        # what is no command harms nobody
        for text in ("?", "[]", '{"op":"fly"}', "\0", '{"op":"send","to":{"all":true},"data":NaN}'):
            await redis.publish("qp:to", text)
        assert (await caller.call("fly"))["error"] == "bad_request"
        assert (await caller.call("send", to={"conns": [b.fd]}, data="still here"))["delivered"] == 1
        assert server.log().count("no command") == 1
        assert await server.metric("commands_refused") == 6

        async def are_counted() -> bool:
            return await server.metric("messages_sent") >= 9

        await wait_until(are_counted, 15)


async def next_frame(socket: aiohttp.ClientWebSocketResponse) -> Any:
    """What comes next besides heartbeats: the first may come at any time."""
    while True:
        said = (await socket.receive(20)).data
        if not isinstance(said, str) or '"type":"heartbeat"' not in said:
            return said


async def test_texts_bytes_and_bare_frames_in_every_language(start_server: Start, redis: Redis, caller: Caller) -> None:
    server = await start_server(workers=1)
    binary = base64.b64encode(b"\0\xff").decode()
    async with (
        RecordingClient(server.ws_url) as json_client,
        RecordingClient(server.ws_url, msgpack=True) as packed,
        aiohttp.ClientSession() as http,
    ):
        await caller.call("send", to_all=True, to={"all": True}, data=binary, encoding="base64")
        await has_heard(json_client, binary)
        await has_heard(packed, b"\0\xff")
        for payload, options in (
            (b"\0\xff", {"data": binary, "encoding": "base64"}),
            ("b\u00e9\nb", {"data": "b\u00e9\nb"}),
        ):
            async with http.ws_connect(server.ws_url) as bare:
                conn = json.loads(await next_frame(bare))["conn"]
                assert (await caller.call("send", to={"conns": [conn]}, raw=True, **options))["delivered"] == 1
                assert await next_frame(bare) == payload
        async with connected(server.port, "AAPL") as stream:
            assert (await caller.call("send", to={"conns": [stream.fd]}, data={"for": "you"}))["delivered"] == 1
            await wait_until(lambda: [m["data"] for m in stream.of("message")] == [{"for": "you"}])


async def registry_gone(redis: Redis, *keys: str) -> None:
    async def are_gone() -> bool:
        return not await redis.exists(*keys)

    await wait_until(are_gone, 15, f"{keys} are gone")


async def test_a_connection_begins_with_what_its_handshake_says(
    start_server: Start, redis: Redis, caller: Caller
) -> None:
    server = await start_server(
        token_key=KEY, secret_params="password", require_conn_key="true", events="true", workers=2
    )
    about = token(sub="alice", groups=["staff"], role="admin", exp=4_000_000_000)
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe("qp:events")
        events: list[dict[str, Any]] = []

        url = f"{server.ws_url}?role=guest&app=web&app=ios&password=secret&token={about}"
        async with RecordingClient(url) as client, RecordingClient(server.ws_url) as other:
            assert (await caller.call("get_session", conn=client.fd))["session"] == {"role": "admin", "app": "ios"}
            assert (await caller.call("send", to={"group": "staff"}, data=1))["delivered"] == 1
            assert (await caller.call("send", to={"users": ["alice"]}, data=2))["delivered"] == 1
            await has_heard(client, 1, 2)
            # who has yet to show a token does not hear what is said to all
            assert (await caller.call("send", to_all=True, to={"all": True}, data=3))["delivered"] == 1
            assert (await caller.call("bind", conn=other.fd, user="bob"))["error"] == "key_needed"
            bound = await caller.call("bind", conn=other.fd, user="bob", conn_key=other.hello["conn_key"])
            assert bound["delivered"] == 1
            answer = await other.request("auth", token=token(sub="carol", groups=["x"], exp=4_000_000_000))
            assert answer["type"] == "ack"
            assert (await caller.call("send", to={"users": ["bob"]}, data=4))["delivered"] == 0
            assert (await caller.call("send", to={"group": "x"}, data=5))["delivered"] == 1
            await registry_equals(
                redis, {client.fd: set(), other.fd: set()},
                {client.fd: {"u:alice", "g:staff"}, other.fd: {"u:carol", "g:x"}},
            )  # fmt: skip
            assert "secret" not in "".join([str(await redis.get(f"qp:conn:{client.fd}")), server.log()])
        seen = {("open", "alice"), ("open", None), ("close", "alice"), ("close", "carol")}
        for user in ("alice", "carol"):  # bob was perhaps too short for anybody to see
            seen |= {("user_online", user), ("user_offline", user)}

        async def has_all() -> bool:
            while message := await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.05):
                events.append(json.loads(message["data"]))
            return seen <= {(event["event"], event.get("uid")) for event in events}

        await wait_until(has_all, 15, "every event")
        closes = [(event["by"], event["reason"]) for event in events if event["event"] == "close"]
        assert closes == [("client", "closed")] * 2
        # a worker that dies says nothing: main finds in the registry what it had
        async with RecordingClient(f"{server.ws_url}?token={about}") as client:
            await wait_until(lambda: redis.exists("qp:user:alice"))
            worker = await worker_pid(server, client.worker)
            os.kill(worker, signal.SIGKILL)
            await registry_equals(redis, {}, timeout_s=20)

    # two thousand letters that JSON spells with six each
    async with aiohttp.ClientSession() as http, http.get(URL(f"{server.url}/ws?a={'%01' * 2000}", encoded=True)) as no:
        assert no.status == 400
        assert (await no.json())["error"] == "too_large"


async def worker_pid(server: QuotepushServer, worker: str) -> int:
    for pid in server.worker_pids():
        with open(f"/proc/{pid}/cmdline", encoding="utf-8") as f:
            if f"worker {worker}" in f.read():
                return pid
    raise AssertionError(f"there is no worker {worker}")


async def test_a_dead_workers_users_groups_and_keys_are_gone(start_server: Start, redis: Redis, caller: Caller) -> None:
    server = await start_server(events="true")
    async with redis.pubsub() as pubsub, connected_clients(server.ws_url, 8) as clients:
        await pubsub.subscribe("qp:events")
        for number, client in enumerate(clients):
            await caller.call("bind", conn=client.fd, user=f"user {number}")
            await caller.call("join", conns=[client.fd], group="all")
            await caller.call("set_session", conn=client.fd, data={"n": number})
        members = {client.fd: {f"u:user {number}", "g:all"} for number, client in enumerate(clients)}
        await registry_equals(redis, {fd: set() for fd in members}, members)
        dead = clients[0].worker
        os.kill(await worker_pid(server, dead), signal.SIGKILL)
        left = {client.fd: members[client.fd] for client in clients if client.worker != dead}
        await registry_equals(redis, {fd: set() for fd in left}, left, timeout_s=20)
        gone: dict[str, Any] = {}
        offline: set[str] = set()

        async def are_told() -> bool:
            while message := await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.05):
                event = json.loads(message["data"])
                if event["event"] == "close":
                    gone[event["fd"]] = (event["uid"], event["by"], event["reason"])
                elif event["event"] == "user_offline":
                    offline.add(event["uid"])
            return len(gone) == len(members) - len(left) == len(offline)

        await wait_until(are_told, 15, "a dead worker's closes are told")
        assert gone == {
            client.fd: (f"user {number}", "server", "died")
            for number, client in enumerate(clients)
            if client.worker == dead
        }
        reply = await caller.call("send", to={"group": "all"}, data="who is left")
        assert reply["delivered"] == len(left)


async def test_clients_send_where_their_token_says_so(start_server: Start, redis: Redis, caller: Caller) -> None:
    server = await start_server(token_key=KEY, client_message_bytes=100, client_sends_per_s=20)

    def url(user: str, **claims: Any) -> str:
        return f"{server.ws_url}?token={token(sub=user, exp=4_000_000_000, **claims)}"

    speaker = url("ann", groups=["room"], may_send={"users": ["bob"], "groups": ["room"]})
    async with (
        RecordingClient(speaker) as ann,
        RecordingClient(speaker, msgpack=True) as ann_too,
        RecordingClient(url("bob", groups=["room"])) as bob,
        RecordingClient(url("eve")) as eve,
    ):
        await wait_until(lambda: scard(redis, "qp:group:room", 3))
        answer = await ann.request("send", to={"user": "bob"}, data={"hi": 1})
        assert (answer["type"], answer["delivered"]) == ("ack", 1)
        answer = await ann.request("send", to={"group": "room"}, data="all of you")
        assert answer["delivered"] == 2, "not to the sender himself, but to his other connection"
        await has_heard(bob, {"hi": 1}, "all of you")
        await has_heard(ann_too, "all of you")
        assert heard(ann) == heard(eve) == []
        (message,) = [m for m in bob.control if m.get("data") == "all of you"]
        assert message["from"] == "group"
        assert message["sender"] == {"conn": ann.fd, "user": "ann"}
        assert (await ann_too.request("send", to={"user": "bob"}, data=b"\0\1"))["delivered"] == 1
        await has_heard(bob, {"hi": 1}, "all of you", base64.b64encode(b"\0\1").decode())
        for to, word in (
            ({"user": "eve"}, "not_entitled"), ({"all": True}, "not_entitled"), ({"group": "hall"}, "not_entitled"),
            ({"user": ""}, "bad_request"), ({}, "bad_request"), ({"all": False}, "bad_request"),
            ({"user": "bob", "all": True}, "bad_request"),
        ):  # fmt: skip
            assert (await ann.request("send", to=to, data=1))["error"] == word, to
        assert (await eve.request("send", to={"user": "bob"}, data=1))["error"] == "not_entitled"
        assert (await ann.request("send", to={"user": "bob"}, data="x" * 200))["error"] == "too_large"
        answers = await asyncio.gather(*(ann.request("send", to={"user": "bob"}, data=n) for n in range(9)))
        assert all(a["type"] == "ack" or a["error"] == "rate_limited" for a in answers)
        await bob.close()
        await registry_gone(redis, "qp:user:bob")
        refused = await ann_too.request("send", to={"user": "bob"}, data=1)
        assert refused["error"] == "not_online"


async def scard(redis: Redis, key: str, count: int) -> bool:
    return bool(await redis.scard(key) == count)


@pytest.mark.parametrize("winner", ["newest", "oldest"])
async def test_a_user_has_at_most_so_many_connections(start_server: Start, redis: Redis, winner: str) -> None:
    server = await start_server(token_key=KEY)
    url = f"{server.ws_url}?token={token(sub='ann', exp=4_000_000_000, max_conns=2, conns_win=winner)}"
    other = f"{server.ws_url}?token={token(sub='bob', exp=4_000_000_000)}"
    async with connected_clients(other, 4) as others:
        clients: list[RecordingClient] = []
        for number in range(4):
            clients.append(RecordingClient(url))
            await clients[-1].open()
            most = number + 1 if number < 2 else 2
            await wait_until(lambda: sum(not c.has_ended for c in clients) == most, 15)  # noqa: B023
            await wait_until(lambda: scard(redis, "qp:user:ann", most), 15)  # noqa: B023
        stay = clients[2:] if winner == "newest" else clients[:2]
        assert [c for c in clients if not c.has_ended] == stay
        expected = (4409, "replaced") if winner == "newest" else (4429, "conn_limit")
        assert {(c.close_code, c.close_reason) for c in clients if c not in stay} == {expected}
        assert not any(client.has_ended for client in others)
        for client in stay:
            await client.close()


async def test_kept_messages_arrive_once(redis_server: RedisServer, start_server: Start, redis: Redis) -> None:
    async with door_to(redis_server) as door:
        # The node's own way to the registry can be cut; ours cannot.
        server = await start_server(registry_redis=door.url)
        async with calling(redis) as caller, connected_clients(server.ws_url, 2) as clients:
            for client in clients:
                await caller.call("bind", conn=client.fd, user="ann")
            await wait_until(lambda: scard(redis, "qp:user:ann", 2), 15)
            door.shut()
            await wait_until(lambda: metric_is(server, "commands_up", 0), 15)
            for number in range(20):
                await caller.keep(to={"users": ["ann"]}, data=number)
            door.open()
            for client in clients:
                await has_heard(client, *range(20))

            async def is_empty() -> bool:
                return not await redis.xlen("qp:inbox:test")

            await wait_until(is_empty, 15)
            for client in clients:
                await client.ping()
                assert heard(client) == list(range(20)), "once"
            # away: it waits for the next connection
            await caller.keep(to={"users": ["bob"]}, data="for bob")
            await wait_until(lambda: redis.llen("qp:kept:bob"), 15)
            async with RecordingClient(server.ws_url) as bob, RecordingClient(server.ws_url) as bob_too:
                await caller.call("bind", conn=bob.fd, user="bob")
                await has_heard(bob, "for bob")
                await caller.call("bind", conn=bob_too.fd, user="bob")
                await wait_until(lambda: scard(redis, "qp:user:bob", 2), 15)
                await bob_too.ping()
                assert heard(bob_too) == []
            assert not await redis.exists("qp:kept:bob")


async def metric_is(server: QuotepushServer, name: str, value: float) -> bool:
    return await server.metric(name) == value


async def test_messages_go_on_while_redis_comes_and_goes(
    redis_server: RedisServer, start_server: Start, redis: Redis
) -> None:
    server = await start_server(token_key=KEY)
    bearer = token(sub="ann", exp=4_000_000_000, may_send={"users": ["ann"]})
    async with connected_clients(f"{server.ws_url}?token={bearer}", 2) as (one, two):
        await wait_until(lambda: scard(redis, "qp:user:ann", 2), 15)
        assert (await one.request("send", to={"user": "ann"}, data=1))["delivered"] == 1
        redis_server.kill()
        answer = await one.request("send", to={"user": "ann"}, data=2)
        assert (answer["error"], answer["retryable"]) == ("internal", True)
        redis_server.start()

        async def is_sent() -> bool:
            await asyncio.sleep(0.2)  # whoever goes on asking faster than a client may is closed
            said = await one.request("send", to={"user": "ann"}, data=3)
            return said.get("delivered") == 1

        await wait_until(is_sent, 20, "a message after Redis came back")
        await wait_until(lambda: 3 in heard(two), 15)
        await registry_equals(redis, {one.fd: set(), two.fd: set()}, {one.fd: {"u:ann"}, two.fd: {"u:ann"}})


async def test_a_client_that_does_not_read_costs_bounded_memory_and_holds_up_nobody(
    start_server: Start, redis: Redis, caller: Caller
) -> None:
    server = await start_server(workers=1)
    async with (
        RecordingClient(server.ws_url, ["AAPL"], receive_buffer_bytes=4096) as slow,
        RecordingClient(server.ws_url, ["AAPL"]) as quick,
    ):
        for client in (slow, quick):
            await caller.call("join", conns=[client.fd], group="g")
        slow.stop_reading()
        await caller.call("join", conns=[quick.fd], group="h")
        refused = 0
        for number in range(400):
            reply = await caller.call("send", to={"group": "g"}, data=[number, "x" * 50_000])
            refused += 2 - reply["delivered"]
            if refused >= 20:
                break
        assert refused >= 20, "at last nothing more is written to it"

        async def is_counted() -> bool:
            return await server.metric("messages_undelivered") == refused

        await wait_until(is_counted)
        await redis.publish("quote.AAPL", '{"last":7}')
        await wait_until(lambda: quick.last("AAPL") == 7)
        slow.go_on_reading()
        await wait_until(lambda: slow.last("AAPL") == 7, 20, "and when it reads it has everything that was written")
        await wait_until(lambda: len(heard(quick)) == number + 1, 20)
        assert [n for n, _ in heard(slow)] == list(range(len(heard(slow))))
        reply = await caller.call("send", to={"conns": [slow.fd]}, data="again")
        assert reply["delivered"] == 1
