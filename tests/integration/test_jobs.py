"""Messages that are sent later, on a server with two workers: who gets them, and what a restart makes of them."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp

from quotepush import Backend
from tests.support.command import run_quotepush
from tests.support.jobs import pass_time
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

Start = Callable[..., Awaitable[QuotepushServer]]

TOKEN = "a token of the tests"[::-1].replace(" ", "-")


def fd(client: RecordingClient) -> str:
    name: str = client.hello["conn"]
    return name


def heard(client: RecordingClient) -> list[Any]:
    client.check()
    return [(message["from"], message["data"]) for message in client.control if message["type"] == "message"]


async def test_what_is_for_later_comes_at_its_time_to_whom_it_is_for(
    start_server: Start, redis_server: RedisServer
) -> None:
    server = await start_server(api_token=TOKEN)
    async with (
        connected_clients(server.ws_url, 4, lambda n: ["A"]) as (ann, bob, vip, other),
        Backend(redis_server.url) as backend,
        redis_server.client() as redis,
    ):
        await backend.bind_user(fd(ann), "ann")
        await backend.bind_user(fd(bob), "bob")
        await backend.join_group(fd(vip), "vip")
        at = datetime.now(UTC) + timedelta(minutes=10)

        # by the library, over HTTP and in the terminal
        await backend.send_to_user("ann", {"title": "filled"}, at=at)
        await backend.send_to_user("away", "later still", at=at, delivery="kept")
        await backend.send_to_conn(fd(other), b"\x00", at=at)
        url, headers = f"{server.admin_url}/api/v1/send", {"Authorization": f"Bearer {TOKEN}"}
        body = {"to": {"group": "vip"}, "data": 1, "at": int(at.timestamp() * 1000)}
        async with aiohttp.ClientSession(headers=headers) as http, http.post(url, json=body) as response:
            assert response.status == 200, await response.text()
        outcome = await run_quotepush(
            "send", "--all", "--at", "+10m", "--every", "1h", "--exclude", fd(bob), "open", "--redis", redis_server.url
        )
        assert outcome.status == 0, outcome.stderr
        cancelled = await backend.send_to_all("never", at=at)
        assert await backend.cancel_job(cancelled.id)
        assert len(await backend.jobs()) == 5

        async def are_seen() -> bool:
            return await server.metric("jobs_waiting") == 5

        await wait_until(are_seen)
        assert not any(heard(client) for client in (ann, bob, vip, other))

        await pass_time(redis, 600)
        await wait_until(lambda: [len(heard(client)) for client in (ann, bob, vip, other)] == [2, 0, 2, 2])
        assert sorted(map(str, heard(ann))) == sorted(map(str, [("user", {"title": "filled"}), ("all", "open")]))
        assert ("group", 1) in heard(vip) and ("conn", "AA==") in heard(other)
        await backend.bind_user(fd(bob), "away")
        await wait_until(lambda: heard(bob) == [("user", "later still")])

        # again and again, also after a restart of the server, which sends what was missed once
        async def only_one_is_left() -> bool:
            return [(job.every, job.sent, job.to) for job in await backend.jobs()] == [(3600, 1, {"all": True})]

        await wait_until(only_one_is_left)
        (job,) = await backend.jobs()
        assert await server.metric("jobs_fired") == 5 and await server.metric("jobs_failed") == 0
    await server.stop()
    async with redis_server.client() as redis, Backend(redis_server.url) as backend:
        await pass_time(redis, 5 * 3600)
        await server.start()
        async with connected_clients(server.ws_url, 1, lambda n: ["A"]) as (back,):
            await wait_until(lambda: heard(back) == [("all", "open")])
            outcome = await run_quotepush("jobs", "--json", "--redis", redis_server.url)
            assert json.loads(outcome.stdout)["id"] == job.id
            outcome = await run_quotepush("jobs", "cancel", job.id, "--redis", redis_server.url)
            assert outcome.stdout == f"{job.id} is cancelled\n"
            assert await backend.jobs() == []

            # to the second that was asked for
            soon = await backend.send_to_all("soon", at=timedelta(seconds=1.5))
            await wait_until(lambda: heard(back)[1:] == [("all", "soon")])
            (message,) = [one for one in back.control if one.get("data") == "soon"]
            assert soon.at <= message["time"]


async def test_a_flood_of_messages_that_are_due_arrives_each_once(
    start_server: Start, redis_server: RedisServer
) -> None:
    server = await start_server()
    async with (
        connected_clients(server.ws_url, 4, lambda n: ["A"]) as clients,
        Backend(redis_server.url, timeout_s=20) as backend,
        redis_server.client() as redis,
    ):
        for client in clients:
            await backend.bind_user(fd(client), f"user {fd(client)}")
        at = datetime.now(UTC) + timedelta(minutes=10)
        await asyncio.gather(
            *(backend.send_to_user(f"user {fd(c)}", n, at=at, delivery="kept") for n in range(100) for c in clients)
        )
        await pass_time(redis, 600)
        for n in range(100):
            await redis.publish("quote.A", json.dumps({"last": n + 1}))
        await wait_until(lambda: all(len(heard(client)) == 100 for client in clients), 30)
        for client in clients:
            assert sorted(heard(client)) == [("user", n) for n in range(100)]
            await wait_until(lambda client=client: client.last("A") == 100)

        async def nothing_is_left() -> bool:
            return await backend.jobs() == []

        await wait_until(nothing_is_left)
