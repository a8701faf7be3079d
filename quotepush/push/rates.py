"""How often one address may ask: a bucket of tokens for each, filled again as time goes by.

Law: whoever keeps to the rate is never told to wait; memory is bounded, whoever asks: of more addresses than fit, the
one that has been quiet for longest is forgotten, which does it no harm.
"""

__all__ = ["BURST_S", "Rates"]

# After a pause as many may come at once as in so long a time.
BURST_S = 10.0
_MOST_KEYS = 20_000


class Rates:
    """What each address has used up.

    Args:
        per_s: how often each may ask; 0: as often as it likes.
        most_keys: addresses that are remembered.
    """

    def __init__(self, per_s: float, most_keys: int = _MOST_KEYS) -> None:
        self._each_s = 1 / per_s if per_s else 0.0
        self._burst_s = max(BURST_S, self._each_s)
        self._most_keys = most_keys
        # When its bucket is full again; whoever asked last stands last. A full one need not be remembered.
        self._full_at_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._full_at_s)

    def wait_s(self, key: str, now_s: float) -> float:
        """Return how long this address has to wait; 0: it may ask now."""
        used_s = self._full_at_s.get(key, now_s) - now_s
        # The last bits of a sum of seconds are nobody's fault.
        wait_s = max(0.0, used_s) + self._each_s - self._burst_s
        return wait_s if wait_s > 1e-6 else 0.0

    def charge(self, key: str, now_s: float, times: int = 1) -> None:
        """It has asked, as often as ``times`` says."""
        if not key or not self._each_s:
            return  # nobody knows who it is, or nobody counts
        full_at_s = self._full_at_s
        before_s = full_at_s.pop(key, now_s)
        full_at_s[key] = max(before_s, now_s) + times * self._each_s
        for _ in range(2):  # one comes in, up to two go: what is over drains away without a sweep
            oldest = next(iter(full_at_s))
            if full_at_s[oldest] > now_s and len(full_at_s) <= self._most_keys:
                break
            del full_at_s[oldest]
