"""Time that passes for jobs, without anybody waiting: everything that Redis has of them is moved into the past."""

from redis.asyncio import Redis

from quotepush.cluster.commands import ClusterKeys

__all__ = ["pass_time"]

# As one step, like a clock.
_PASS = """
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    redis.call('ZINCRBY', KEYS[1], -ARGV[1], id)
    for _, name in ipairs({'next', 'last', 'made'}) do
        local at = tonumber(redis.call('HGET', KEYS[1] .. ':' .. id, name) or 0)
        if at and at > 0 then
            redis.call('HSET', KEYS[1] .. ':' .. id, name, string.format('%d', at - ARGV[1]))
        end
    end
end
"""


async def pass_time(redis: Redis, seconds: float, prefix: str = "qp:") -> None:
    """Let so many seconds pass: for the jobs it is as if the clock of Redis were ahead by them."""
    await redis.eval(_PASS, 1, ClusterKeys(prefix).jobs, str(round(seconds * 1000)))
