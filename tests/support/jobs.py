"""Time that passes for jobs, without anybody waiting: everything that Redis has of them is moved into the past."""

from redis.asyncio import Redis

from quotepush.cluster.commands import ClusterKeys

__all__ = ["pass_time"]


async def pass_time(redis: Redis, seconds: float, prefix: str = "qp:") -> None:
    """Let so many seconds pass: for the jobs it is as if the clock of Redis were ahead by them."""
    keys = ClusterKeys(prefix)
    ms = round(seconds * 1000)
    for job in await redis.zrange(keys.jobs, 0, -1):
        await redis.zincrby(keys.jobs, -ms, job)
        for name in ("next", "last", "made"):
            at = int(await redis.hget(keys.job(job), name) or 0)
            if at:
                await redis.hset(keys.job(job), name, at - ms)
