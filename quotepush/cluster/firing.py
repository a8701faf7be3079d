"""A node's part in what is to be sent later: it claims jobs that are due, sends them, and says what comes next.

Laws: a job is sent by the node that has claimed it, within its lease, under a name that is the same whoever sends it
for that time; so when a node dies, another sends it once the lease is over, and who has had it does not get it again.
At most ``IN_WORK`` jobs are in work, and a node rests between any two lots of them: ticks go on.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable

from quotepush.cluster.commands import Command
from quotepush.cluster.routing import Sent
from quotepush.cluster.schedule import LEASE_S, Claim, Schedule
from quotepush.errors import BackendUnavailable, CallRefused

__all__ = ["IN_WORK", "Firing", "Send"]

log = logging.getLogger("quotepush.main")

IN_WORK = 20
_LOOK_S = 1.0
_REST_S = 0.005
# A job is sent no later than so long after it was claimed, so that it is settled before its lease ends.
_SEND_WITHIN_S = LEASE_S - 10.0
_SETTLE_WITHIN_S = LEASE_S - 5.0
_SETTLE_AGAIN_S = 0.5
# After a stop: for what is on its way just now, and then for giving back the rest.
_LAST_WORDS_S = 2.0
_GIVE_BACK_S = 1.0

# Sends a message: the command, whether it is kept for who is away, and its name.
Send = Callable[[Command, bool, str], Awaitable[Sent]]


class Firing:
    """Sends jobs.

    Args:
        schedule: where they are.
        send: see :data:`Send`; raises ``CallRefused`` and ``BackendUnavailable``.
        is_open: whether this node takes part just now.
        quiet_s: it does so only after it could for so long: after a restart clients are to be back first.
        look_s: the longest time between two looks for jobs that are due.

    Attributes:
        fired: jobs that were sent.
        failed: attempts that failed, and jobs that were dropped.
        waiting: how many jobs the cluster has, as of the last look.
    """

    def __init__(
        self,
        schedule: Schedule,
        send: Send,
        *,
        is_open: Callable[[], bool] = lambda: True,
        quiet_s: float = 3.0,
        look_s: float = _LOOK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._schedule = schedule
        self._send = send
        self._is_open = is_open
        self._quiet_s = quiet_s
        self._look_s = look_s
        self._clock = clock
        self._open_s: float | None = None
        self._is_well = True
        self._under_way: dict[asyncio.Task[None], Claim] = {}
        self.fired = 0
        self.failed = 0
        self.waiting = 0

    async def run(self) -> None:
        """Send what is due until cancelled; then give back what has not been sent."""
        try:
            while True:
                await asyncio.sleep(await self._look())
                if len(self._under_way) >= IN_WORK:
                    await self._have_room()
        finally:
            await self._leave()

    async def _have_room(self) -> None:
        # Half of it: one script for ten jobs costs as much as for one.
        while len(self._under_way) > IN_WORK // 2:
            await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)  # each ends: see _carry_out

    async def _look(self) -> float:
        """Begin with what is due; return how long to wait before the next look."""
        longest_s = self._look_s * random.uniform(0.8, 1.2)
        if not self._takes_part():
            return min(longest_s, 0.25)
        try:
            asked_s = self._clock()
            claims = await self._schedule.claim(IN_WORK - len(self._under_way))
        except (BackendUnavailable, OSError) as e:
            self._note_trouble(f"the jobs cannot be read: {e}")
            return longest_s
        self.waiting = claims.waiting
        for claim in claims.jobs:
            task = asyncio.create_task(self._carry_out(claim, asked_s), name="job")
            self._under_way[task] = claim
            task.add_done_callback(self._under_way.pop)
        if claims.is_more:
            return _REST_S
        return longest_s if claims.soonest_s is None else min(longest_s, max(_REST_S, claims.soonest_s))

    def _takes_part(self) -> bool:
        if not self._is_open():
            self._open_s = None
            return False
        if self._open_s is None:
            self._open_s = self._clock()
        return self._clock() - self._open_s >= self._quiet_s

    # One job

    async def _carry_out(self, claim: Claim, asked_s: float) -> None:
        try:
            if claim.command is None or claim.is_over:
                await self._drop(claim, claim.fault)
            elif self._clock() - asked_s < _SEND_WITHIN_S:  # else this process has slept; it is another's by now
                async with asyncio.timeout(_SEND_WITHIN_S):
                    await self._send(claim.command, claim.command.keep, claim.message)
                self.fired += 1
                await self._settle(claim, asked_s)
                self._is_well = True
        except CallRefused as e:
            await self._drop(claim, e.message)
        except (BackendUnavailable, OSError) as e:
            self.failed += 1
            self._note_trouble(f"a job cannot be sent: {e or type(e).__name__}")
            with contextlib.suppress(BackendUnavailable, OSError):
                await self._schedule.put_off(claim, has_failed=True)
        except Exception:
            # A bug that one job meets must not end the others.
            self.failed += 1
            log.exception("job %s met a bug", claim.id)
            with contextlib.suppress(BackendUnavailable, OSError):
                await self._schedule.put_off(claim, has_failed=True)

    async def _settle(self, claim: Claim, asked_s: float) -> None:
        """It has been sent: say so for as long as it is ours."""
        while True:
            try:
                await self._schedule.settle(claim)
                return
            except (BackendUnavailable, OSError) as e:
                self._note_trouble(f"a job was sent, which cannot be noted: {e}")
                if self._clock() - asked_s > _SETTLE_WITHIN_S:
                    return
                await asyncio.sleep(_SETTLE_AGAIN_S)

    async def _drop(self, claim: Claim, why: str) -> None:
        if why:
            self.failed += 1
            log.warning("job %s is dropped: %s", claim.id, why)
        with contextlib.suppress(BackendUnavailable, OSError):  # else whoever claims it next does
            await self._schedule.drop(claim)

    def _note_trouble(self, what: str) -> None:
        if self._is_well:
            log.warning("jobs: %s; trying again", what)
        self._is_well = False

    # The end

    async def _leave(self) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=_LAST_WORDS_S)
        left = dict(self._under_way)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
            with contextlib.suppress(BackendUnavailable, OSError):
                async with asyncio.timeout(_GIVE_BACK_S):
                    for claim in left.values():
                        await self._schedule.put_off(claim, has_failed=False)
