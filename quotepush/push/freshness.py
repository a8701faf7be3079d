"""Tells clients which of their codes have become stale, and which are fresh again.

Laws: a client is told whatever main says of its codes, each change once, all that change together in one message;
what has changed back before he could be told, he is not told. No turn of the loop takes longer than a budget, however
many watch. Nothing is written to a socket that has not taken its last write: he is told when it has, before any row.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from itertools import chain

from quotepush.push.outbox import Outbox
from quotepush.push.session import Session
from quotepush.push.subscriptions import Channel, Subscriptions

__all__ = ["Freshness"]

log = logging.getLogger("quotepush.session")

# As the hub's: so that the loop reads, pings and flushes in between.
_BUDGET_S = 0.002


class Freshness:
    """Passes on what main says of codes to the sessions that watch them."""

    def __init__(self, subscriptions: Subscriptions) -> None:
        self._channels = subscriptions.channels
        self._changed: dict[Channel, None] = {}  # their audiences have yet to be looked up
        self._concerned: dict[Session, set[str]] = {}  # have yet to be told about these codes
        self._parked: dict[Session, set[str]] = {}  # the same, but their socket is full
        self._timer: asyncio.Handle | None = None

    def note(self, stale: Iterable[str], fresh: Iterable[str]) -> None:
        """These codes are stale and those are fresh, from now on; begin to tell those who watch them."""
        for is_stale, codes in ((True, stale), (False, fresh)):
            for code in codes:
                channel = self._channels.get(code)
                if channel is not None and channel.is_stale is not is_stale:
                    channel.is_stale = is_stale
                    self._changed[channel] = None
        if self._timer is None:
            self._tell_slice()

    def _tell_slice(self) -> None:
        """Go on until everybody is told or the budget for this turn is spent."""
        self._timer = None
        deadline = time.monotonic() + _BUDGET_S
        is_late = False
        while self._changed and not is_late:
            self._look_up(self._changed.popitem()[0])
            is_late = time.monotonic() > deadline
        while self._concerned and not is_late:
            self._tell(*self._concerned.popitem())
            is_late = time.monotonic() > deadline
        if is_late and (self._changed or self._concerned):
            self._timer = asyncio.get_running_loop().call_soon(self._tell_slice)

    def _look_up(self, channel: Channel) -> None:
        concerned = self._concerned
        for lane in channel.all_lanes():
            for outbox in chain(lane.audience, lane.newcomers):
                codes = concerned.get(outbox.session)
                if codes is None:
                    concerned[outbox.session] = {channel.code}
                else:
                    codes.add(channel.code)

    def _tell(self, session: Session, codes: set[str]) -> None:
        if session.outbox.is_blocked:
            self._parked.setdefault(session, set()).update(codes)
            return
        try:
            session.say_freshness(codes)
        except Exception:
            log.exception("%s: could not be told about its codes", session.fd)

    def unblock(self, outbox: Outbox) -> None:
        """A socket has taken everything: tell what has changed meanwhile."""
        codes = self._parked.pop(outbox.session, None)
        if codes:
            self._tell(outbox.session, codes)

    def forget(self, session: Session) -> None:
        """The session is gone."""
        self._concerned.pop(session, None)
        self._parked.pop(session, None)
