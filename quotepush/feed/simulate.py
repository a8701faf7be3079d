"""A made-up market day: pure, deterministic, and plausible enough to look at.

Every row that a receiver merges from these ticks keeps what a real one keeps, and nothing here can break it:
``low <= last <= high``, day totals that only rise, ``bid < ask``, prices on the grid of 0.01 and inside
``limit_down`` to ``limit_up``, sizes in lots. Time comes in as an argument; nothing here waits or looks at a clock.

The first call opens the first day. Days follow each other without a night; a new one replaces each row
(``"reset": true``). A price is a random walk whose spread grows with the square root of the time that has passed, so
more ticks a second make a finer walk, not a wilder one.
"""

import math
import random
from itertools import accumulate

from quotepush.feed.listing import PINNED, Listed, listed
from quotepush.feed.replay import Tick

__all__ = ["DAY_MS", "Market"]

DAY_MS = 4 * 3_600_000
"""Length of a simulated day: the four hours that A-shares trade."""

_PINNED_EVERY_MS = 500  # half of the promised second, for callers that come a little late
_LUNCH = (0.48, 0.52)  # of the day; A-shares pause, the others slow down
_BURST_SLOT_MS = 250
_SWEEP_EVERY = 8  # every eighth tick is a full one of the next code in turn …
_OPENING_SWEEP_EVERY = 2  # … and every second one until all codes have been seen that day
_NOISE_BITS, _SIZE_BITS = 12, 6
_NOISE_MASK, _SIZE_MASK = (1 << _NOISE_BITS) - 1, (1 << _SIZE_BITS) - 1
_LEVELS = 5
_QUOTE_LOT = 100
_MAX_CALM_MS = 60_000  # a rare code's walk does not jump by more than a minute's worth


class Market:
    """All instruments of one simulated market.

    Args:
        codes: how many, 2 to 100,000; `PINNED` are always among them.
        seed: the same seed and the same calls give the same ticks.
        day_ms: length of a day.

    3,000 codes made 200,000 to 350,000 ticks a second on one x86-64 core with CPython 3.11.
    """

    def __init__(self, codes: int, seed: int, *, day_ms: int = DAY_MS) -> None:
        self._rng = random.Random(f"market {seed}")
        self._seed = seed
        self._day_ms = day_ms
        self._opened_at_ms: int | None = None
        self._day = -1
        self._noise = [self._rng.gauss(0, 1) for _ in range(1 << _NOISE_BITS)]
        self._lots = [max(1, round(self._rng.lognormvariate(1.2, 1.1))) for _ in range(1 << _SIZE_BITS)]
        listing = listed(codes, seed)
        self._instruments = [_Instrument(one, rank, self._rng, len(PINNED)) for rank, one in enumerate(listing)]
        self._pinned = self._instruments[: len(PINNED)]
        self._active = [one for one in self._instruments if not one.halted]
        self._cum_weights = list(accumulate(1 / (one.rank + 3) ** 0.9 for one in self._active))
        self._swept = 0
        self._turn = 0
        self._burst: _Instrument | None = None
        self._burst_left = 0
        self._mean_shape = sum(_shape(n / 1000) for n in range(1000)) / 1000

    @property
    def codes(self) -> list[str]:
        """All codes, the most traded first."""
        return [one.listed.code for one in self._instruments]

    def activity(self, now_ms: int) -> float:
        """Return how busy the market is now, 1.0 being the day's mean: about 1.7 at the open, 0.5 at lunch.

        One quarter of a second in sixteen, drawn by the seed, is a burst of three times as much.
        """
        opened_at_ms = now_ms if self._opened_at_ms is None else self._opened_at_ms
        slot = now_ms // _BURST_SLOT_MS
        is_burst = (slot * 2_654_435_761 + self._seed * 40_503 >> 7) & 15 == 0
        # 13/15 for fifteen slots and 3 for one keep the mean at 1.
        return (
            _shape((now_ms - opened_at_ms) % self._day_ms / self._day_ms)
            / self._mean_shape
            * (3 if is_burst else 13 / 15)
        )

    def ticks(self, now_ms: int, n: int) -> list[tuple[str, Tick]]:
        """Return the next ``n`` ticks, all of the time ``now_ms``, as pairs of code and fields.

        A code's first tick of a day has every field; later ones have the fields that changed, and now and then
        every field again. A field that went away (no seller at the upper limit) is None once. Each of `PINNED` is
        among the ticks at the latest a second after its last one if the calls come at least every half second.
        """
        if self._opened_at_ms is None:
            self._opened_at_ms = now_ms
        day, in_day_ms = divmod(max(now_ms - self._opened_at_ms, 0), self._day_ms)
        if day > self._day:
            self._day = day
            self._swept = 0
        at = in_day_ms / self._day_ms
        is_lunch = _LUNCH[0] <= at < _LUNCH[1]
        rng, noise, lots = self._rng, self._noise, self._lots
        getrandbits = rng.getrandbits
        sweep_every = _SWEEP_EVERY if self._swept >= len(self._instruments) else _OPENING_SWEEP_EVERY

        found: list[tuple[str, Tick]] = []
        for one in self._pinned:
            if now_ms - one.ticked_at_ms >= _PINNED_EVERY_MS and len(found) < n:
                found.append((one.listed.code, one.tick(now_ms, self._day, is_lunch, getrandbits(48), noise, lots)))
        picks = iter(rng.choices(self._active, cum_weights=self._cum_weights, k=max(n - len(found), 0)))
        while len(found) < n:
            self._turn += 1
            bits = getrandbits(48)
            is_full = self._turn % sweep_every == 0
            if is_full:
                one = self._instruments[self._swept % len(self._instruments)]
                self._swept += 1
            elif self._burst_left and self._burst is not None:
                one = self._burst
                self._burst_left -= 1
            else:
                one = next(picks)
                if bits >> 43 == 0:  # one pick in 32 is a burst: a large order that eats several smaller ones
                    self._burst, self._burst_left = one, 2 + (bits >> 40 & 7)
            found.append((one.listed.code, one.tick(now_ms, self._day, is_lunch, bits, noise, lots, is_full)))
        return found


class _Instrument:
    """One code's day. Prices are whole cents inside and become currency on their way out."""

    __slots__ = (
        "amount_cents", "ask", "ask_size", "bid", "bid_size", "day", "down", "fair", "half_spread", "halted",
        "has_book", "high", "is_a_share", "last", "last_size", "listed", "lot", "low", "open", "phase", "prev_close",
        "rank", "sigma", "spread", "status", "ticked_at_ms", "up", "volume", "walked_at_ms",
    )  # fmt: skip

    def __init__(self, listed: Listed, rank: int, rng: random.Random, pinned: int) -> None:
        self.listed = listed
        self.rank = rank
        self.lot = listed.lot
        self.is_a_share = listed.limit_tenths > 0
        # One A-share in 50 is so restless that it meets its limit; about one in 400 does not trade at all.
        restless = self.is_a_share and rank >= pinned and rng.random() < 0.02
        self.halted = self.is_a_share and rank >= 100 and rng.random() < 0.0025
        day_sigma = 0.12 if restless else rng.uniform(0.008, 0.025)
        self.sigma = day_sigma / math.sqrt(DAY_MS)
        self.has_book = rank < 10 or rng.random() < 0.25
        self.day = -1
        self.fair = float(listed.price_cents)
        self.last = self.prev_close = listed.price_cents
        self.open = self.high = self.low = self.last_size = 0
        self.phase = self.status = ""
        self.ticked_at_ms = -_MAX_CALM_MS
        self.walked_at_ms = 0
        self.bid: int | None = None
        self.ask: int | None = None
        self.bid_size: int | None = None
        self.ask_size: int | None = None

    def tick(
        self,
        now_ms: int,
        day: int,
        is_lunch: bool,
        bits: int,
        noise: list[float],
        lots: list[int],
        is_full: bool = False,
    ) -> Tick:
        """Let something happen, and return what changed by it; every field if ``is_full`` or a day begins."""
        self.ticked_at_ms = now_ms
        is_first = day != self.day
        if is_first:
            self._open_day(now_ms, day, bits, noise, lots)
        if self.halted:
            return self._full(now_ms, bits, lots, reset=is_first and day > 0)
        phase = "break" if is_lunch and self.is_a_share else "regular"
        changed: Tick = {"ts": now_ms}
        if phase != self.phase:
            self.phase = changed["phase"] = phase
        if phase == "break":
            self._requote(changed, bits, lots)
        else:
            self._walk(now_ms, bits, noise)
            self._quote(changed, bits, lots)
            # Two ticks in three are trades.
            if (bits >> 12) % 3:
                self._trade(changed, bits, lots)
            elif len(changed) == 1:
                self._requote(changed, bits, lots)
        if is_first or is_full:
            return self._full(now_ms, bits, lots, reset=is_first and day > 0)
        return changed

    def _open_day(self, now_ms: int, day: int, bits: int, noise: list[float], lots: list[int]) -> None:
        prev_close = self.prev_close = self.last
        tenths = self.listed.limit_tenths
        # Rounded half up, in whole cents: prev_close * 1.1 is (11 * prev_close + 5) // 10.
        self.up = (prev_close * (10 + tenths) + 5) // 10 if tenths else 0
        self.down = (prev_close * (10 - tenths) + 5) // 10 if tenths else 1
        self.spread = max(1, round(prev_close * (1.5e-4 if self.rank < 500 else 6e-4)))
        self.half_spread = self.spread / 2
        self.fair = prev_close * (1 + 0.003 * noise[bits & _NOISE_MASK])
        self.day = day
        self.walked_at_ms = now_ms
        self.phase, self.status = "regular", "halted" if self.halted else "trading"
        self.bid = self.ask = self.bid_size = self.ask_size = None
        self.volume = self.amount_cents = 0
        if self.halted:
            return
        self._walk(now_ms, bits, noise)
        self._quote({}, bits, lots)
        opened = self.bid if self.bid is not None else self.ask
        assert opened is not None
        self.open = self.high = self.low = self.last = opened
        # The opening auction has traded already; popular codes more of it.
        self.last_size = self.volume = _QUOTE_LOT * lots[bits >> 20 & _SIZE_MASK] * (1 + 2000 // (self.rank + 5))
        self.amount_cents = self.volume * opened

    # hot
    def _walk(self, now_ms: int, bits: int, noise: list[float]) -> None:
        elapsed_ms = now_ms - self.walked_at_ms
        if elapsed_ms <= 0:
            return
        self.walked_at_ms = now_ms
        if elapsed_ms > _MAX_CALM_MS:
            elapsed_ms = _MAX_CALM_MS
        fair = self.fair * (1 + self.sigma * math.sqrt(elapsed_ms) * noise[bits & _NOISE_MASK])
        beyond = self.spread + 3  # so far past its limit a price may want to be: it comes back sometimes
        if self.up and fair > self.up + beyond:
            fair = self.up + beyond
        if fair < self.down - beyond:
            fair = self.down - beyond
        self.fair = fair

    # hot
    def _quote(self, changed: Tick, bits: int, lots: list[int]) -> None:
        """Set the best prices around the fair one, inside the limits; a side that nobody is on is None."""
        bid: int | None = max(int(self.fair - self.half_spread), self.down)
        ask: int | None = max(int(self.fair - self.half_spread) + self.spread, self.down)
        assert bid is not None and ask is not None
        if ask == self.down and self.up:
            bid = None
        elif bid == ask:  # at the least price of all
            ask += 1
        if self.up and ask > self.up:
            if bid is not None and bid >= self.up:
                bid, ask = self.up, None
            else:
                ask = self.up
        if bid != self.bid:
            self.bid = bid
            size = None if bid is None else _QUOTE_LOT * lots[bits >> 14 & _SIZE_MASK]
            is_resized, self.bid_size = size != self.bid_size, size
            self._tell_bid(changed, bits, lots, True, is_resized)
        if ask != self.ask:
            self.ask = ask
            size = None if ask is None else _QUOTE_LOT * lots[bits >> 20 & _SIZE_MASK]
            is_resized, self.ask_size = size != self.ask_size, size
            self._tell_ask(changed, bits, lots, True, is_resized)
        status = "trading"
        if self.up:
            if self.ask is None:
                status = "limit_up"
            elif self.bid is None:
                status = "limit_down"
        if status != self.status:
            self.status = changed["status"] = status

    # hot
    def _requote(self, changed: Tick, bits: int, lots: list[int]) -> None:
        """Change the size on one side, not the price."""
        if (bits >> 13 & 1 and self.bid is not None) or self.ask is None:
            size = _QUOTE_LOT * lots[bits >> 14 & _SIZE_MASK]
            self.bid_size = size if size != self.bid_size else size + _QUOTE_LOT
            self._tell_bid(changed, bits, lots, False, True)
        else:
            size = _QUOTE_LOT * lots[bits >> 14 & _SIZE_MASK]
            self.ask_size = size if size != self.ask_size else size + _QUOTE_LOT
            self._tell_ask(changed, bits, lots, False, True)

    def _tell_bid(self, changed: Tick, bits: int, lots: list[int], is_moved: bool, is_resized: bool) -> None:
        if is_moved:
            changed["bid"] = None if self.bid is None else self.bid / 100
        if is_resized:
            changed["bid_size"] = self.bid_size
        if self.has_book:
            changed["bids"] = self._levels(self.bid, self.bid_size, -1, bits, lots)

    def _tell_ask(self, changed: Tick, bits: int, lots: list[int], is_moved: bool, is_resized: bool) -> None:
        if is_moved:
            changed["ask"] = None if self.ask is None else self.ask / 100
        if is_resized:
            changed["ask_size"] = self.ask_size
        if self.has_book:
            changed["asks"] = self._levels(self.ask, self.ask_size, 1, bits >> 18, lots)

    # hot
    def _trade(self, changed: Tick, bits: int, lots: list[int]) -> None:
        price = self.ask if bits >> 13 & 1 else self.bid
        if price is None:
            price = self.bid if self.ask is None else self.ask
        assert price is not None
        # One US trade in four is an odd lot.
        lot = self.lot if bits >> 32 & 3 == 0 else _QUOTE_LOT
        size = lot * lots[bits >> 26 & _SIZE_MASK]
        if price != self.last:
            self.last = price
            changed["last"] = price / 100
            if price > self.high:
                self.high = price
                changed["high"] = price / 100
            if price < self.low:
                self.low = price
                changed["low"] = price / 100
        if size != self.last_size:
            self.last_size = changed["last_size"] = size
        self.volume += size
        self.amount_cents += price * size
        changed["volume"] = self.volume
        changed["amount"] = self.amount_cents / 100

    def _levels(
        self, price: int | None, size: int | None, step: int, bits: int, lots: list[int]
    ) -> list[list[float]] | None:
        """Return up to five levels, best first and none beyond a limit; None for a side that nobody is on."""
        if price is None or size is None:
            return None
        levels: list[list[float]] = [[price / 100, size]]
        for n in range(1, _LEVELS):
            price += step
            if price < self.down or (self.up and price > self.up):
                break
            levels.append([price / 100, _QUOTE_LOT * lots[bits >> 3 * n & _SIZE_MASK] * (n + 1)])
        return levels

    def _full(self, now_ms: int, bits: int, lots: list[int], *, reset: bool) -> Tick:
        full: Tick = {"ts": now_ms, "name": self.listed.name, "phase": self.phase, "status": self.status}
        full["prev_close"] = self.prev_close / 100
        if self.up:
            full["limit_up"], full["limit_down"] = self.up / 100, self.down / 100
        if not self.halted:
            full["last"], full["last_size"] = self.last / 100, self.last_size
            full["open"], full["high"], full["low"] = self.open / 100, self.high / 100, self.low / 100
            full["volume"], full["amount"] = self.volume, self.amount_cents / 100
            self._tell_bid(full, bits, lots, True, True)
            self._tell_ask(full, bits, lots, True, True)
        if reset:
            full["reset"] = True
        return full


def _shape(at: float) -> float:
    """Return the unscaled activity at a point 0…1 of the day: a U with a dent at lunch."""
    opening = 0.6 * math.exp(-at / 0.05)
    closing = 0.5 * math.exp(-(1 - at) / 0.05)
    lunch = 0.4 * math.exp(-(((at - sum(_LUNCH) / 2) / 0.03) ** 2))
    return 0.85 + opening + closing - lunch
