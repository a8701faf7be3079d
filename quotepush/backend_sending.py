"""The calls that send: to whom, how and when. At once they answer what became of it, for later they return a job.

Law: what can be sent to nobody is refused where it is asked for, with a word and a sentence, also when it is for later.
"""

import base64
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Literal, Required, TypedDict, Unpack, overload

from quotepush.cluster.commands import Command, To
from quotepush.cluster.routing import Sent
from quotepush.cluster.schedule import Job, Times, When, times_of
from quotepush.errors import CallRefused

__all__ = ["AtOptions", "EveryOptions", "JobOptions", "SendOptions", "Sending"]


class SendOptions(TypedDict, total=False):
    """How a message is sent; all may be left out.

    Attributes:
        exclude: connections that do not get it.
        raw: send the payload alone, as one text or binary frame, without the envelope of quotes.v1.
        delivery: ``now`` (the default): to whoever is there, at most once. ``kept``: it also waits for a user who is
            away and for a node that is cut off, and comes when they are back.
    """

    exclude: Iterable[str]
    raw: bool
    delivery: Literal["now", "kept"]


class JobOptions(SendOptions, total=False):
    """How and when a message is sent that is sent later; ``at`` or ``every`` must be given.

    Attributes:
        at: the first time: a ``datetime`` with its time zone, an ``int`` of milliseconds since 1970, or a ``timedelta``
            from now by the clock of Redis. What is over already is sent at once. Without it: ``every`` from now.
        every: again after so long, at least a second: a ``timedelta``, or seconds.
        until: it is not sent after that: as ``at``, but no ``timedelta``.
        count: with ``every``: how many times in all.
    """

    at: When | None
    every: timedelta | float | None
    until: datetime | int | None
    count: int | None


class AtOptions(SendOptions, total=False):
    """:class:`JobOptions` with an ``at``."""

    at: Required[When]
    every: timedelta | float | None
    until: datetime | int | None
    count: int | None


class EveryOptions(SendOptions, total=False):
    """:class:`JobOptions` with an ``every``."""

    at: When | None
    every: Required[timedelta | float]
    until: datetime | int | None
    count: int | None


class Sending(ABC):
    """The calls themselves."""

    @overload
    async def send_to_conn(self, conn: str, data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    async def send_to_conn(self, conn: str, data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    async def send_to_conn(self, conn: str, data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    async def send_to_conn(self, conn: str, data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send ``data`` to one connection. Options: :class:`SendOptions`; to send it later: :class:`JobOptions`.

        All calls that send raise ``CallRefused`` (``bad_request``, ``too_large``) for what can be sent to nobody; with
        ``at`` or ``every`` they return the job that will, and raise it (``job_limit``) when too many wait already.
        """
        return await self.send(To(conns=[conn]), data, options)

    @overload
    async def send_to_conns(self, conns: Iterable[str], data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    async def send_to_conns(self, conns: Iterable[str], data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    async def send_to_conns(self, conns: Iterable[str], data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    async def send_to_conns(self, conns: Iterable[str], data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to each of these connections that is there."""
        return await self.send(To(conns=list(conns)), data, options)

    @overload
    async def send_to_user(self, user: str, data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    async def send_to_user(self, user: str, data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    async def send_to_user(self, user: str, data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    async def send_to_user(self, user: str, data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to every connection of a user."""
        return await self.send(To(users=[user]), data, options)

    @overload
    async def send_to_users(self, users: Iterable[str], data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    async def send_to_users(self, users: Iterable[str], data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    async def send_to_users(self, users: Iterable[str], data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    async def send_to_users(self, users: Iterable[str], data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to every connection of each of these users."""
        return await self.send(To(users=list(users)), data, options)

    @overload
    async def send_to_group(self, group: str, data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    async def send_to_group(self, group: str, data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    async def send_to_group(self, group: str, data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    async def send_to_group(self, group: str, data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to every connection in a group."""
        return await self.send(To(group=group), data, options)

    @overload
    async def send_to_all(self, data: Any, **options: Unpack[SendOptions]) -> Sent: ...
    @overload
    async def send_to_all(self, data: Any, **options: Unpack[AtOptions]) -> Job: ...
    @overload
    async def send_to_all(self, data: Any, **options: Unpack[EveryOptions]) -> Job: ...
    async def send_to_all(self, data: Any, **options: Unpack[JobOptions]) -> Sent | Job:
        """Send to every connection of every node."""
        return await self.send(To(all=True), data, options)

    async def send(self, to: To, data: Any, options: JobOptions) -> Sent | Job:
        """Send to whomever ``to`` says, which the calls above say with their names."""
        unknown = options.keys() - JobOptions.__annotations__.keys() - SendOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"an unknown option: {', '.join(sorted(unknown))}")
        delivery = options.get("delivery", "now")
        if delivery not in ("now", "kept"):
            raise CallRefused("bad_request", f"delivery must be now or kept, not {delivery!r}")
        is_raw = options.get("raw", False)
        is_binary = isinstance(data, (bytes, bytearray, memoryview))
        if is_raw and not is_binary and not isinstance(data, str):
            raise CallRefused("bad_request", "raw sends a text or bytes as they are")
        command = Command(
            op="send", to=to, raw=is_raw, exclude=list(options.get("exclude", ())),
            data=base64.b64encode(data).decode() if is_binary else data, encoding="base64" if is_binary else "",
        )  # fmt: skip
        times = times_of(options)
        is_kept = delivery == "kept"
        return await (self._send_now(command, is_kept) if times is None else self._send_later(command, is_kept, times))

    @abstractmethod
    async def _send_now(self, command: Command, is_kept: bool) -> Sent:
        """Send a message."""

    @abstractmethod
    async def _send_later(self, command: Command, is_kept: bool, times: Times) -> Job:
        """Let it be sent at its times."""
