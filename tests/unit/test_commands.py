"""Commands are taken whole or refused as a whole, and come back from their bytes as they were."""

import orjson
import pytest

from quotepush.cluster.commands import (
    MAX_COMMAND_BYTES,
    OPS,
    BadCommand,
    ClusterKeys,
    Command,
    Kept,
    NodeRecord,
    Reply,
    Sender,
    To,
    decode_kept,
    decode_node,
    decode_reply,
    encode,
    is_fd,
    is_name,
    new_id,
    node_of,
    parse_command,
    payload_of,
    worker_of,
)

FD = "n1.0.1721872800123042"

GOOD = [
    Command(op="send", to=To(conns=[FD]), data={"a": [1, None, "é"]}),
    Command(op="send", to=To(users=["u1"]), data="AAEC", encoding="base64", raw=True, exclude=[FD]),
    Command(op="send", to=To(group="g"), data=None, sender=Sender(FD, "u1"), keep=True),
    Command(op="send", to=To(all=True), data=1.5),
    Command(op="close", conns=[FD], code=4000, reason="bye"),
    Command(op="kick", users=["u1", "u2"]),
    Command(op="bind", conn=FD, user="u1", conn_key="k"),
    Command(op="unbind", conn=FD),
    Command(op="join", conns=[FD], group="g"),
    Command(op="leave", conns=[FD], group="g"),
    Command(op="dissolve", group="g"),
    Command(op="get_session", conn=FD),
    Command(op="set_session", conn=FD, data={}),
    Command(op="update_session", conn=FD, data={"a": None}),
    Command(op="entitle", users=["u1"], claims={"max_rate": 2}),
    Command(op="collect", user="u1"),
    Command(op="poke"),
]


@pytest.mark.parametrize("command", GOOD, ids=lambda c: c.op)
def test_a_command_comes_back_from_its_bytes(command: Command) -> None:
    assert parse_command(encode(command)) == command


def test_every_op_is_among_them() -> None:
    assert {command.op for command in GOOD} == set(OPS)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"null", b"[]", b"{}", b"\xff", b'{"op":1}', b'{"op":"fly"}', b'{"op":"send"}',
        b'{"op":"send","to":{}}', b'{"op":"send","to":{"all":true,"group":"g"}}', b'{"op":"send","to":{"conns":["x"]}}',
        b'{"op":"send","to":{"users":[""]}}', b'{"op":"send","to":{"users":["a\\u0000"]}}',
        b'{"op":"send","to":{"all":true},"encoding":"hex"}',
        b'{"op":"send","to":{"all":true},"encoding":"base64","data":"?"}',
        b'{"op":"send","to":{"all":true},"encoding":"base64","data":7}',
        b'{"op":"send","to":{"all":true},"data":NaN}', b'{"op":"send","to":{"all":true},"data":1e999}',
        b'{"op":"send","to":{"all":true},"data":"\\ud800"}',
        b'{"op":"send","to":{"all":true},"data":' + b"[" * 50_000,
        b'{"op":"send","to":{"all":true},"data":' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"op":"send","to":{"all":true},"data":99999999999999999999}',
        b'{"op":"close","conns":["n1.0.1"],"code":1006}', b'{"op":"close"}',
        b'{"op":"kick","users":["u"],"reason":"' + b"x" * 124 + b'"}', b'{"op":"bind","conn":"n1.0.1"}',
        b'{"op":"bind","conn":"n1.0","user":"u"}', b'{"op":"join","conns":["n1.0.1"],"group":"a\\nb"}',
        b'{"op":"set_session","conn":"n1.0.1","data":[]}', b'{"op":"entitle","claims":{}}',
        b'{"op":"entitle","conns":["n1.0.1"],"users":["u"],"claims":{}}', b'{"op":"dissolve"}', b'{"op":"collect"}',
    ],
)  # fmt: skip
def test_what_is_no_command_is_refused_whole(text: bytes) -> None:
    with pytest.raises(BadCommand) as refused:
        parse_command(text)
    assert refused.value.error == "bad_request"


def test_a_refused_command_says_who_waits_for_it() -> None:
    with pytest.raises(BadCommand) as refused:
        parse_command(b'{"id":"a1","reply":"qp:reply:1","op":"fly"}')
    assert (refused.value.id, refused.value.reply) == ("a1", "qp:reply:1")


def test_a_command_that_is_too_large_is_not_read() -> None:
    with pytest.raises(BadCommand) as refused:
        parse_command(b'{"op":"poke","x":"' + b"x" * MAX_COMMAND_BYTES + b'"}')
    assert refused.value.error == "too_large"


def test_unknown_keys_are_ignored() -> None:
    assert parse_command(b'{"op":"poke","later":[1]}') == Command(op="poke")


@pytest.mark.parametrize("data", [0, -(2**63), 2**64 - 1, 1.5, "", "日", [], {"a": {"b": []}}, True, None])
def test_data_that_was_taken_can_be_said_to_clients(data: object) -> None:
    text = b'{"op":"send","to":{"all":true},"data":%s}' % (
        str(data).encode() if type(data) is int else orjson.dumps(data)
    )
    taken = parse_command(text)
    assert orjson.loads(orjson.dumps(payload_of(taken))) == data


def test_base64_is_a_payload_of_bytes() -> None:
    assert payload_of(Command(op="send", to=To(all=True), data="AAEC/w==", encoding="base64")) == b"\0\1\2\xff"
    assert payload_of(Kept(at=1, until=2, data="")) == ""


@pytest.mark.parametrize("name", ["a", "Ä 日", "x" * 128, "a:b*c"])
def test_names_have_1_to_128_characters(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\tb", "a\x7f", "a\x85", "\ud800"])
def test_other_texts_are_no_names(name: str) -> None:
    assert not is_name(name)


def test_an_fd_names_its_node_and_worker() -> None:
    assert (is_fd(FD), node_of(FD), worker_of(FD)) == (True, "n1", 0)
    assert (is_fd("n1.0"), node_of("n1"), worker_of("n1.x.1")) == (False, "", -1)


def test_replies_records_and_kept_messages_come_back_from_their_bytes() -> None:
    reply = Reply("a", "n1", 2, [FD], {"x": 1}, ["u1"], "not_online", "gone")
    assert decode_reply(encode(reply)) == reply
    kept = Kept(1, 2, {"a": 1}, sender=Sender(FD), id="m1")
    assert decode_kept(encode(kept)) == kept
    record = NodeRecord(1, 2, "0.3", 2)
    assert decode_node(encode(record)) == record
    for decode in (decode_reply, decode_kept, decode_node):
        assert decode(b"[") is None
        assert decode(b"{}") is None


def test_keys_and_channels_begin_with_the_prefix() -> None:
    keys = ClusterKeys("qp:")
    assert (keys.nodes, keys.members, keys.to_all, keys.events) == ("qp:nodes", "qp:members", "qp:to", "qp:events")
    assert (keys.user("u"), keys.group("g"), keys.member(FD), keys.conn(FD)) == (
        "qp:user:u", "qp:group:g", f"qp:member:{FD}", f"qp:conn:{FD}",
    )  # fmt: skip
    assert (keys.inbox("n1"), keys.kept("u"), keys.to_node("n1")) == ("qp:inbox:n1", "qp:kept:u", "qp:to:n1")
    assert keys.reply().startswith("qp:reply:") and keys.reply() != keys.reply()
    assert new_id() != new_id() and len(new_id()) == 16
