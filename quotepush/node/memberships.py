"""A worker's side of users and groups in Redis: begun when the first session has a user, a group or session data.

A worker whose sessions have none of it has no second connection to Redis and no second mirror.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from redis.asyncio import Redis

from quotepush.cluster.registry import registry_client
from quotepush.cluster.sessions import SessionMirror
from quotepush.push.session import Session
from quotepush.settings import Settings

__all__ = ["Memberships"]


class Memberships:
    """Tells Redis about the members among the sessions of one worker.

    Args:
        life: of the worker, ``<worker>.<start_us>``.
        find: returns the session of an fd, None when it is gone.
        on_client_id: gets what the life is called in Redis and the ``CLIENT ID`` of who writes it.
        on_users: gets users who have got a connection, when Redis knows of it.
        told: gets users and groups that have come or gone in the whole cluster; None: nobody wants to know.
    """

    def __init__(
        self,
        settings: Settings,
        node: str,
        life: str,
        *,
        find: Callable[[str], Session | None],
        on_client_id: Callable[[str, int], None],
        on_users: Callable[[Sequence[str]], None],
        told: Callable[[str, bool], None] | None,
    ) -> None:
        self._find = find
        self._known: set[str] = set()
        self._is_wanted = asyncio.Event()
        self._redis: Redis | None = None
        self._mirror: SessionMirror | None = None

        def begin() -> SessionMirror:
            self._redis = registry_client(settings.registry_url, connect_timeout_s=settings.redis_timeout_s)
            return SessionMirror(
                self._redis,
                describe=self._describe,
                on_users=on_users,
                told=told,
                prefix=settings.redis_prefix,
                node=node,
                life=life,
                interval_s=settings.registry_interval_s,
                ttl_s=settings.registry_ttl_s,
                check_interval_s=settings.registry_check_s,
                on_client_id=lambda client_id: on_client_id(f"{life}:members", client_id),
            )

        self._begin = begin

    @property
    def pending(self) -> int:
        """How many members have a change that Redis has not taken yet."""
        return 0 if self._mirror is None else self._mirror.pending

    @property
    def lag_ms(self) -> int:
        """Age of the oldest of these changes."""
        return 0 if self._mirror is None else self._mirror.lag_ms

    @property
    def repairs(self) -> int:
        """Differences that were found and put right."""
        return 0 if self._mirror is None else self._mirror.repairs

    @property
    def count(self) -> int:
        """How many sessions have, or had, a user, a group or session data."""
        return len(self._known)

    def changed(self, session: Session) -> None:
        """Something about a session has changed."""
        if self._mirror is None:
            self._mirror = self._begin()
            self._is_wanted.set()
        member = session.member
        if session.fd in self._known:
            self._mirror.touch(session.fd)
        elif member is not None:
            self._known.add(session.fd)
            self._mirror.open(session.fd, member.tags.keys())

    def close(self, fd: str) -> None:
        """A session is gone."""
        if fd in self._known:
            self._known.discard(fd)
            assert self._mirror is not None
            self._mirror.close(fd)

    def doubt(self) -> None:
        """Redis may hold anything now: write all of it again."""
        if self._mirror is not None:
            self._mirror.doubt()

    async def run(self) -> None:
        """Follow the truth until cancelled."""
        await self._is_wanted.wait()  # perhaps for ever
        assert self._mirror is not None
        await self._mirror.run()

    async def finish(self) -> bool:
        """Remove everything of this life from Redis; True if Redis took it. Call it after :meth:`run` has ended."""
        if self._mirror is None or self._redis is None:
            return True
        is_clear = await self._mirror.finish()
        await self._redis.aclose()
        return is_clear

    def _describe(self, fd: str) -> bytes | None:
        session = self._find(fd)
        member = None if session is None else session.member
        if session is None or member is None or not (member.tags or member.data):
            return None
        said: dict[str, Any] = {
            "user": member.user, "opened": session.opened_ms, "groups": member.groups, "data": member.data,
        }  # fmt: skip
        return orjson.dumps(said)
