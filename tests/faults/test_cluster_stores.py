"""Three nodes on a Redis Cluster, and on a Redis behind Sentinel: what they stand on fails over, and they die."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quotepush.backend import Backend
from quotepush.errors import BackendUnavailable
from quotepush.store.clients import Store
from tests.support.numbered_feed import NumberedFeed
from tests.support.redis_cluster import running_cluster
from tests.support.redis_sentinel import running_sentinels
from tests.support.several_nodes import SeveralNodes, several_nodes
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.long]


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[tuple[str, list[Callable[[], None]]]]:
    """Its address, and what can happen to it: the masters of the log and of the nodes' records die."""
    with running_cluster(directory, replicas=1) as found:

        def lose(key: str) -> None:
            master = found.master_of(key)
            master.kill()
            found.wait_until_replaced(master, key)
            master.start()
            found.wait_until(found.is_well, "it is a replica")

        yield found.url, [lambda: lose("{qp:}log"), lambda: lose("qp:nodes")]


@contextlib.contextmanager
def sentinel(directory: Path) -> Iterator[tuple[str, list[Callable[[], None]]]]:
    """Its address, and what can happen to it: the master is replaced while it lives, and dies."""
    with running_sentinels(directory) as found:

        def lose() -> None:
            master = found.master
            master.kill()
            found.wait_until_replaced(master)

        yield found.url, [found.fail_over, lose]


async def are_right(nodes: SeveralNodes, redis: Any, backend: Backend, number: int) -> None:
    await nodes.registry_is_right(redis, 40)

    async def all_are_heard() -> bool:
        return all([await server.metric("commands_up") == 1 for server in nodes.nodes.values() if server.is_running])

    await wait_until(all_are_heard, 20)

    async def is_reached() -> bool:
        """A call on a link that was lost fails; it may have been carried out, so it is not made again by itself."""
        try:
            sent = [await backend.send_to_all("probe"), await backend.send_to_user("everywhere", "probe")]
        except BackendUnavailable:
            return False
        return not any(one.missing for one in sent)

    await wait_until(is_reached, 20)
    for client in nodes.live:
        await client.ping()
    await nodes.sends_are_right(backend, number)


@pytest.mark.parametrize("store", [cluster, sentinel], ids=["cluster", "sentinel"])
async def test_three_nodes_reach_everybody_whatever_dies(store: Any, tmp_path: Path) -> None:
    with store(tmp_path / "store") as (url, accidents):
        # A lease that outlasts a failover.
        async with (
            contextlib.aclosing(Store(url).client(decode_responses=True)) as redis,
            several_nodes(tmp_path, url, lease_s=10, registry_check_s=0.5, redis_timeout_s=2) as nodes,
            NumberedFeed(url, "AAPL", "C0") as feed,
            Backend(url, timeout_s=5) as backend,
        ):
            await nodes.crowd()
            feed.start()
            await are_right(nodes, redis, backend, 0)
            for number, happens in enumerate(accidents, 1):
                await asyncio.to_thread(happens)  # while ticks and heartbeats flow
                await are_right(nodes, redis, backend, number)
            assert [await server.metric("nodes_cleared") for server in nodes.nodes.values()] == [0, 0, 0]

            await nodes.nodes["n3"].kill()

            async def is_cleared() -> bool:
                return not await redis.exists("qp:node:n3")

            await wait_until(is_cleared, 40)
            await are_right(nodes, redis, backend, 10)
            await nodes.nodes["n3"].start()
            await nodes.connect("n3", "everywhere", ["g1"], ["AAPL", "C0"])
            await are_right(nodes, redis, backend, 11)

            async def cleared() -> float:
                return sum([await nodes.nodes[name].metric("nodes_cleared") for name in ("n1", "n3")])

            before = await cleared()
            nodes.pause("n2")

            async def is_taken_for_dead() -> bool:
                return await cleared() == before + 1

            await wait_until(is_taken_for_dead, 40)
            nodes.resume("n2")
            await are_right(nodes, redis, backend, 12)

            await feed.stop()
            for client in nodes.live:
                for code in client.codes & feed.newest.keys():
                    await wait_until(lambda c=client, code=code: c.rows[code]["seq"] == feed.newest[code], 20)
