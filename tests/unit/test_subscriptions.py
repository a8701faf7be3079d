"""Who watches what: the index against its invariant, step by step and against a model."""

from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import Channel, Row, Subscription, Subscriptions


def make_outbox() -> Outbox:
    return Outbox(session=None, write=lambda data: None)


def test_a_channel_begins_with_the_newest_row() -> None:
    subscriptions = Subscriptions()
    channel = subscriptions.open("AAPL", 7, b'{"code":"AAPL","seq":7}')
    assert (channel.code, channel.seq, channel.row) == ("AAPL", 7, b'{"code":"AAPL","seq":7}')
    assert subscriptions.open("AAPL", 99, None) is channel
    assert channel.seq == 7


def test_subscribing_with_a_snapshot_joins_the_audience() -> None:
    subscriptions, outbox = Subscriptions(), make_outbox()
    channel = subscriptions.open("AAPL", 7, b"{}")
    subscriptions.add(channel, outbox, with_prev=True)
    assert channel.audience == {outbox}
    assert channel.newcomers == set()
    assert channel.is_watched
    assert subscriptions.count == 1


def test_subscribing_without_one_makes_a_newcomer() -> None:
    subscriptions, outbox = Subscriptions(), make_outbox()
    channel = subscriptions.open("AAPL", 7, b"{}")
    subscriptions.add(channel, outbox, with_prev=False)
    assert channel.newcomers == {outbox}
    assert channel.audience == set()
    assert channel.is_watched


def test_subscribing_twice_is_one_subscription() -> None:
    subscriptions, outbox = Subscriptions(), make_outbox()
    channel = subscriptions.open("AAPL", 7, b"{}")
    for with_prev in (True, False, True, True):
        subscriptions.add(channel, outbox, with_prev=with_prev)
        assert subscriptions.count == 1
        assert (outbox in channel.audience) is with_prev
        assert (outbox in channel.newcomers) is not with_prev


def test_the_last_one_to_leave_gives_the_code_up() -> None:
    subscriptions, first, second = Subscriptions(), make_outbox(), make_outbox()
    channel = subscriptions.open("AAPL", 7, b"{}")
    subscriptions.add(channel, first, with_prev=True)
    subscriptions.add(channel, second, with_prev=False)
    assert subscriptions.discard([channel], first) == []
    assert subscriptions.discard([channel], second) == ["AAPL"]
    assert subscriptions.channels == {}
    assert subscriptions.count == 0


def test_leaving_what_one_never_joined_disturbs_nobody() -> None:
    subscriptions, member, stranger = Subscriptions(), make_outbox(), make_outbox()
    channel = subscriptions.open("AAPL", 7, b"{}")
    subscriptions.add(channel, member, with_prev=True)
    assert subscriptions.discard([channel], stranger) == []
    assert channel.audience == {member}
    assert subscriptions.count == 1


def test_a_claim_keeps_a_code_until_it_is_released() -> None:
    subscriptions, outbox = Subscriptions(), make_outbox()
    subscriptions.claim({"AAPL": "anything"})
    channel = subscriptions.open("AAPL", 7, b"{}")
    subscriptions.add(channel, outbox, with_prev=True)
    assert subscriptions.discard([channel], outbox) == []
    assert subscriptions.channels["AAPL"] is channel
    assert subscriptions.release(["AAPL"]) == ["AAPL"]
    assert subscriptions.channels == {}


def test_every_claim_has_to_be_released() -> None:
    subscriptions = Subscriptions()
    subscriptions.claim(["AAPL"])
    subscriptions.claim(["AAPL", "MSFT"])
    assert subscriptions.release(["AAPL"]) == []
    assert subscriptions.release(["AAPL", "MSFT"]) == ["AAPL", "MSFT"]


def test_a_release_leaves_a_code_that_somebody_watches() -> None:
    subscriptions, outbox = Subscriptions(), make_outbox()
    subscriptions.claim(["AAPL"])
    subscriptions.add(subscriptions.open("AAPL", 7, b"{}"), outbox, with_prev=False)
    assert subscriptions.release(["AAPL"]) == []
    assert subscriptions.channels["AAPL"].newcomers == {outbox}


def test_a_row_carries_prev_first_and_shares_its_bytes() -> None:
    channel = Channel("AAPL", 7, b"{}")
    row = Row(channel, 9, 7, b'{"code":"AAPL","seq":9}')
    assert row.text == b'{"prev":7,"code":"AAPL","seq":9}'


@pytest.mark.parametrize("made_after", [None, 7])
@pytest.mark.parametrize("sent_after", [None, 0, 7, 12_345])
def test_a_row_can_be_told_as_following_any_other(made_after: int | None, sent_after: int | None) -> None:
    bare = b'{"code":"AAPL","seq":12346,"name":"a,b"}'
    row = Row(Channel("AAPL", 7, b"{}"), 12_346, made_after, bare)
    told = orjson.loads(row.text_after(sent_after))
    assert told.pop("prev", None) == sent_after
    assert told == orjson.loads(bare)


def hand_out(channel: Channel, seq: int) -> None:
    channel.seq = seq
    channel.rows += 1


def test_rows_that_were_merged_upstream_are_counted_without_a_count_per_row() -> None:
    channel = Channel("AAPL", 10, b"{}")
    subscription = Subscription(channel, has_base=True)
    assert subscription.merged_until(10, 0) == 0
    hand_out(channel, 11)
    assert subscription.merged_until(11, 0) == 0
    hand_out(channel, 15)  # 12, 13 and 14 were merged into it
    assert subscription.merged_until(15, 0) == 3


def test_rows_that_wait_are_not_counted_yet() -> None:
    channel = Channel("AAPL", 10, b"{}")
    subscription = Subscription(channel, has_base=True)
    hand_out(channel, 11)
    hand_out(channel, 15)
    assert subscription.merged_until(11, rows_waiting=1) == 0
    assert subscription.merged_until(10, rows_waiting=2) == 0


def test_a_subscription_without_a_snapshot_counts_from_its_first_row() -> None:
    channel = Channel("AAPL", 10, b"{}")
    subscription = Subscription(channel, has_base=False)
    assert subscription.merged_until(10, 0) == 0
    hand_out(channel, 20)
    subscription.start(20)
    assert subscription.merged_until(20, 0) == 0
    hand_out(channel, 23)
    subscription.start(23)  # only the first time counts
    assert subscription.merged_until(23, 0) == 2


def test_a_snapshot_stands_for_everything_that_waited() -> None:
    channel = Channel("AAPL", 10, b"{}")
    subscription = Subscription(channel, has_base=True)
    hand_out(channel, 12)  # sent: 11 was merged
    hand_out(channel, 14)  # waits: 13 was merged
    hand_out(channel, 15)  # waits
    after = subscription.restart(12, rows_waiting=2)
    # 11 before, 13 and 14 with the snapshot of 15
    assert after.merged_until(15, 0) == 3
    hand_out(channel, 17)
    assert after.merged_until(17, 0) == 4


def test_a_snapshot_when_nothing_waits_merges_nothing() -> None:
    channel = Channel("AAPL", 10, b"{}")
    subscription = Subscription(channel, has_base=True)
    hand_out(channel, 11)
    assert subscription.restart(11, rows_waiting=0).merged_until(11, 0) == 0


class SubscriptionsMachine(RuleBasedStateMachine):
    """The index beside plain sets of who watches and who claims."""

    CODES = ("A", "B", "C")

    def __init__(self) -> None:
        super().__init__()
        self.subscriptions = Subscriptions()
        self.outboxes = [make_outbox() for _ in range(3)]
        self.watching: set[tuple[str, int]] = set()
        self.claims: list[str] = []

    def wanted(self, code: str) -> bool:
        return code in self.claims or any(c == code for c, _ in self.watching)

    def check_left(self, left: list[str], asked: list[str], before: set[str]) -> None:
        assert set(left) == {code for code in asked if not self.wanted(code)}
        assert set(self.subscriptions.channels) == before - set(left)

    @rule(code=st.sampled_from(CODES), who=st.integers(0, 2), with_prev=st.booleans())
    def subscribe(self, code: str, who: int, with_prev: bool) -> None:
        channel = self.subscriptions.open(code, 0, None)
        self.subscriptions.add(channel, self.outboxes[who], with_prev=with_prev)
        self.watching.add((code, who))
        assert (self.outboxes[who] in channel.audience) is with_prev

    @rule(codes=st.sets(st.sampled_from(CODES)), who=st.integers(0, 2))
    def leave(self, codes: set[str], who: int) -> None:
        channels = self.subscriptions.channels
        before = set(channels)
        left = self.subscriptions.discard([channels[c] for c in codes if c in channels], self.outboxes[who])
        self.watching -= {(code, who) for code in codes}
        self.check_left(left, [code for code in codes if code in before], before)

    @rule(codes=st.lists(st.sampled_from(CODES), unique=True))
    def claim(self, codes: list[str]) -> None:
        self.subscriptions.claim(codes)
        self.claims += codes

    @rule(data=st.data())
    def release(self, data: Any) -> None:
        if not self.claims:
            return
        codes = sorted(set(data.draw(st.lists(st.sampled_from(sorted(self.claims)), unique=True))))
        before = set(self.subscriptions.channels)
        for code in codes:
            self.claims.remove(code)
        self.check_left(self.subscriptions.release(codes), codes, before)

    @invariant()
    def agree(self) -> None:
        found = {
            (code, who)
            for code, channel in self.subscriptions.channels.items()
            for who, outbox in enumerate(self.outboxes)
            if outbox in channel.audience or outbox in channel.newcomers
        }
        assert found == self.watching
        assert self.subscriptions.count == len(self.watching)
        for channel in self.subscriptions.channels.values():
            assert not channel.audience & channel.newcomers
            assert channel.is_watched or channel.code in self.claims


TestSubscriptionsAgainstTheirModel = SubscriptionsMachine.TestCase
TestSubscriptionsAgainstTheirModel.settings = settings(
    deadline=None, derandomize=True, max_examples=100, stateful_step_count=30
)
