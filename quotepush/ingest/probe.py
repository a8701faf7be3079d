"""Is the feed link alive, and how far behind is it?

A PING goes out on the very connection that the ticks come in on, so its answer stands
behind every tick that Redis had for us: the time it takes is the lag of the whole way.
Redis clients' own health checks send a PING too, but do not notice a missing answer.
"""

import math

__all__ = ["LinkProbe"]


class LinkProbe:
    """Counts the time of one connection. Pure: the clock is an argument.

    Args:
        timeout_s: an answer that is not there after so long means that the link is dead, unless anything else
            has come on it meanwhile: then the answer stands behind ticks that we have yet to take.

    Attributes:
        lag_s: what the last answered probe took.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._sent: dict[bytes, float] = {}
        self._count = 0
        self._heard_s = -math.inf
        self.lag_s = 0.0

    def next(self, now_s: float) -> bytes:
        """Return the text of the probe to send now."""
        self._count += 1
        token = b"probe-%d" % self._count
        self._sent[token] = now_s
        return token

    def heard(self, now_s: float) -> None:  # hot
        """Something has come."""
        self._heard_s = now_s

    def answered(self, token: bytes, now_s: float) -> None:
        """The answer to ``token`` is here; anything else is ignored."""
        sent = self._sent.pop(token, None)
        if sent is not None:
            self.lag_s = now_s - sent

    def waiting_s(self, now_s: float) -> float:
        """Return how long the oldest probe has been waiting; 0 when none is."""
        return now_s - min(self._sent.values()) if self._sent else 0.0

    def is_dead(self, now_s: float) -> bool:
        """Say whether an answer is overdue and nothing else comes either."""
        return self.waiting_s(now_s) >= self._timeout_s and now_s - self._heard_s >= self._timeout_s
