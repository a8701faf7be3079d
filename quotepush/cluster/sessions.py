"""The sets in Redis that say whose a connection is and in which groups, and what is kept about it.

The very mirror that writes the codes of connections (:mod:`quotepush.cluster.registry`), run a second time with other
keys (:class:`~quotepush.cluster.sets.MemberKeys`). It follows only the connections that have a user, a group or session
data; beside the sets it writes a text about each of them. A worker that has none runs none.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from quotepush.cluster.registry import RegistryMirror
from quotepush.cluster.sets import Command, MemberKeys, execute

__all__ = ["SessionMirror"]


class SessionMirror(RegistryMirror):
    """What Redis says about users, groups and session data always ends up equal to what is true.

    Args:
        describe: returns the text about an fd as it is now, None when there is nothing to say; whenever that has
            changed, :meth:`touch` is called.
        on_users: called with users who have got a connection, when Redis knows of it.
        options: of the other mirror; ``told`` is called with users and groups, as ``u:<uid>`` and ``g:<group>``.
    """

    _make_keys = MemberKeys

    def __init__(
        self,
        redis: Any,
        *,
        describe: Callable[[str], bytes | None],
        on_users: Callable[[Sequence[str]], None] = lambda users: None,
        **options: Any,
    ) -> None:
        super().__init__(redis, **options)
        self._describe = describe
        self._on_users = on_users

    async def _enrol(self, joined: Sequence[str], grown: Iterable[Command], gained: Any) -> None:
        await super()._enrol(joined, grown, gained)
        users = [tag[2:] for tag in gained if tag.startswith("u:")]
        if users:
            self._on_users(users)

    def _beside(self, fd: str) -> Iterable[Command]:
        described = self._describe(fd)
        if described is None:
            return [(1, ("UNLINK", self._conn(fd)))]
        return [(1 + len(described) // 64, ("SET", self._conn(fd), described, "EX", self._ttl_s))]

    async def _wrong(self, fds: Sequence[str]) -> list[str]:
        wrong = await super()._wrong(fds)
        held = await execute(self._redis, ((4, ("GET", self._conn(fd))) for fd in fds))
        await execute(self._redis, (self._renewal(self._conn(fd)) for fd in fds))
        # One that has changed since it was written is about to be written again.
        differs = [
            fd
            for fd, text in zip(fds, held, strict=True)
            if fd not in self._dirty and fd in self._open and text != self._describe(fd)
        ]
        return list(dict.fromkeys([*wrong, *differs]))

    def _conn(self, fd: str) -> bytes:
        assert isinstance(self._keys, MemberKeys)
        return self._keys.conn(fd)
