"""Frames, compared with what the sans-I/O parser of the websockets package reads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Close, Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri
from websockets.utils import accept_key as reference_accept_key

from quotepush.wire.frames import accept_key, close_frame, frame_header, ping_frame, pong_frame, text_frame


def read(data: bytes) -> list[Frame]:
    """What a client reads, byte for byte and to the end."""
    client = ClientProtocol(parse_uri("ws://127.0.0.1/"), state=State.OPEN, max_size=None)
    client.receive_data(data)
    frames = [event for event in client.events_received() if isinstance(event, Frame)]
    assert client.parser_exc is None
    return frames


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (0, b"\x81\x00"), (1, b"\x81\x01"), (125, b"\x81\x7d"), (126, b"\x81\x7e\x00\x7e"), (127, b"\x81\x7e\x00\x7f"),
        (65_535, b"\x81\x7e\xff\xff"), (65_536, b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00"),
        (1 << 32, b"\x81\x7f\x00\x00\x00\x01\x00\x00\x00\x00"),
    ],
)  # fmt: skip
def test_a_header_takes_the_shortest_form(length: int, header: bytes) -> None:
    assert frame_header(length) == header


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65_535, 65_536, 200_000])
def test_a_text_frame_is_read_by_a_client_as_it_was_meant(length: int) -> None:
    payload = b"x" * length
    (frame,) = read(text_frame(payload))
    assert (frame.opcode, bytes(frame.data), frame.fin) == (Opcode.TEXT, payload, True)


@given(st.lists(st.text(max_size=200), max_size=6))
@settings(deadline=None, derandomize=True)
def test_frames_behind_each_other_are_read_apart(texts: list[str]) -> None:
    frames = read(b"".join(text_frame(text.encode()) for text in texts))
    assert [bytes(frame.data).decode() for frame in frames] == texts


@given(st.binary(max_size=125))
@settings(deadline=None, derandomize=True)
def test_ping_and_pong_carry_their_payload(payload: bytes) -> None:
    ping, pong = read(ping_frame(payload) + pong_frame(payload))
    assert (ping.opcode, bytes(ping.data)) == (Opcode.PING, payload)
    assert (pong.opcode, bytes(pong.data)) == (Opcode.PONG, payload)


def test_a_ping_may_be_empty() -> None:
    assert ping_frame() == b"\x89\x00"


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1009, 1011, 1012, 1013, 4401, 4429])
def test_a_close_frame_says_code_and_reason(code: int) -> None:
    (frame,) = read(close_frame(code, "restart"))
    assert frame.opcode is Opcode.CLOSE
    assert Close.parse(frame.data) == Close(code, "restart")


@given(st.text(max_size=200))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_reason_is_cut_between_characters(reason: str) -> None:
    (frame,) = read(close_frame(1000, reason))
    assert len(frame.data) <= 125
    said = Close.parse(frame.data).reason
    assert reason.startswith(said)
    assert len(reason.encode()) <= 123 or len(said.encode()) > 119


def test_the_accept_key_is_that_of_the_rfc() -> None:
    assert accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 §1.3
    assert accept_key("AAAAAAAAAAAAAAAAAAAAAA==") == reference_accept_key("AAAAAAAAAAAAAAAAAAAAAA==")
