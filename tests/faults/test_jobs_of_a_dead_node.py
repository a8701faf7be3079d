"""Two nodes with messages for later, and one of them dies while it sends: another sends what is left, each once."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from quotepush import Backend
from quotepush.cluster.schedule import LEASE_S
from tests.support.jobs import pass_time
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

pytestmark = [pytest.mark.fault, pytest.mark.long]

Start = Callable[..., Awaitable[QuotepushServer]]

USERS, MESSAGES = 4, 50


def heard(client: RecordingClient) -> list[Any]:
    client.check()
    return [message["data"] for message in client.control if message["type"] == "message"]


async def test_a_node_that_dies_while_it_sends_costs_no_message_and_doubles_none(
    start_server: Start, redis_server: RedisServer
) -> None:
    # However long the one stands still, the other does not take it for dead.
    alive = await start_server(node="alive", workers=1, lease_s=60)
    dying = await start_server(node="dying", workers=1, lease_s=60)
    async with (
        connected_clients(alive.ws_url, USERS, lambda n: ["A"]) as clients,
        Backend(redis_server.url, timeout_s=20) as backend,
        redis_server.client() as redis,
    ):
        users = [f"user {n}" for n in range(USERS)]
        for client, user in zip(clients, users, strict=True):
            await backend.bind_user(client.fd, user)
        at = datetime.now(UTC) + timedelta(hours=1)
        await asyncio.gather(*(backend.send_to_user(user, n, at=at) for n in range(MESSAGES) for user in users))
        # A day's round for everybody, to whom nobody is bound.
        round_ = await backend.send_to_all("round", at=at, every=timedelta(days=1))

        async def both_take_part() -> bool:
            waiting = [await node.metric("jobs_waiting") for node in (alive, dying)]
            return waiting == [USERS * MESSAGES + 1] * 2

        await wait_until(both_take_part, 30)
        # Nobody but the one that dies sends now, and what it sends waits for a main that hears nothing.
        os.kill(alive.pid, signal.SIGSTOP)
        await pass_time(redis, 3600)

        async def it_is_at_it() -> bool:
            return await dying.metric("jobs_fired") > 0

        await wait_until(it_is_at_it, 30)
        await dying.kill()
        os.kill(alive.pid, signal.SIGCONT)

        async def only_leases_are_left() -> bool:
            jobs = {job.id: job for job in await backend.jobs()}
            scores = await redis.zrange("qp:{jobs}", 0, -1, withscores=True)
            due = [job for job, score in scores if score == jobs[job].at and job != round_.id]
            return not due

        await wait_until(only_leases_are_left, 30)
        await pass_time(redis, LEASE_S)

        async def only_the_round_is_left() -> bool:
            return [(job.id, job.sent) for job in await backend.jobs()] == [(round_.id, 1)]

        await wait_until(only_the_round_is_left, 30)
        for client in clients:
            await wait_until(lambda c=client: len(heard(c)) > MESSAGES, 20)
            await client.ping()  # what would be doubled has come before the answer
            assert sorted(map(str, heard(client))) == sorted(["round", *map(str, range(MESSAGES))])
