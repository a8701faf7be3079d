"""Orders are carried out in turn; messages are encoded once per codec and never pile up before a socket."""

import asyncio
from typing import Any

import msgspec
import orjson
import pytest

from quotepush.entitlement import Entitlement
from quotepush.push.members import Members
from quotepush.push.orders import MAX_UNSENT_BYTES, Audience, Carrier, Message, Orders, Outcome
from quotepush.push.session import Session
from quotepush.wire.events import EVENTS
from quotepush.wire.formats import JSON, MSGPACK, Codec
from tests.support.desk import Counter
from tests.support.waiting import wait_until


class Socket:
    """The link of a session, as far as orders look at it."""

    def __init__(self) -> None:
        self.session: Session
        self.frames: list[bytes] = []
        self.closes: list[tuple[int, str]] = []
        self.unsent_bytes = 0

    @property
    def is_sealed(self) -> bool:
        return bool(self.closes)

    def write(self, data: bytes) -> None:
        assert not self.closes
        self.frames.append(data)

    def close(self, code: int, reason: str) -> None:
        self.closes.append((code, reason))

    def hold_requests(self, hold: bool) -> None: ...

    @property
    def payloads(self) -> list[bytes]:
        return [frame[2 if frame[1] < 126 else 4 :] for frame in self.frames]

    @property
    def said(self) -> list[dict[str, Any]]:
        return [orjson.loads(payload) for payload in self.payloads]


class Room:
    def __init__(self, *, needs_key: bool = False) -> None:
        self.counter = Counter()
        self.links: dict[str, Any] = {}
        self.members = Members()
        self.orders = Orders(self.links, self.members, self.counter.desk, needs_key=needs_key)

    def open(self, number: int, user: str = "", codec: Codec = JSON) -> Socket:
        link = Socket()
        link.session = Session(f"n.0.{number}", link, self.counter.desk, codec)
        self.links[link.session.fd] = link
        if user:
            self.members.bind(link.session, user)
        return link


# messages


async def test_a_message_says_to_whom_it_went() -> None:
    room = Room()
    one, two, three = room.open(1, "a"), room.open(2, "a"), room.open(3, "b")
    room.members.join(three.session, "g")
    message = {"x": [1, None]}
    assert await room.orders.send(Message(message), Audience(users=["a", "a", "none"])) == Outcome(2)
    assert await room.orders.send(Message(message), Audience(group="g")) == Outcome(1)
    to = Audience(fds=["n.0.1", "n.0.1", "n.0.9"])
    assert await room.orders.send(Message(message), to) == Outcome(1, ["n.0.1"])
    to = Audience(everybody=True, exclude=frozenset(["n.0.2"]))
    assert await room.orders.send(Message(message, sender={"conn": "n.0.2", "user": "a"}), to) == Outcome(2)
    assert [m["from"] for m in one.said] == ["user", "conn", "all"]
    assert [m["from"] for m in two.said] == ["user"]
    assert three.said == [
        {"type": "message", "time": 1_000_000, "from": "group", "data": message},
        {
            "type": "message",
            "time": 1_000_000,
            "from": "all",
            "data": message,
            "sender": {"conn": "n.0.2", "user": "a"},
        },
    ]
    assert room.orders.delivered == 6


async def test_all_connections_of_a_codec_get_the_same_bytes() -> None:
    room = Room()
    sockets = [room.open(n, codec=codec) for n, codec in enumerate((JSON, JSON, MSGPACK, MSGPACK, EVENTS))]
    assert (await room.orders.send(Message({"x": 1}), Audience(everybody=True))).delivered == 5
    assert sockets[0].frames[0] is sockets[1].frames[0]
    assert sockets[2].frames[0] is sockets[3].frames[0]
    assert msgspec.msgpack.decode(sockets[2].payloads[0])["data"] == {"x": 1}
    assert sockets[4].frames[0].startswith(b'event: message\ndata: {"type":"message"')


async def test_bytes_are_base64_in_json_and_bytes_in_messagepack() -> None:
    room = Room()
    json, pack, events = room.open(1), room.open(2, codec=MSGPACK), room.open(3, codec=EVENTS)
    await room.orders.send(Message(b"\0\xff"), Audience(everybody=True))
    assert (json.said[0]["data"], json.said[0]["encoding"]) == ("AP8=", "base64")
    said = msgspec.msgpack.decode(pack.payloads[0])
    assert said["data"] == b"\0\xff" and "encoding" not in said
    assert b'"encoding":"base64"' in events.frames[0]


@pytest.mark.parametrize(
    ("payload", "first_byte", "bare"), [("hé", 0x81, "hé".encode()), (b"\0\xff", 0x82, b"\0\xff"), ([1], 0x81, b"[1]")]
)
async def test_a_raw_payload_is_one_bare_frame(payload: Any, first_byte: int, bare: bytes) -> None:
    room = Room()
    sockets = [room.open(1), room.open(2, codec=MSGPACK)]
    await room.orders.send(Message(payload, is_raw=True), Audience(everybody=True))
    for socket in sockets:
        assert socket.frames[0][0] == first_byte
        assert socket.payloads == [bare]


async def test_a_raw_text_is_an_event_and_raw_bytes_are_not_for_streams() -> None:
    room = Room()
    stream = room.open(1, codec=EVENTS)
    to = Audience(everybody=True)
    assert (await room.orders.send(Message("a\nid: 7\r\nb", is_raw=True), to)).delivered == 1
    assert stream.frames == [b"event: message\ndata: a\ndata: id: 7\ndata: b\n\n"]
    assert (await room.orders.send(Message(b"a", is_raw=True), to)).delivered == 0
    assert room.orders.undelivered == 1


async def test_a_socket_that_does_not_read_is_sent_no_more() -> None:
    room = Room()
    slow, quick = room.open(1, "a"), room.open(2, "a")
    slow.unsent_bytes = MAX_UNSENT_BYTES + 1
    outcome = await room.orders.send(Message("x" * 1000), Audience(users=["a"]))
    assert outcome.delivered == 1
    assert not slow.frames and quick.frames
    assert room.orders.undelivered == 1
    slow.unsent_bytes = MAX_UNSENT_BYTES
    assert (await room.orders.send(Message("x"), Audience(users=["a"]))).delivered == 2


async def test_nothing_is_written_behind_a_goodbye() -> None:
    room = Room()
    leaving = room.open(1)
    leaving.close(1000, "")
    assert (await room.orders.send(Message("x"), Audience(everybody=True))).delivered == 0


async def test_who_has_yet_to_say_who_he_is_does_not_hear_what_all_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room()
    stranger = room.open(1)
    room.counter.desk.verifier = object()  # type: ignore[assignment]  # it is only asked whether there is one
    assert (await room.orders.send(Message("x"), Audience(everybody=True))).delivered == 0
    assert (await room.orders.send(Message("x"), Audience(fds=["n.0.1"]))).delivered == 1
    assert len(stranger.frames) == 1


async def test_the_loop_turns_while_many_are_sent_to() -> None:
    room = Room()
    for number in range(1000):
        room.open(number)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(count())
    assert (await room.orders.send(Message("x"), Audience(everybody=True))).delivered == 1000
    task.cancel()
    assert turns >= 10


async def test_a_session_gets_a_kept_message_once() -> None:
    room = Room()
    one = room.open(1, "a")
    to = Audience(users=["a", "b"])
    first = await room.orders.send(Message("x", kept="m1", sent_ms=5), to)
    assert (first.delivered, first.users) == (1, ["a"])
    two = room.open(2, "a")
    again = await room.orders.send(Message("x", kept="m1", sent_ms=5), to)
    assert again.users == ["a"]
    assert len(one.frames) == len(two.frames) == 1
    assert one.said[0]["time"] == 5
    one.unsent_bytes = two.unsent_bytes = MAX_UNSENT_BYTES + 1
    assert (await room.orders.send(Message("x", kept="m2"), to)).users == []


async def test_of_messages_that_may_come_again_it_is_known_which_a_session_has_had() -> None:
    room = Room()
    stranger = room.open(1)  # without a user, too
    for number in range(101):
        await room.orders.send(Message(number, kept=f"m{number}"), Audience(everybody=True))
    for again in (100, 1, 0):
        assert (await room.orders.send(Message(again, kept=f"m{again}"), Audience(everybody=True))).delivered == 1
    assert [said["data"] for said in stranger.said] == [*range(101), 0], "what is remembered is bounded"


# connections


async def test_connections_and_users_are_closed() -> None:
    room = Room()
    one, two, three = room.open(1, "a"), room.open(2, "a"), room.open(3, "b")
    assert await room.orders.close(["n.0.3", "n.0.9"], 4000, "why") == Outcome(1, ["n.0.3"])
    outcome = await room.orders.kick(["a"], 4403, "kicked")
    assert (outcome.delivered, sorted(outcome.fds)) == (2, ["n.0.1", "n.0.2"])
    assert (three.closes, one.closes, two.closes) == ([(4000, "why")], [(4403, "kicked")], [(4403, "kicked")])


async def test_a_connection_is_bound_with_its_key_only_where_that_is_needed() -> None:
    for needs_key in (False, True):
        room = Room(needs_key=needs_key)
        link = room.open(1)
        key = room.counter.desk.conn_key("n.0.1")
        assert (await room.orders.bind("n.0.1", "a", "wrong é")).error == "wrong_key"
        assert (await room.orders.bind("n.0.1", "a", "")).error == ("key_needed" if needs_key else "")
        assert await room.orders.bind("n.0.1", "b", key) == Outcome(1, ["n.0.1"])
        assert link.session.member is not None and link.session.member.user == "b"
        assert await room.orders.unbind("n.0.1") == Outcome(1, ["n.0.1"])
        assert await room.orders.unbind("n.0.1") == Outcome(0, ["n.0.1"])
        assert await room.orders.bind("n.0.9", "b", room.counter.desk.conn_key("n.0.9")) == Outcome()


async def test_groups_are_joined_left_and_dissolved() -> None:
    room = Room()
    for number in range(3):
        room.open(number)
    fds = list(room.links)
    assert await room.orders.join([*fds, "n.0.9"], "g") == Outcome(3, fds)
    assert await room.orders.leave(fds[:1], "g") == Outcome(1, fds[:1])
    assert await room.orders.leave(fds[:1], "g") == Outcome(0, fds[:1])
    assert await room.orders.dissolve("g") == Outcome(2)
    assert not room.members.in_group("g")


async def test_session_data_is_read_replaced_and_merged() -> None:
    room = Room()
    room.open(1)
    assert await room.orders.session("n.0.1") == Outcome(1, ["n.0.1"], session={})
    assert (await room.orders.session("n.0.1", {"a": 1, "b": 2}, is_replaced=True)).session == {"a": 1, "b": 2}
    assert (await room.orders.session("n.0.1", {"a": None, "c": 3})).session == {"b": 2, "c": 3}
    outcome = await room.orders.session("n.0.1", {"d": "x" * 9000})
    assert (outcome.error, outcome.session) == ("too_large", None)
    assert (await room.orders.session("n.0.1")).session == {"b": 2, "c": 3}
    assert await room.orders.session("n.0.9", {"a": 1}) == Outcome()


async def test_live_connections_are_given_another_entitlement() -> None:
    room = Room()
    one, two = room.open(1, "a"), room.open(2, "b")
    less = Entitlement(max_codes=1)
    assert await room.orders.entitle(less, users=["a"]) == Outcome(1, ["n.0.1"])
    assert one.session.entitlement is less
    assert await room.orders.entitle(less, ["n.0.2"]) == Outcome(1, ["n.0.2"])
    assert two.session.entitlement is less
    assert one.said[0]["type"] == "status"


# one behind the other


async def test_orders_are_carried_out_in_turn_and_a_bug_ends_only_its_own() -> None:
    told: list[tuple[int, Outcome]] = []
    carrier = Carrier(lambda question, outcome: told.append((question, outcome)))
    steps: list[int] = []

    def order(number: int) -> Any:
        async def carry_out() -> Outcome:
            steps.append(number)
            await asyncio.sleep(0)
            steps.append(number)
            if number == 2:
                raise RuntimeError("a bug")
            return Outcome(number)

        return carry_out

    task = asyncio.create_task(carrier.run())
    for number in (1, 2, 3):
        carrier.take(number, 10, order(number))
    carrier.take(4, 1 << 26, order(4))
    await wait_until(lambda: len(told) == 4)
    assert steps == [1, 1, 2, 2, 3, 3]
    assert told[0][1].error == "overloaded", "at once"
    assert [(question, outcome.delivered, outcome.error) for question, outcome in told[1:]] == [
        (1, 1, ""), (2, 0, "internal"), (3, 3, ""),
    ]  # fmt: skip
    task.cancel()
    await asyncio.wait([task])
