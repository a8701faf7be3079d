"""Who watches what: the index against its invariant, step by step and against a model."""

from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import PLAIN, Channel, Lane, Row, Shape, Subscription, Subscriptions
from quotepush.wire.formats import JSON, View


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
    lane = subscriptions.add(channel, outbox, base=7)
    assert lane.audience == {outbox}
    assert lane.newcomers == {}
    assert channel.plain is lane
    assert channel.is_watched
    assert subscriptions.count == 1


def test_subscribing_without_one_makes_a_newcomer() -> None:
    subscriptions, outbox = Subscriptions(), make_outbox()
    channel = subscriptions.open("AAPL", 7, b"{}")
    lane = subscriptions.add(channel, outbox, base=None)
    assert lane.newcomers == {outbox: None}
    assert lane.audience == set()
    assert channel.is_watched


def test_subscribing_twice_is_one_subscription() -> None:
    subscriptions, outbox = Subscriptions(), make_outbox()
    channel = subscriptions.open("AAPL", 7, b"{}")
    for base in (7, None, 7, 5, 7):
        lane = subscriptions.add(channel, outbox, base=base)
        assert subscriptions.count == 1
        assert (outbox in lane.audience) is (base == 7)
        assert (outbox in lane.newcomers) is (base != 7)


def test_the_last_one_to_leave_gives_the_code_up() -> None:
    subscriptions, first, second = Subscriptions(), make_outbox(), make_outbox()
    channel = subscriptions.open("AAPL", 7, b"{}")
    lane = subscriptions.add(channel, first, base=7)
    subscriptions.add(channel, second, base=None)
    assert subscriptions.discard([lane], first) == []
    assert subscriptions.discard([lane], second) == ["AAPL"]
    assert subscriptions.channels == {}
    assert subscriptions.count == 0


def test_leaving_what_one_never_joined_disturbs_nobody() -> None:
    subscriptions, member, stranger = Subscriptions(), make_outbox(), make_outbox()
    channel = subscriptions.open("AAPL", 7, b"{}")
    lane = subscriptions.add(channel, member, base=7)
    assert subscriptions.discard([lane], stranger) == []
    assert lane.audience == {member}
    assert subscriptions.count == 1


def test_a_claim_keeps_a_code_until_it_is_released() -> None:
    subscriptions, outbox = Subscriptions(), make_outbox()
    subscriptions.claim({"AAPL": "anything"})
    channel = subscriptions.open("AAPL", 7, b"{}")
    lane = subscriptions.add(channel, outbox, base=7)
    assert subscriptions.discard([lane], outbox) == []
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
    lane = subscriptions.add(subscriptions.open("AAPL", 7, b"{}"), outbox, base=None)
    assert subscriptions.release(["AAPL"]) == []
    assert subscriptions.channels["AAPL"].plain is lane
    assert lane.newcomers == {outbox: None}


def make_lane(seq: int) -> Lane:
    return Lane(Channel("AAPL", seq, b'{"code":"AAPL","seq":%d}' % seq), PLAIN)


def test_a_row_carries_prev_first_and_shares_its_bytes() -> None:
    row = Row(make_lane(7), 9, 7, b'{"code":"AAPL","seq":9}')
    assert row.text == b'{"prev":7,"code":"AAPL","seq":9}'


@pytest.mark.parametrize("made_after", [None, 7])
@pytest.mark.parametrize("sent_after", [None, 0, 7, 12_345])
def test_a_row_can_be_told_as_following_any_other(made_after: int | None, sent_after: int | None) -> None:
    bare = b'{"code":"AAPL","seq":12346,"name":"a,b"}'
    row = Row(make_lane(7), 12_346, made_after, bare)
    told = orjson.loads(row.text_after(sent_after))
    assert told.pop("prev", None) == sent_after
    assert told == orjson.loads(bare)


def hand_out(lane: Lane, seq: int) -> None:
    lane.seq = seq
    lane.rows += 1


def test_rows_that_were_merged_upstream_are_counted_without_a_count_per_row() -> None:
    lane = make_lane(10)
    subscription = Subscription(lane, 10)
    assert subscription.merged_until(10, 0) == 0
    hand_out(lane, 11)
    assert subscription.merged_until(11, 0) == 0
    hand_out(lane, 15)  # 12, 13 and 14 were merged into it
    assert subscription.merged_until(15, 0) == 3


def test_rows_that_wait_are_not_counted_yet() -> None:
    lane = make_lane(10)
    subscription = Subscription(lane, 10)
    hand_out(lane, 11)
    hand_out(lane, 15)
    assert subscription.merged_until(11, rows_waiting=1) == 0
    assert subscription.merged_until(10, rows_waiting=2) == 0


def test_a_subscription_without_a_snapshot_counts_from_its_first_row() -> None:
    lane = make_lane(10)
    subscription = Subscription(lane, None)
    assert subscription.merged_until(10, 0) == 0
    hand_out(lane, 20)
    subscription.start(20)
    assert subscription.merged_until(20, 0) == 0
    hand_out(lane, 23)
    subscription.start(23)  # only the first time counts
    assert subscription.merged_until(23, 0) == 2


def test_a_snapshot_stands_for_everything_that_waited() -> None:
    lane = make_lane(10)
    subscription = Subscription(lane, 10)
    hand_out(lane, 12)  # sent: 11 was merged
    hand_out(lane, 14)  # waits: 13 was merged
    hand_out(lane, 15)  # waits
    after = subscription.go_on(lane, 15, 12, rows_waiting=2)
    # 11 before, 13 and 14 with the snapshot of 15
    assert after.merged_until(15, 0) == 3
    hand_out(lane, 17)
    assert after.merged_until(17, 0) == 4


def test_a_snapshot_when_nothing_waits_merges_nothing() -> None:
    lane = make_lane(10)
    subscription = Subscription(lane, 10)
    hand_out(lane, 11)
    assert subscription.go_on(lane, 11, 11, rows_waiting=0).merged_until(11, 0) == 0


SHAPES = (PLAIN, Shape(View.of(["last"]), JSON.objects), Shape(View.of(None), JSON.objects, 2.0))


class SubscriptionsMachine(RuleBasedStateMachine):
    """The index beside a plain list of who watches in which lane and who claims."""

    CODES = ("A", "B", "C")

    def __init__(self) -> None:
        super().__init__()
        self.subscriptions = Subscriptions()
        self.outboxes = [make_outbox() for _ in range(3)]
        self.watching: dict[tuple[str, int], Lane] = {}
        self.claims: list[str] = []

    def wanted(self, code: str) -> bool:
        return code in self.claims or any(c == code for c, _ in self.watching)

    def check_left(self, left: list[str], asked: list[str], before: set[str]) -> None:
        assert set(left) == {code for code in asked if not self.wanted(code)}
        assert set(self.subscriptions.channels) == before - set(left)

    @rule(code=st.sampled_from(CODES), who=st.integers(0, 2), base=st.sampled_from([None, 0, 5]),
          shape=st.sampled_from(SHAPES))  # fmt: skip
    def subscribe(self, code: str, who: int, base: int | None, shape: Shape) -> None:
        channel = self.subscriptions.open(code, 0, None)
        before = self.watching.get((code, who))
        if before is not None and before.shape != shape:
            self.subscriptions.leave(before, self.outboxes[who])
        lane = self.watching[code, who] = self.subscriptions.add(channel, self.outboxes[who], shape, base=base)
        assert lane.shape == shape
        assert (self.outboxes[who] in lane.audience) is (base == 0)

    @rule(codes=st.sets(st.sampled_from(CODES)), who=st.integers(0, 2))
    def leave(self, codes: set[str], who: int) -> None:
        before = set(self.subscriptions.channels)
        had = [code for code in codes if (code, who) in self.watching]
        left = self.subscriptions.discard([self.watching.pop((code, who)) for code in had], self.outboxes[who])
        self.check_left(left, had, before)

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
        found = [
            ((code, who), lane)
            for code, channel in self.subscriptions.channels.items()
            for lane in channel.all_lanes()
            for who, outbox in enumerate(self.outboxes)
            if outbox in lane.audience or outbox in lane.newcomers
        ]
        assert dict(found) == self.watching
        assert self.subscriptions.count == len(found) == len(self.watching)
        for channel in self.subscriptions.channels.values():
            assert channel.is_watched or channel.code in self.claims
            for lane in channel.all_lanes():
                assert lane.is_watched
                assert not lane.audience & set(lane.newcomers)


TestSubscriptionsAgainstTheirModel = SubscriptionsMachine.TestCase
TestSubscriptionsAgainstTheirModel.settings = settings(
    deadline=None, derandomize=True, max_examples=100, stateful_step_count=30
)
