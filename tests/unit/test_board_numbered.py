"""The board and the ticks of the log: numbers that come from outside, rows that somebody else has kept, and both kinds
of ticks for one code in any order."""

from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quotepush.quote.board import GAP, NEW_EPOCH, Board, Quote, TradingDays

NOW_MS = 1_800_000_000_000


def make_board(**options: Any) -> Board:
    board = Board(**{"epoch": "main", "days": TradingDays({}), **options})
    board.log_epoch = "E"
    return board


def plain(board: Board, code: str, **tick: Any) -> Quote | None:
    return board.apply(code, orjson.dumps(tick), NOW_MS)


def logged(board: Board, code: str, seq: int, /, **tick: Any) -> Quote | None:
    return board.apply_numbered(code, seq, tick, NOW_MS)


def told(quote: Quote | None) -> tuple[str, int, int] | None:
    """What the relay is told by a quote; as the relay, note that it was."""
    if quote is None:
        return None
    restated, quote.restated = quote.restated, 0
    assert orjson.loads(quote.encoded())["seq"] == quote.seq
    return quote.epoch, quote.seq, restated


def shown(board: Board, code: str) -> dict[str, Any]:
    row = orjson.loads(board.quotes[code].encoded())
    return {k: v for k, v in row.items() if k not in ("code", "seq", "ts")}


# Ticks of the log


def test_a_first_tick_of_the_log_begins_the_epoch_of_the_log() -> None:
    board = make_board()
    assert told(logged(board, "A", 41, last=1)) == ("E", 41, NEW_EPOCH)
    assert told(logged(board, "A", 42, last=2)) == ("E", 42, 0)
    assert board.seq("A") == 42
    assert board.accepted == 2


def test_a_tick_that_is_known_already_is_not_taken_again() -> None:
    board = make_board()
    logged(board, "A", 5, last=1)
    assert logged(board, "A", 5, last=2) is None
    assert logged(board, "A", 4, last=3) is None
    assert (shown(board, "A"), board.accepted) == ({"last": 1}, 1)


def test_a_missing_number_is_a_gap_and_the_next_one_is_not() -> None:
    board = make_board()
    told(logged(board, "A", 1, last=1))
    assert told(logged(board, "A", 3, last=3)) == ("E", 3, GAP)
    assert told(logged(board, "A", 4, last=4)) == ("E", 4, 0)


def test_a_gap_says_more_than_a_new_epoch_and_stays_until_it_was_told() -> None:
    board = make_board()
    logged(board, "A", 1, last=1)
    logged(board, "A", 3, last=3)
    assert told(logged(board, "A", 4, last=4)) == ("E", 4, GAP)


def test_a_tick_without_news_is_told_only_when_the_row_is_restated() -> None:
    board = make_board()
    assert told(logged(board, "A", 1, last=1)) == ("E", 1, NEW_EPOCH)
    assert logged(board, "A", 2, last=1) is None
    assert told(logged(board, "A", 4, last=1)) == ("E", 4, GAP)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"last": -1}, "negative"), ({"last": "1"}, "wrong_type"), ({"ts": -1}, "wrong_type"),
        ({"note": "x" * 9000}, "too_large"),
    ],
)  # fmt: skip
def test_a_refused_tick_of_the_log_leaves_no_false_gap(bad: dict[str, Any], reason: str) -> None:
    board = make_board()
    told(logged(board, "A", 1, last=1))
    assert logged(board, "A", 2, **bad) is None
    assert (board.refused[reason], board.seq("A"), shown(board, "A")) == (1, 2, {"last": 1})
    assert orjson.loads(board.quotes["A"].encoded())["seq"] == 2  # whoever subscribes now goes on behind it
    assert told(logged(board, "A", 3, last=3)) == ("E", 3, 0)


def test_a_row_that_is_too_large_is_refused_as_a_tick_is() -> None:
    board = make_board(max_row_bytes=1000)
    told(logged(board, "A", 1, a="x" * 500))
    assert logged(board, "A", 2, b="x" * 500) is None
    assert board.refused["row_too_large"] == 1
    assert told(logged(board, "A", 3, a="y")) == ("E", 3, 0)


def test_a_refused_tick_behind_a_gap_still_says_that_rows_were_lost() -> None:
    board = make_board()
    told(logged(board, "A", 1, last=1))
    assert told(logged(board, "A", 3, last=-1)) == ("E", 3, GAP)


@pytest.mark.parametrize("tick", [{"last": -1}, {"a": "x" * 2000}])
def test_a_code_whose_first_tick_is_refused_is_not_there(tick: dict[str, Any]) -> None:
    board = make_board(max_row_bytes=1000)
    assert logged(board, "A", 1, **tick) is None
    assert board.quotes == {}
    assert told(logged(board, "A", 2, last=1)) == ("E", 2, NEW_EPOCH)


def test_a_full_board_refuses_new_codes_of_the_log() -> None:
    board = make_board(max_codes=1)
    logged(board, "A", 1, last=1)
    assert logged(board, "B", 1, last=1) is None
    assert board.restate("B", "E", 1, {"last": 1}, NOW_MS, GAP) is None
    assert board.refused == {"board_full": 2}


def test_an_older_tick_of_the_log_is_refused_where_that_is_wanted() -> None:
    board = make_board(drop_older=True)
    told(logged(board, "A", 1, ts=NOW_MS, last=1))
    assert logged(board, "A", 2, ts=NOW_MS - 1, last=2) is None
    assert told(logged(board, "A", 3, ts=NOW_MS, last=3)) == ("E", 3, 0)


def test_a_tick_of_the_log_without_a_time_has_the_one_of_redis() -> None:
    board = make_board()
    board.apply_numbered("A", 1, {"last": 1}, NOW_MS, NOW_MS - 5)
    assert (board.quotes["A"].ts, board.quotes["A"].arrived_ms, board.newest_ms) == (NOW_MS - 5, NOW_MS, NOW_MS)
    board.apply_numbered("A", 2, {"last": 2, "ts": 7}, NOW_MS, NOW_MS - 5)
    assert board.quotes["A"].ts == 7


def test_fields_that_the_server_sets_are_ignored() -> None:
    board = make_board()
    logged(board, "A", 1, last=2, prev_close=1, seq=9, prev=8, epoch="X", change=7, change_pct=7, code="B")
    assert shown(board, "A") == {"last": 2, "prev_close": 1, "change": 1, "change_pct": 100}
    assert told(board.quotes["A"]) == ("E", 1, NEW_EPOCH)


# Both kinds of ticks for one code


def test_a_code_that_goes_over_to_the_log_keeps_its_fields_and_is_numbered_anew() -> None:
    board = make_board()
    plain(board, "A", last=1, name="Ay")
    plain(board, "A", last=2)
    assert told(logged(board, "A", 1, last=3)) == ("E", 1, NEW_EPOCH)
    assert shown(board, "A") == {"last": 3, "name": "Ay"}


def test_a_code_that_comes_back_to_plain_ticks_gets_an_epoch_that_never_was() -> None:
    board = make_board()
    epochs = set()
    for seq in range(1, 4):
        epochs.add(told(plain(board, "A", last=seq))[0])  # type: ignore[index]
        told(logged(board, "A", seq, last=seq + 0.5))
    assert len(epochs) == 3
    assert "E" not in epochs


def test_a_tick_of_the_log_from_before_a_plain_one_is_not_taken_again() -> None:
    board = make_board()
    logged(board, "A", 10, last=1)
    plain(board, "A", last=2)
    assert logged(board, "A", 9, last=0) is None
    assert logged(board, "A", 10, last=1) is None
    assert board.restate("A", "E", 10, {"last": 1}, NOW_MS, GAP) is None
    assert shown(board, "A") == {"last": 2}
    assert told(logged(board, "A", 11, last=3)) == ("E", 11, NEW_EPOCH)


def test_another_life_of_the_log_may_number_from_the_begin() -> None:
    board = make_board()
    logged(board, "A", 10, last=1)
    plain(board, "A", last=2)
    board.log_epoch = "F"
    assert told(logged(board, "A", 1, last=3)) == ("F", 1, NEW_EPOCH)


def test_a_code_that_nobody_watches_is_restated_all_the_same() -> None:
    board = make_board(watched=set())
    assert told(logged(board, "A", 1, last=1)) == ("E", 1, NEW_EPOCH)
    assert plain(board, "A", last=2) is None
    assert shown(board, "A") == {"last": 2}
    assert told(logged(board, "A", 2, volume=1)) == ("E", 2, NEW_EPOCH)
    assert shown(board, "A") == {"last": 2, "volume": 1}


def test_a_copy_of_a_tick_of_the_log_is_ignored() -> None:
    board = make_board()
    logged(board, "A", 1, last=1)
    assert plain(board, "A", epoch="E", seq=1, last=1) is None
    assert plain(board, "A", epoch="E", seq=2, last=2) is None
    assert (board.copies, board.seq("A"), shown(board, "A")) == (2, 1, {"last": 1})
    assert told(logged(board, "A", 2, last=2)) == ("E", 2, NEW_EPOCH)  # not told before


def test_a_code_that_has_expired_is_not_numbered_as_it_was() -> None:
    board = make_board()
    for last in range(5):
        plain(board, "A", last=last)
    logged(board, "A", 1, last=9)
    plain(board, "A", last=10)
    assert board.expire(NOW_MS + 1) == 1
    assert told(plain(board, "A", last=11)) == ("main", 6, 0)


# Rows that somebody else has kept


def test_a_restated_row_replaces_the_whole_row() -> None:
    board = make_board()
    logged(board, "A", 1, last=1, high=5, bids=[[1, 1]])
    told(board.quotes["A"])
    quote = board.restate("A", "E", 9, {"last": 3, "prev_close": 2, "asks": [[4, 1]]}, NOW_MS + 5, GAP)
    assert told(quote) == ("E", 9, GAP)
    assert shown(board, "A") == {"last": 3, "prev_close": 2, "change": 1, "change_pct": 50}
    assert board.quotes["A"].book == {"asks": [[4, 1]]}
    assert (board.quotes["A"].ts, board.quotes["A"].arrived_ms) == (NOW_MS + 5, NOW_MS + 5)
    assert told(logged(board, "A", 10, last=4)) == ("E", 10, 0)


def test_a_row_that_is_not_newer_is_not_restated() -> None:
    board = make_board()
    told(logged(board, "A", 5, last=1))
    assert board.restate("A", "E", 5, {"last": 2}, NOW_MS, GAP) is None
    assert board.restate("A", "E", 4, {"last": 2}, NOW_MS, GAP) is None
    assert (shown(board, "A"), board.quotes["A"].restated) == ({"last": 1}, 0)


def test_a_row_of_another_epoch_is_restated_whatever_its_number() -> None:
    board = make_board()
    told(logged(board, "A", 5, last=1))
    board.log_epoch = "F"
    assert told(board.restate("A", "F", 2, {"last": 2}, NOW_MS, NEW_EPOCH)) == ("F", 2, NEW_EPOCH)


def test_a_row_that_is_restated_replaces_a_tick_that_waits_to_be_merged() -> None:
    board = make_board(watched=set())
    plain(board, "A", last=1, name="Ay")
    board.restate("A", "E", 1, {"last": 2}, NOW_MS, NEW_EPOCH)
    assert shown(board, "A") == {"last": 2}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"last": -1}, "negative"), ({"name": 1}, "wrong_type"), ({"x": "y" * 2000}, "row_too_large")],
)
def test_a_bad_row_is_refused_and_changes_nothing(fields: dict[str, Any], reason: str) -> None:
    board = make_board(max_row_bytes=1000)
    told(logged(board, "A", 1, last=1))
    assert board.restate("A", "E", 9, fields, NOW_MS, GAP) is None
    assert board.restate("B", "E", 9, dict(fields), NOW_MS, GAP) is None
    assert (board.refused, shown(board, "A")) == ({reason: 2}, {"last": 1})
    assert (board.seq("A"), list(board.quotes)) == (1, ["A"])


def test_a_row_that_is_nested_too_deep_is_refused() -> None:
    board = make_board()
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    assert board.restate("A", "E", 1, {"x": deep}, NOW_MS, GAP) is None
    assert logged(board, "A", 1, x=deep) is None
    assert (board.refused, board.quotes) == ({"too_deep": 2}, {})


# Any order of all of it


class MixedMachine(RuleBasedStateMachine):
    """One board, a log that is told to it late, doubled and with holes, plain ticks in between, beside a model.

    The model is what a client may conclude from what it is told: numbers only rise within an epoch, a row whose number
    is not the next is restated, and whatever was told last is the row that there is.
    """

    codes = ("A", "B")

    def __init__(self) -> None:
        super().__init__()
        self.board = make_board(max_tick_bytes=200)
        self.life = 0
        self.log: list[tuple[str, int, dict[str, Any]]] = []  # every tick of this life
        self.seqs = dict.fromkeys(self.codes, 0)
        self.kept: dict[str, dict[str, Any]] = {code: {} for code in self.codes}  # as publishers keep rows
        self.at = 0  # up to where the log was told
        self.price = 0
        self.newest: dict[str, float] = {}
        self.highest: dict[tuple[str, str], int] = {}  # code and epoch
        self.place: dict[str, tuple[str, int]] = {}

    def next_price(self) -> float:
        self.price += 1
        return float(self.price)

    def hear(self, code: str, quote: Quote | None) -> None:
        """Follow what the board tells, as a client does."""
        if quote is None:
            return
        assert quote is self.board.quotes[code]
        heard = told(quote)
        assert heard is not None
        epoch, seq, restated = heard
        assert seq > self.highest.get((code, epoch), 0), "a number came twice"
        before = self.place.get(code)
        if not restated:
            assert (before or ("main", 0))[0] == epoch, "a new epoch that was not announced"
            if epoch.startswith("E"):
                assert before is not None
                lost = [n for c, n, tick in self.log if c == code and before[1] < n < seq and tick["last"] >= 0]
                assert not lost, "a hole that was not announced"
        self.highest[code, epoch] = seq
        self.place[code] = epoch, seq
        if code in self.newest:
            assert shown(self.board, code).get("last") == self.newest[code]

    @rule(code=st.sampled_from(codes))
    def plain_tick(self, code: str) -> None:
        self.newest[code] = self.next_price()
        self.hear(code, plain(self.board, code, last=self.newest[code]))

    @rule(code=st.sampled_from(codes), is_bad=st.booleans())
    def publish(self, code: str, is_bad: bool) -> None:
        """A publisher of any make writes a tick; nobody has told us yet."""
        self.seqs[code] += 1
        tick = {"last": -1.0 if is_bad else self.next_price()}
        self.log.append((code, self.seqs[code], tick))
        if not is_bad:
            self.kept[code] = dict(tick)

    @precondition(lambda self: self.at < len(self.log))
    @rule(count=st.integers(1, 4))
    def hear_of_the_log(self, count: int) -> None:
        for code, seq, tick in self.log[self.at : self.at + count]:
            if tick["last"] >= 0 and not self.is_known(code, seq):
                self.newest[code] = tick["last"]
            self.hear(code, logged(self.board, code, seq, **tick))
        self.at = min(len(self.log), self.at + count)

    def is_known(self, code: str, seq: int) -> bool:
        return seq <= self.highest.get((code, self.board.log_epoch), 0)

    @precondition(lambda self: self.log)
    @rule(back=st.integers(0, 5))
    def hear_of_it_again(self, back: int) -> None:
        for code, seq, tick in self.log[max(0, self.at - back) : self.at]:
            if tick["last"] >= 0:
                assert logged(self.board, code, seq, **tick) is None

    @precondition(lambda self: self.at < len(self.log))
    @rule()
    def the_log_is_too_short(self) -> None:
        """Everything that we have not heard of is gone; the rows are read instead."""
        self.at = len(self.log)
        for code in self.codes:
            seq = self.seqs[code]
            if not self.kept[code] or self.is_known(code, seq):
                continue
            quote = self.board.restate(code, self.board.log_epoch, seq, dict(self.kept[code]), NOW_MS, GAP)
            if quote is not None:
                self.newest[code] = self.kept[code]["last"]
                assert quote.restated == GAP
                self.hear(code, quote)

    @rule()
    def the_log_begins_another_life(self) -> None:
        self.life += 1
        self.board.log_epoch = f"E{self.life}"
        self.log, self.at = [], 0
        self.seqs = dict.fromkeys(self.codes, 0)
        self.kept = {code: {} for code in self.codes}

    @precondition(lambda self: self.board.quotes)
    @rule()
    def expire(self) -> None:
        # Of a log that nobody has told us of for ten days nothing comes again.
        self.hear_of_the_log(len(self.log))
        self.log, self.at = [], 0
        self.board.expire(NOW_MS + 1)
        self.newest.clear()
        for code in self.codes:
            self.place[code] = "main", 0

    @invariant()
    def rows_say_what_was_published_last(self) -> None:
        for code, last in self.newest.items():
            quote = self.board.quotes[code]
            row = orjson.loads(quote.encoded())
            assert (row.get("last"), row["seq"]) == (last, quote.seq)


TestAnyOrder = MixedMachine.TestCase
TestAnyOrder.settings = settings(deadline=None, derandomize=True, max_examples=200, stateful_step_count=40)
