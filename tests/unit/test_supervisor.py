"""What a dead worker has left in the registry goes, however long that takes."""

import asyncio
from typing import Any

import pytest

from quotepush.cluster.registry import RegistryMirror, registry_client
from quotepush.node.supervisor import Supervisor
from quotepush.settings import Settings
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


class SlowRedis:
    """A client whose every pipeline takes its time."""

    def __init__(self, redis: Any, delay_s: float) -> None:
        self._redis = redis
        self._delay_s = delay_s

    def pipeline(self, **options: Any) -> Any:
        pipeline = self._redis.pipeline(**options)
        execute = pipeline.execute

        async def slowly(**options: Any) -> Any:
            await asyncio.sleep(self._delay_s)
            return await execute(**options)

        pipeline.execute = slowly
        return pipeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)


class Silent:
    """A switchboard that nobody listens to."""

    told = None
    is_held = False


def supervisor(redis: Any, **settings: Any) -> Supervisor:
    nothing: Any = None
    switchboard: Any = Silent()
    return Supervisor(
        Settings(node="n1", workers=1, **settings), [nothing], nothing, {}, redis, 10, lambda: ("ok", 0, ""),
        lambda: None, nothing, switchboard, lambda: 0,
    )  # fmt: skip


async def test_clearing_up_after_a_worker_may_take_longer_than_one_answer_of_redis(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    own = registry_client(redis_server.url)
    mirror = RegistryMirror(own, prefix="qp:", node="n1", life="0.5", interval_s=0.01)
    mirror.open("n1.0.5", ["A", "B"])
    writing = asyncio.create_task(mirror.run())
    await wait_until(lambda: mirror.healthy and not mirror.pending)
    writing.cancel()
    await asyncio.wait([writing])
    await own.aclose()
    async with redis_server.client() as redis:
        assert await redis.keys("qp:*")
        main = supervisor(SlowRedis(redis, 0.1), redis_timeout_s=0.4)
        main._unpurged.append(("0.5", {}))
        await main._purge()
        assert await redis.keys("qp:*") == []
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
