"""The simulated market keeps what a real one keeps, whatever is asked of it."""

from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.feed.replay import Tick
from quotepush.feed.simulate import DAY_MS, Market

START_MS = 1_800_000_000_000
STATIC = {"name", "prev_close", "status", "phase"}
TRADED = {"last", "open", "high", "low", "volume", "amount", "bid", "bid_size", "ask", "ask_size"}

# Calls of a market: how many milliseconds later, how many ticks.
calls = st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 60)), max_size=40)


class Rows:
    """Rows as a receiver merges them; remembers the day totals that may only rise."""

    def __init__(self) -> None:
        self.rows: dict[str, Tick] = {}

    def merge(self, code: str, tick: Tick) -> tuple[Tick, Tick]:
        """Return the row before and after; before is empty if the tick replaces the row."""
        before: dict[str, Any] = {} if tick.get("reset") else self.rows.get(code, {})
        after = {**before, **tick}
        after = {name: value for name, value in after.items() if value is not None and name != "reset"}
        self.rows[code] = after
        return before, after


def half_up(price: float, factor: str) -> float:
    exact = Decimal(str(price)) * Decimal(factor)
    return float(exact.quantize(Decimal("0.01"), ROUND_HALF_UP))


def assert_plausible(code: str, before: Tick, row: Tick) -> None:
    prices = [row[name] for name in ("last", "open", "high", "low", "bid", "ask", "prev_close") if name in row]
    levels = [level for side in ("bids", "asks") for level in row.get(side, ())]
    prices += [price for price, _ in levels]
    assert all(price > 0 and round(price, 2) == price for price in prices)
    if "last" in row:
        assert row["low"] <= row["last"] <= row["high"]
        assert row["low"] <= row["open"] <= row["high"]
        assert row["volume"] >= before.get("volume", 0)
        assert row["amount"] >= before.get("amount", 0)
    if "bid" in row and "ask" in row:
        assert row["bid"] < row["ask"]
    if code.endswith((".SH", ".SZ")):
        growth = code.startswith(("688", "689", "300", "301", "302"))
        assert row["limit_up"] == half_up(row["prev_close"], "1.2" if growth else "1.1")
        assert row["limit_down"] == half_up(row["prev_close"], "0.8" if growth else "0.9")
        assert all(row["limit_down"] <= price <= row["limit_up"] for price in prices)
        assert row.get("volume", 0) % 100 == row.get("last_size", 0) % 100 == 0
        assert ("bid" in row) == (row["status"] not in ("limit_down", "halted"))
        assert ("ask" in row) == (row["status"] not in ("limit_up", "halted"))
    for name in ("volume", "last_size", "bid_size", "ask_size"):
        assert row.get(name, 0) >= 0 and isinstance(row.get(name, 0), int)
    for side, best, size in (("bids", "bid", "bid_size"), ("asks", "ask", "ask_size")):
        if side in row:
            assert row[side][0] == [row[best], row[size]]
            assert 1 <= len(row[side]) <= 5
            assert row[side] == sorted(row[side], reverse=side == "bids")


@settings(deadline=None, max_examples=60)
@given(codes=st.integers(2, 400), seed=st.integers(0, 2**32), calls=calls)
def test_every_merged_row_is_plausible_over_several_days(codes: int, seed: int, calls: list[tuple[int, int]]):
    market = Market(codes, seed, day_ms=600_000)
    rows, now_ms = Rows(), START_MS
    for step_ms, n in calls:
        now_ms += step_ms
        ticks = market.ticks(now_ms, n)
        assert len(ticks) == n
        for code, tick in ticks:
            assert tick["ts"] == now_ms
            before, after = rows.merge(code, tick)
            assert_plausible(code, before, after)


@settings(deadline=None, max_examples=20)
@given(codes=st.integers(2, 300), seed=st.integers(0, 2**32), calls=calls)
def test_same_seed_and_same_calls_give_the_same_ticks(codes: int, seed: int, calls: list[tuple[int, int]]):
    one, other = Market(codes, seed), Market(codes, seed)
    now_ms = START_MS
    for step_ms, n in calls:
        now_ms += step_ms
        assert one.ticks(now_ms, n) == other.ticks(now_ms, n)


def test_another_seed_gives_other_ticks():
    assert Market(50, 1).ticks(START_MS, 50) != Market(50, 2).ticks(START_MS, 50)


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_first_tick_of_a_code_is_full_and_later_ones_carry_changes(seed: int):
    market, rows = Market(300, seed), Rows()
    partial = 0
    for step in range(300):
        for code, tick in market.ticks(START_MS + 10 * step, 10):
            before, _ = rows.merge(code, tick)
            if not before:
                assert tick.keys() >= STATIC
                assert tick["status"] == "halted" or len(tick.keys() & TRADED) >= len(TRADED) - 2
                assert ("limit_up" in tick) == code.endswith((".SH", ".SZ"))
            elif "name" not in tick:
                partial += 1
                changes = {name: value for name, value in tick.items() if name not in ("bids", "asks")}
                assert len(changes) > 1
                assert all(value != before.get(name) for name, value in changes.items() if name != "ts")
    assert partial > 1000


def test_pinned_codes_tick_every_second_at_the_default_rate_all_day():
    market = Market(3000, 1)
    last_ms = {"600519.SH": START_MS, "AAPL": START_MS}
    market.ticks(START_MS, 10)
    for at in (0.0, 0.25, 0.5, 0.99):
        begin_ms = START_MS + round(at * DAY_MS)
        last_ms = dict.fromkeys(last_ms, begin_ms)
        for now_ms in range(begin_ms, begin_ms + 20_000, 10):
            for code, _ in market.ticks(now_ms, 5):
                if code in last_ms:
                    assert now_ms - last_ms[code] <= 1000
                    last_ms[code] = now_ms
        assert all(begin_ms + 20_000 - ms <= 1000 for ms in last_ms.values())


def test_late_receiver_has_every_full_row_after_one_sweep():
    market = Market(200, 4)
    for step in range(100):
        market.ticks(START_MS + step, 50)

    full = {code for step in range(40) for code, tick in market.ticks(START_MS + 100 + step, 50) if "name" in tick}

    assert full == set(market.codes)


def test_popular_codes_tick_far_more_often_than_rare_ones():
    market = Market(1000, 2)
    market.ticks(START_MS, 2500)  # the opening sweep treats all alike
    counts = dict.fromkeys(market.codes, 0)
    for step in range(1, 100):
        for code, _ in market.ticks(START_MS + 10 * step, 200):
            counts[code] += 1

    popular = sum(counts[code] for code in market.codes[:20])
    rare = sum(counts[code] for code in market.codes[-20:])
    assert popular > 5 * rare


def test_some_codes_meet_their_limit_and_lose_one_side_of_the_book():
    market, rows = Market(400, 11), Rows()
    statuses = set()
    for minute in range(0, 240, 2):
        for code, tick in market.ticks(START_MS + minute * 60_000, 1000):
            before, after = rows.merge(code, tick)
            statuses.add(after["status"])
            if after["status"] != "trading":
                assert_plausible(code, before, after)

    assert statuses & {"limit_up", "limit_down"}


def test_a_few_codes_are_halted_and_have_no_prices_of_the_day():
    opening = Market(3000, 1).ticks(START_MS, 6010)

    halted = [tick for _, tick in opening if tick.get("status") == "halted"]
    assert 0 < len(halted) < 30
    assert all(tick["name"] and tick["prev_close"] > 0 and not tick.keys() & TRADED for tick in halted)


def test_a_new_day_replaces_rows_and_starts_from_the_last_price():
    market, rows = Market(2, 1, day_ms=60_000), Rows()
    for step in range(100):
        for code, tick in market.ticks(START_MS + 500 * step, 4):
            rows.merge(code, tick)
    closed = {code: row["last"] for code, row in rows.rows.items()}

    opening = dict(reversed(market.ticks(START_MS + 60_000, 2)))

    for code, tick in opening.items():
        assert tick["reset"] is True
        assert tick["prev_close"] == closed[code]


def test_lunch_stops_a_share_trades_and_not_us_ones():
    market = Market(2, 1)
    market.ticks(START_MS, 10)

    lunch = [one for step in range(50) for one in market.ticks(START_MS + DAY_MS // 2 + 100 * step, 6)]

    assert {tick["phase"] for code, tick in lunch if "phase" in tick and code == "600519.SH"} == {"break"}
    assert {tick["phase"] for code, tick in lunch if "phase" in tick and code == "AAPL"} == {"regular"}
    assert len({tick["volume"] for code, tick in lunch if "volume" in tick and code == "600519.SH"}) <= 1
    assert len({tick["volume"] for code, tick in lunch if "volume" in tick and code == "AAPL"}) > 10


def test_a_day_is_busy_at_both_ends_and_calm_at_lunch_with_a_mean_of_one():
    market = Market(2, 1)
    market.ticks(START_MS, 1)

    def mean_activity(begin: float, end: float) -> float:
        moments = range(START_MS + round(begin * DAY_MS), START_MS + round(end * DAY_MS), 250)
        return sum(market.activity(ms) for ms in moments) / len(moments)

    assert mean_activity(0, 0.02) > 1.4
    assert mean_activity(0.98, 1) > 1.3
    assert mean_activity(0.49, 0.51) < 0.8
    assert 0.97 < mean_activity(0, 1) < 1.03
