"""How the rows of a code go on for a client that resumes or asks for a snapshot.

Changes of options, and rows that are restated, go through the hub: test_options.py and test_restated.py.
"""

from typing import Any

import orjson
import pytest

from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import PLAIN, Row, Subscriptions
from quotepush.push.watchlist import Watchlist
from tests.support.desk import Counter, message_of, only, say, subscribed


def test_who_has_missed_nothing_is_current_and_gets_no_row() -> None:
    counter = Counter()
    counter.set_row("A", 7)
    counter.missed["A"] = []
    session, link = counter.open()
    say(session, action="subscribe", codes=["a"], epoch="epoch-1", since={"A": 7})
    (question,) = counter.watches
    assert (question.codes, question.since) == (["A"], {"A": ("epoch-1", 7)})
    counter.answer_all()
    assert only(link)["accepted"] == [{"code": "A", "as": "a", "resume": "current"}]
    assert session.outbox.replay is None
    lane = session.watchlist.subscriptions["A"].lane
    assert lane.audience == {session.outbox}


def test_what_was_missed_waits_behind_the_ack_and_chains_from_where_the_client_was() -> None:
    counter = Counter()
    counter.set_row("A", 9)
    counter.missed["A"] = [(seq, orjson.dumps({"code": "A", "seq": seq})) for seq in (8, 9)]
    replayed: list[Any] = []
    counter.desk.replay = replayed.append
    session, link = counter.open()
    say(session, action="subscribe", codes=["A"], since={"A": {"epoch": "epoch-1", "seq": 5}})
    counter.answer_all()
    assert only(link)["accepted"] == [{"code": "A", "as": "A", "resume": "replay"}]
    assert replayed == [session.outbox]
    message = message_of(session.outbox.take_replay(5))
    assert message == {
        "type": "tick", "time": 5, "replay": True,
        "data": [{"prev": 5, "code": "A", "seq": 8}, {"prev": 8, "code": "A", "seq": 9}],
    }  # fmt: skip
    say(session, action="list")
    assert [(entry["seq"], entry["merged"]) for entry in only(link)["subscriptions"]] == [(9, 2)]


def test_what_main_no_longer_has_comes_as_a_snapshot_also_without_one() -> None:
    counter = Counter()
    counter.set_row("A", 9)
    session, link = counter.open()
    say(session, action="subscribe", codes=["A", "B"], snapshot=False, epoch="epoch-0", since={"A": 5})
    counter.answer_all()
    ack, snapshot = link.take()
    assert [entry.get("resume") for entry in ack["accepted"]] == ["snapshot", None]
    assert [(row["code"], row["seq"]) for row in snapshot["data"]] == [("A", 9)]


def test_what_is_too_much_to_replay_comes_as_a_snapshot() -> None:
    counter = Counter(replay_bytes=100)
    counter.desk.replay = lambda outbox: None
    rows = [(seq, orjson.dumps({"code": "A", "seq": seq, "name": "x" * 20})) for seq in (8, 9)]
    assert 50 < sum(len(row) for _, row in rows) <= 100
    for code in ("A", "B"):
        counter.set_row(code, 9)
        counter.missed[code] = rows
    session, link = counter.open()
    say(session, action="subscribe", codes=["A", "B"], snapshot=False, epoch="epoch-1", since={"A": 7, "B": 7})
    counter.answer_all()
    ack, snapshot = link.take()
    assert [entry["resume"] for entry in ack["accepted"]] == ["replay", "snapshot"]
    assert [(row["code"], row["seq"]) for row in snapshot["data"]] == [("B", 9)]
    assert len(session.outbox.replay or ()) == 2
    session.outbox.take_replay(5)
    assert session.outbox.replay_bytes == 0
    say(session, action="unsubscribe", codes=["B"])
    link.take()
    say(session, action="subscribe", codes=["B"], epoch="epoch-1", since={"B": 7})
    counter.answer_all()
    assert only(link)["accepted"][0]["resume"] == "replay"


@pytest.mark.parametrize("option", [{"max_rate": 2}, {"fields": ["bids"]}])
def test_rows_with_a_rate_or_a_book_are_not_replayed(option: dict[str, Any]) -> None:
    counter = Counter()
    counter.set_row("A", 9)
    counter.missed["A"] = []
    session, link = counter.open()
    say(session, action="subscribe", codes=["A"], epoch="epoch-1", since={"A": 9}, **option)
    assert counter.watches[0].since == {}
    counter.answer_all()
    ack, snapshot = link.take()
    assert ack["accepted"][0]["resume"] == "snapshot"
    assert [row["seq"] for row in snapshot["data"]] == [9]


def test_main_is_asked_for_what_was_missed_of_a_code_that_is_here_and_not_by_who_is_subscribed() -> None:
    counter = Counter()
    counter.set_row("A", 9)
    subscribed(counter, "A")
    session, link = counter.open("n.0.2")
    counter.missed["A"] = []
    say(session, action="subscribe", codes=["A"], epoch="epoch-1", since={"A": 9})
    assert counter.watches[0].since == {"A": ("epoch-1", 9)}
    counter.answer_all()
    assert only(link)["accepted"][0]["resume"] == "current"
    say(session, action="subscribe", codes=["A"], epoch="epoch-1", since={"A": 9})
    assert not counter.watches
    ack, _ = link.take()
    assert ack["accepted"][0]["resume"] == "snapshot"


def test_a_snapshot_request_stands_for_the_rows_that_wait() -> None:
    counter = Counter()
    counter.set_row("A", 1)
    session, link = subscribed(counter, "A")
    lane = session.watchlist.subscriptions["A"].lane
    session.outbox.is_blocked = True
    for seq in (2, 3):
        bare = orjson.dumps({"code": "A", "seq": seq})
        lane.channel.renew(seq, bare, None)
        session.outbox.rows.append(Row(lane, seq, lane.seq, bare))
        lane.seq, lane.rows = seq, lane.rows + 1
    say(session, action="snapshot", codes=["A"])
    _, snapshot = link.take()
    assert snapshot["data"] == [{"code": "A", "seq": 3}]
    assert session.outbox.pending == 0
    say(session, action="list")
    (listed,) = only(link)["subscriptions"]
    assert (listed["code"], listed["seq"], listed["merged"]) == ("A", 3, 1)


def test_codes_that_nobody_here_watches_any_more_are_returned() -> None:
    index = Subscriptions()
    first, second = (Watchlist(index, Outbox(None, lambda data: None)) for _ in range(2))
    for watchlist, codes in ((first, "AB"), (second, "BC")):
        for code in codes:
            watchlist.begin(index.open(code, 0, None), PLAIN, None)
    assert first.drop(["A", "B"]) == ["A"]
    assert first.subscriptions == {}
    assert second.drop(["B", "C"]) == ["B", "C"]


def test_a_row_of_a_code_that_was_given_up_is_not_counted() -> None:
    watchlist = Watchlist(Subscriptions(), Outbox(None, lambda data: None))
    watchlist.note_merged("A", 3)
    watchlist.note_first_row("A", 1)
    watchlist.note_skipped_row("A")
    watchlist.note_restated("A", 1, 2)
    assert watchlist.listed() == []


def test_freshness_is_news_once_and_no_news_where_it_was_said_with_the_ack() -> None:
    index = Subscriptions()
    watchlist = Watchlist(index, Outbox(None, lambda data: None))
    for code in "BA":
        watchlist.begin(index.open(code, 0, None, is_stale=code == "A"), PLAIN, None)
    assert watchlist.stale(["B", "A"]) == ["A"]
    assert watchlist.news_of_freshness({"A", "B"}) == ([], [])
    index.channels["A"].is_stale, index.channels["B"].is_stale = False, True
    assert watchlist.news_of_freshness({"A", "B", "GONE"}) == (["B"], ["A"])
    assert watchlist.news_of_freshness({"A", "B"}) == ([], [])
