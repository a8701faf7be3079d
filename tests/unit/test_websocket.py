"""The hand-over of a socket from aiohttp, over real sockets on uvloop; and the wheel that looks after peers.

Whatever of aiohttp's inside the hand-over leans on, a new version of it that changes that fails here.
"""

import asyncio
import functools
import gc
import logging
import shutil
import socket
import ssl
import subprocess
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvloop
from aiohttp import ClientSession, web
from websockets.asyncio.client import connect

from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.session import Session
from quotepush.push.site import make_app
from quotepush.push.subscriptions import Subscriptions
from quotepush.push.websocket import WebSocketLink
from quotepush.push.worker import Outside, PushWorker, clock_ms
from quotepush.settings import Settings, load
from tests.support.raw_websocket import BINARY, CLOSE, PING, PONG, TEXT, RawWebSocket, client_frame
from tests.support.waiting import wait_until

PING_REQUEST = b'{"action":"ping","id":1}'


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on uvloop; no task and no exception may be left behind."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        faults: list[dict[str, Any]] = []

        async def body() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
            await test(*args, **kwargs)
            await asyncio.sleep(0)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks are left: {left}"

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(body())
        assert not faults

    return run


class Served:
    """A worker behind a real listener, with a main that answers at once or when told."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.requests: list[weakref.ref[web.Request]] = []
        self.questions: list[Callable[[], None]] = []
        self.answers_at_once = True
        self.places = 0
        limits = Limits(settings.max_codes, settings.codes_per_request, settings.requests_per_s, settings.message_bytes)
        self.desk = Desk(
            subscriptions=Subscriptions(), limits=limits, server="0", epoch="e", heartbeat_ms=settings.heartbeat_ms,
            watch=lambda codes, books, since, then: self._ask(codes, then), look=self._ask, unwatch=lambda codes: None,
            subscribed=lambda fd: None, clock_ms=clock_ms,
        )  # fmt: skip
        self.worker = PushWorker(
            settings,
            "n.0.",
            1,
            self.desk,
            Outside(opened=lambda fd, codes: self.opened.append(fd), closed=self._closed),
        )
        self.runner: web.AppRunner
        self.port = 0

    def _closed(self, fd: str, peer: str) -> None:
        assert peer == "127.0.0.1"
        self.closed.append(fd)
        self.places -= 1

    def _ask(self, codes: Sequence[str], then: Callable[[Answer], None]) -> None:
        question = functools.partial(then, Answer(dict.fromkeys(codes, (0, None, None, "e")), {}))
        if self.answers_at_once:
            asyncio.get_running_loop().call_soon(question)
        else:
            self.questions.append(question)

    async def admit(self, address: str, take: bool) -> str:
        self.places += take
        return ""

    def leave(self, address: str) -> None:
        self.places -= 1

    @property
    def link(self) -> WebSocketLink:
        (link,) = self.worker.links.values()
        return link

    def offer(self, codes: str, seq: int, **fields: Any) -> None:
        """Rows of codes of one letter, as they come from main in one piece."""
        for code in codes:
            self.worker.hub.offer(code, seq, orjson.dumps({"code": code, "seq": seq, **fields}))
        self.worker.hub.flush_soon()

    async def gone(self) -> None:
        await wait_until(lambda: not self.worker.links, what="every link is gone")
        assert sorted(self.closed) == sorted(self.opened)
        assert self.places == 0
        assert self.desk.subscriptions.channels == {}
        assert self.worker.subscriptions.count == 0
        assert not any(self.worker._wheel)


@asynccontextmanager
async def served(*, tls: ssl.SSLContext | None = None, **flags: Any) -> AsyncIterator[Served]:
    options = {"requests_per_s": 1e6, "message_bytes": 4096, **flags}
    bench = Served(load(env={}, flags=options))
    accept = bench.worker.accept

    def remember(request: web.Request, *rest: Any) -> Any:
        bench.requests.append(weakref.ref(request))
        return accept(request, *rest)

    bench.worker.accept = remember  # type: ignore[method-assign]
    runner = bench.runner = web.AppRunner(
        make_app(bench.settings, bench.worker, bench.admit, bench.leave), access_log=None, handle_signals=False
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    bench.port = runner.addresses[0][1]
    try:
        yield bench
    finally:
        for link in list(bench.worker.links.values()):
            link.abort("test is over")
        await bench.gone()
        await runner.cleanup()


async def ping_pong(ws: RawWebSocket) -> None:
    await ws.send_frame(TEXT, PING_REQUEST)
    assert (await ws.read_message("pong"))["id"] == 1


# The hand-over


@on_uvloop
async def test_a_client_is_greeted_and_answered() -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        hello = await ws.read_message("hello")
        assert hello["conn"] == "n.0.1" == bench.opened[0]
        await ping_pong(ws)


@on_uvloop
async def test_bytes_right_behind_the_handshake_are_not_lost() -> None:
    behind = client_frame(TEXT, PING_REQUEST) + client_frame(PING, b"x") + client_frame(TEXT, PING_REQUEST)
    async with served() as bench, RawWebSocket(bench.port, behind=behind) as ws:
        assert orjson.loads((await ws.read_frame())[1])["type"] == "hello"
        assert orjson.loads((await ws.read_frame())[1])["type"] == "pong"
        assert await ws.read_frame() == (PONG, b"x")
        assert orjson.loads((await ws.read_frame())[1])["type"] == "pong"
        await ping_pong(ws)


@on_uvloop
async def test_a_frame_cut_in_two_by_the_handshake_is_put_together() -> None:
    frame = client_frame(TEXT, PING_REQUEST)
    for at in range(1, len(frame)):
        async with served() as bench, RawWebSocket(bench.port, behind=frame[:at]) as ws:
            await ws.read_message("hello")
            await ws.send_bytes(frame[at:])
            assert (await ws.read_message("pong"))["id"] == 1


@on_uvloop
async def test_a_close_right_behind_the_handshake_is_answered() -> None:
    behind = client_frame(CLOSE, (1000).to_bytes(2, "big"))
    async with served() as bench, RawWebSocket(bench.port, behind=behind) as ws:
        assert (await ws.read_close())[0] == 1000
        await bench.gone()


@on_uvloop
async def test_aiohttp_forgets_the_connection() -> None:
    async with served() as bench:
        before = len(asyncio.all_tasks())
        async with RawWebSocket(bench.port) as first, RawWebSocket(bench.port) as second:
            for ws in (first, second):
                await ping_pong(ws)
            assert bench.runner.server is not None
            assert bench.runner.server.connections == []
            assert len(asyncio.all_tasks()) == before
            gc.collect()
            assert [request() for request in bench.requests] == [None, None]
            await ping_pong(first)


@on_uvloop
async def test_the_end_of_the_http_server_leaves_open_sessions_to_the_worker() -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.read_message("hello")
        await bench.runner.cleanup()
        await ping_pong(ws)


@on_uvloop
async def test_a_second_request_on_the_same_connection_may_upgrade_it() -> None:
    async with served() as bench:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 426 " in head
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(
            b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        await bench.gone()


@on_uvloop
async def test_the_subprotocol_is_named_where_it_was_offered() -> None:
    async with served() as bench:
        async with connect(f"ws://127.0.0.1:{bench.port}/ws", subprotocols=["other", "quotes.v1.json"]) as ws:  # type: ignore[list-item]
            assert ws.subprotocol == "quotes.v1.json"
        async with connect(f"ws://127.0.0.1:{bench.port}/ws") as ws:
            assert ws.subprotocol is None


@on_uvloop
async def test_third_party_clients_talk_to_it() -> None:
    async with served() as bench:
        async with connect(f"ws://127.0.0.1:{bench.port}/ws") as ws:
            assert orjson.loads(await ws.recv())["type"] == "hello"
            await ws.send(PING_REQUEST.decode())
            assert orjson.loads(await ws.recv())["type"] == "pong"
            await (await ws.ping())
        async with ClientSession() as http, http.ws_connect(f"http://127.0.0.1:{bench.port}/ws") as other:
            assert (await other.receive_json())["type"] == "hello"
            await other.send_str(PING_REQUEST.decode())
            assert (await other.receive_json())["type"] == "pong"
        await bench.gone()


# What is read


@on_uvloop
async def test_a_message_in_fragments_is_one_message_and_pings_between_them_are_answered_at_once() -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.read_message("hello")
        await ws.send_frame(TEXT, PING_REQUEST[:5], fin=False)
        await ws.send_frame(PING, b"one")
        assert await ws.read_frame() == (PONG, b"one")
        await ws.send_frame(0, PING_REQUEST[5:9], fin=False)
        await ws.send_frame(0, b"", fin=False)
        await ws.send_frame(PING, b"")
        assert await ws.read_frame() == (PONG, b"")
        await ws.send_frame(0, PING_REQUEST[9:])
        assert (await ws.read_message("pong"))["id"] == 1


@on_uvloop
async def test_frames_that_trickle_in_byte_by_byte_are_read() -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.read_message("hello")
        for byte in client_frame(TEXT, PING_REQUEST):
            await ws.send_bytes(bytes((byte,)))
            await asyncio.sleep(0)
        assert (await ws.read_message("pong"))["id"] == 1


@on_uvloop
async def test_a_pong_that_nobody_asked_for_is_no_fault() -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.send_frame(PONG, b"hello")
        await ping_pong(ws)


@on_uvloop
async def test_a_message_of_the_largest_size_is_taken() -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.send_frame(TEXT, PING_REQUEST.ljust(4096))
        assert (await ws.read_message("pong"))["id"] == 1
        await ws.send_frame(TEXT, PING_REQUEST.ljust(2000), fin=False)
        await ws.send_frame(0, b" " * 2096)
        assert (await ws.read_message("pong"))["id"] == 1


def frames(*parts: tuple[int, bytes] | tuple[int, bytes, dict[str, Any]]) -> bytes:
    return b"".join(client_frame(part[0], part[1], **(part[2] if len(part) > 2 else {})) for part in parts)


@pytest.mark.parametrize(
    ("sent", "code", "reason"),
    [
        (frames((TEXT, PING_REQUEST.ljust(4097))), 1009, "too_large"),
        (frames((TEXT, b" " * 4000, {"fin": False}), (0, b" " * 97)), 1009, "too_large"),
        (frames((TEXT, b'"\xff"')), 1007, "bad_utf8"),
        (frames((TEXT, b'"\xe8\x8c', {"fin": False}), (0, b'"')), 1007, "bad_utf8"),
        (frames((BINARY, b"\x80")), 1003, "wrong_frame_kind"),
        (frames((BINARY, b"", {"fin": False}), (0, b"")), 1003, "wrong_frame_kind"),
        (frames((TEXT, PING_REQUEST, {"bits": 0x40})), 1002, "protocol_error"),  # compressed
        (frames((TEXT, PING_REQUEST, {"bits": 0x20})), 1002, "protocol_error"),
        (frames((3, b"")), 1002, "protocol_error"),
        (frames((11, b"")), 1002, "protocol_error"),
        (frames((0, b"")), 1002, "protocol_error"),  # the continuation of nothing
        (frames((TEXT, b"x", {"fin": False}), (TEXT, b"")), 1002, "protocol_error"),
        (frames((PING, b"x" * 126)), 1002, "protocol_error"),
        (frames((PING, b"", {"fin": False})), 1002, "protocol_error"),
        (frames((CLOSE, b"x")), 1002, "protocol_error"),
        (frames((CLOSE, (999).to_bytes(2, "big"))), 1002, "protocol_error"),
    ],
    ids=["large", "large in pieces", "not UTF-8", "not UTF-8 in pieces", "binary", "binary in pieces", "compressed",
         "reserved bit", "opcode 3", "opcode 11", "continues nothing", "not continued", "large ping", "ping in pieces",
         "close of one byte", "close with 999"],
)  # fmt: skip
@on_uvloop
async def test_a_broken_rule_of_the_frames_closes_with_its_code(sent: bytes, code: int, reason: str) -> None:
    async with served() as bench:
        async with RawWebSocket(bench.port) as ws:
            await ws.read_message("hello")
            # What stands behind it in the same piece is not looked at.
            await ws.send_bytes(sent + client_frame(TEXT, PING_REQUEST))
            assert await ws.read_close() == (code, reason)
            await ws.send_frame(CLOSE, code.to_bytes(2, "big"))
            with pytest.raises((EOFError, ConnectionError)):
                await ws.read_frame()
        await bench.gone()
        assert bench.worker.closed_total == {reason: 1}


@on_uvloop
async def test_after_a_broken_rule_the_connection_ends_at_once() -> None:
    async with served() as bench:
        async with RawWebSocket(bench.port) as ws:
            await ws.read_message("hello")
            # Larger than all buffers on the way: the close frame is there while the client still sends.
            sending = asyncio.create_task(ws.send_frame(TEXT, b" " * 6_000_000))
            assert await ws.read_close() == (1009, "too_large")
            with pytest.raises((EOFError, ConnectionError)):
                await ws.read_frame()
            await asyncio.gather(sending, return_exceptions=True)
        await bench.gone()


@on_uvloop
async def test_a_fault_of_ours_closes_one_session_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as bench, RawWebSocket(bench.port) as other:
        await other.read_message("hello")
        async with RawWebSocket(bench.port) as ws:
            await ws.read_message("hello")

            def fail(*_: Any) -> None:
                raise RuntimeError("a bug")

            bench.desk.watch = fail
            await ws.send_frame(TEXT, b'{"action":"subscribe","codes":["A"]}')
            assert await ws.read_close() == (1011, "internal")
        await ping_pong(other)
    assert "could not be handled" in caplog.text


# Closing


@pytest.mark.parametrize(
    ("payload", "answer"),
    [(b"", (1000, "")), ((1000).to_bytes(2, "big") + b"bye", (1000, "")), ((4000).to_bytes(2, "big"), (4000, "")),
     ((1001).to_bytes(2, "big"), (1001, ""))],
)  # fmt: skip
@on_uvloop
async def test_a_close_of_the_client_is_answered_and_the_connection_ended(
    payload: bytes, answer: tuple[int, str]
) -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.read_message("hello")
        await ws.request("subscribe", codes=["A"])
        await ws.read_message("snapshot")
        await ws.send_frame(CLOSE, payload)
        assert await ws.read_close() == answer
        with pytest.raises(EOFError):
            await ws.read_frame()
        await bench.gone()
        assert bench.worker.closed_total == {"closed": 1}


@on_uvloop
async def test_a_close_of_the_server_waits_for_the_answer() -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.read_message("hello")
        link = bench.link
        link.close(1012, "restart")
        assert await ws.read_close() == (1012, "restart")
        assert bench.worker.links != {}
        await ws.send_frame(TEXT, PING_REQUEST)  # too late: nobody answers
        await ws.send_frame(CLOSE, (1012).to_bytes(2, "big"))
        with pytest.raises(EOFError):
            await ws.read_frame()
        await bench.gone()
        assert (link.closed_by, link.reason) == ("server", "restart")


@on_uvloop
async def test_who_does_not_answer_a_close_is_cut_off() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quotepush.push.link._CLOSE_TIMEOUT_S", 0.05)
        async with served() as bench, RawWebSocket(bench.port) as ws:
            await ws.read_message("hello")
            bench.link.close(1012, "restart")
            await bench.gone()
            assert bench.worker.closed_total == {"restart": 1}


@on_uvloop
async def test_nothing_is_written_after_the_close_frame() -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.read_message("hello")
        await ws.request("subscribe", codes=["A"])
        await ws.read_message("snapshot")
        link = bench.link
        session = link.session
        bench.offer("A", 1)
        link.close(1012, "restart")
        bench.offer("A", 2)
        link.write(b"\x81\x02{}")
        session.outbox.write(b"\x81\x02{}")
        session.say_closing(1000)
        link.close(1001, "going_away")
        bench.worker._look_after({link}, asyncio.get_running_loop().time())
        await ws.send_frame(PING, b"x")
        await ws.send_frame(TEXT, PING_REQUEST)
        seen = []
        with suppress(EOFError):
            while True:
                opcode, payload = await ws.read_frame()
                seen.append(opcode)
                if opcode == CLOSE:
                    assert payload == (1012).to_bytes(2, "big") + b"restart"
                    await ws.send_frame(CLOSE, payload)
        assert seen == [TEXT, CLOSE]


@pytest.mark.parametrize("how", ["reset", "end", "half"])
@on_uvloop
async def test_a_client_that_vanishes_leaves_no_trace(how: str) -> None:
    async with served() as bench:
        async with RawWebSocket(bench.port) as ws:
            await ws.read_message("hello")
            await ws.request("subscribe", codes=["A", "B"])
            await ws.read_message("snapshot")
            link = bench.link
            if how == "half":
                await ws.send_bytes(client_frame(TEXT, PING_REQUEST)[:7])
            if how == "reset":
                ws.reset()
        await bench.gone()
        assert link.closed_by in ("network", "client")
        bench.offer("A", 1)  # disturbs nobody


@on_uvloop
async def test_a_client_that_vanishes_while_main_is_asked_leaves_no_trace() -> None:
    async with served() as bench:
        bench.answers_at_once = False
        async with RawWebSocket(bench.port) as ws:
            await ws.read_message("hello")
            await ws.request("subscribe", codes=["A"])
            await wait_until(lambda: bench.questions, what="main is asked")
            ws.reset()
        # Nothing is read from a client whose request waits for main, so the end is seen with the answer at the latest.
        bench.questions.pop()()
        await bench.gone()


@on_uvloop
async def test_the_steps_of_a_clean_up_do_not_hinder_each_other(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.read_message("hello")
        await ws.request("subscribe", codes=["A"])
        await ws.read_message("snapshot")

        def fail(*_: Any) -> None:
            raise RuntimeError("a bug")

        bench.desk.unwatch = fail
        ws.reset()
        await bench.gone()
    assert "a step of its clean-up failed" in caplog.text


# Slow peers


@on_uvloop
async def test_a_peer_that_does_not_read_is_not_read_either() -> None:
    async with served() as bench, RawWebSocket(bench.port, receive_buffer_bytes=4096) as ws:
        await ws.read_message("hello")
        transport = bench.link._transport
        request = client_frame(TEXT, orjson.dumps({"action": "snapshot", "codes": ["no such"] * 300}))

        async def flood() -> None:
            while True:
                await ws.send_bytes(request)

        flooding = asyncio.create_task(flood())
        await wait_until(lambda: not transport.is_reading(), what="reading is paused")
        bound = transport.get_write_buffer_size()
        assert 262_144 < bound < 2 * 262_144
        await asyncio.sleep(0.05)
        assert transport.get_write_buffer_size() <= bound
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        # Through 4 KiB at a time what waits takes seconds, and half a minute on a busy machine.
        ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

        async def read_all() -> None:
            while not transport.is_reading():
                await ws.read_frame()

        await asyncio.wait_for(read_all(), 60)


@on_uvloop
async def test_a_slow_peer_gets_the_newest_rows_once_it_reads_again() -> None:
    async with (
        served(merge_above_rows=50, max_flush_delay_ms=0) as bench,
        RawWebSocket(bench.port, receive_buffer_bytes=4096) as slow,
        RawWebSocket(bench.port) as fast,
    ):
        for ws in (slow, fast):
            await ws.read_message("hello")
            await ws.request("subscribe", codes=["A", "B"])
            await ws.read_message("snapshot")
        outbox = bench.worker.links["n.0.1"].session.outbox
        seq = 0
        while not (outbox.is_blocked and outbox.held is not None):
            seq += 1
            bench.offer("AB", seq, x="y" * 20_000)
            assert outbox.pending <= 52
            assert (await fast.read_message("tick"))["data"][-1]["seq"] == seq
            if seq > 5000:
                raise AssertionError("the socket never fills")
        for _ in range(200):
            seq += 1
            bench.offer("AB", seq)
            assert outbox.pending <= 2
        last = {"A": 0, "B": 0}
        states: list[str] = []
        while states != ["conflating", "realtime"]:
            opcode, payload = await slow.read_frame()
            message = orjson.loads(payload)
            assert opcode == TEXT
            if message["type"] == "status":
                states.append(message["state"])
            for row in message.get("data", ()):
                assert row["prev"] == last[row["code"]] < row["seq"]
                last[row["code"]] = row["seq"]
        assert last == {"A": seq, "B": seq}
        bench.offer("A", seq + 1)
        assert (await slow.read_message("tick"))["data"] == [{"prev": seq, "code": "A", "seq": seq + 1}]


@on_uvloop
async def test_requests_wait_in_the_kernel_while_main_is_asked() -> None:
    async with served() as bench, RawWebSocket(bench.port) as ws:
        await ws.read_message("hello")
        bench.answers_at_once = False
        await ws.request("subscribe", id=1, codes=["A"])
        await wait_until(lambda: bench.questions, what="main is asked")
        assert not bench.link._transport.is_reading()
        await ws.request("ping", id=2)
        bench.questions.pop()()
        assert bench.link._transport.is_reading()
        for kind, request_id in (("ack", 1), ("pong", 2)):
            assert (await ws.read_message(kind))["id"] == request_id


# TLS


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("needs openssl for a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@on_uvloop
async def test_a_session_over_tls_is_a_session_like_any_other(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(cert, key)
    client = ssl.create_default_context(cafile=str(cert))
    async with served(tls=server, max_flush_delay_ms=0) as bench:
        async with connect(f"wss://127.0.0.1:{bench.port}/ws", ssl=client) as ws:
            await ws.recv()
            await ws.send('{"action":"subscribe","codes":["A"],"snapshot":false}')
            assert orjson.loads(await ws.recv())["type"] == "ack"
            outbox = bench.link.session.outbox
            for seq in range(1, 301):
                bench.offer("A", seq, x="y" * 1000)
                if seq % 10 == 0:
                    await asyncio.sleep(0)
            rows = []
            while len(rows) < 300:
                message = orjson.loads(await asyncio.wait_for(ws.recv(), 10))
                assert message["type"] == "tick", message
                rows += [row["seq"] for row in message["data"]]
            assert rows == list(range(1, 301))
            assert not outbox.is_blocked
        await bench.gone()


# The wheel


class FakeTransport:
    """A transport that takes as much as the test says."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.unsent = 0
        self.is_aborted = False
        self.is_closed = False
        self.limits: tuple[int, int] | None = None
        self.reads = True

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        self.limits = (high, low)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "socket":
            raise OSError("no socket")
        return default

    def is_closing(self) -> bool:
        return self.is_aborted or self.is_closed

    def pause_reading(self) -> None:
        assert self.reads
        self.reads = False

    def resume_reading(self) -> None:
        assert not self.reads
        self.reads = True

    def abort(self) -> None:
        self.is_aborted = True

    def close(self) -> None:
        self.is_closed = True

    def can_write_eof(self) -> bool:
        return False


class FakeFloor:
    def __init__(self) -> None:
        self.unblocks = 0
        self.closes = 0

    def opened(self, link: WebSocketLink) -> None: ...

    def unblocked(self, outbox: Any) -> None:
        self.unblocks += 1

    def closed(self, link: WebSocketLink) -> None:
        self.closes += 1


class Peer:
    """A link on a fake transport, looked after at times of the test's choice."""

    def __init__(self) -> None:
        self.floor = FakeFloor()
        self.transport = FakeTransport()
        self.link = WebSocketLink(self.floor, "test")
        desk = Desk(
            subscriptions=Subscriptions(), limits=Limits(1, 1, 1e6, 4096), server="0", epoch="e", heartbeat_ms=5000,
            watch=lambda codes, books, since, then: None, look=lambda codes, then: None, unwatch=lambda codes: None,
            subscribed=lambda fd: None, clock_ms=lambda: 0,
        )  # fmt: skip
        self.link.session = Session("n.0.1", self.link, desk)
        self.link.attach(self.transport)  # type: ignore[arg-type]
        self.link.read_with(asyncio.get_running_loop(), 4096)
        self.link.heard_s = 1000.0

    def check(self, after_s: float) -> bytes:
        return self.link.check(1000.0 + after_s, stall_timeout_s=30, ping_interval_s=15, ping_timeout_s=30)

    @property
    def is_cut(self) -> bool:
        return self.transport.is_aborted

    def hear(self, after_s: float) -> None:
        """Any byte of the client."""
        self.link.data_received(client_frame(PONG, b""))
        self.link.heard_s = 1000.0 + after_s


async def test_a_peer_that_talks_is_not_pinged() -> None:
    peer = Peer()
    for after_s in range(0, 100, 5):
        assert peer.check(after_s) == b""
        peer.hear(after_s)


async def test_a_silent_peer_is_pinged_and_an_answer_is_enough() -> None:
    peer = Peer()
    assert peer.check(14.9) == b""
    assert peer.check(15) == b"\x89\x00"
    assert peer.check(20) == b""
    peer.hear(21)
    assert peer.check(30) == b""
    assert peer.check(36) == b"\x89\x00"
    assert not peer.is_cut


async def test_a_peer_that_never_answers_a_ping_is_dropped() -> None:
    peer = Peer()
    peer.check(15)
    for after_s in (20, 30, 40, 44.9):
        assert peer.check(after_s) == b""
        assert not peer.is_cut
    peer.check(45)
    assert peer.is_cut
    assert (peer.link.closed_by, peer.link.reason) == ("server", "no_pong")


async def test_a_socket_that_takes_nothing_at_all_is_aborted() -> None:
    peer = Peer()
    peer.transport.unsent = 1000
    for after_s in (0, 10, 20, 29.9):
        peer.check(after_s)
        assert not peer.is_cut
    peer.check(30)
    assert peer.is_cut
    assert (peer.link.closed_by, peer.link.reason) == ("server", "stalled")
    assert peer.link.session.is_closed


async def test_a_socket_that_takes_a_little_is_not_aborted() -> None:
    peer = Peer()
    peer.transport.unsent = 1000
    for after_s in range(0, 500, 10):
        peer.check(after_s)
        peer.transport.unsent -= 10
    assert not peer.is_cut


async def test_a_socket_that_was_empty_in_between_has_not_stalled() -> None:
    peer = Peer()
    peer.transport.unsent = 1000
    peer.check(0)
    peer.check(25)
    peer.link.resume_writing()
    peer.transport.unsent = 1000
    peer.check(31)
    peer.check(60)
    assert not peer.is_cut
    peer.check(61)
    assert peer.is_cut


async def test_a_missing_pong_does_not_count_while_our_output_does_not_drain() -> None:
    peer = Peer()
    assert peer.check(15) == b"\x89\x00"
    for after_s in range(20, 100, 5):
        peer.transport.unsent = 100_000 - after_s  # it drains, slowly, and the ping stands behind it
        assert peer.check(after_s) == b""
    peer.transport.unsent = 0
    peer.check(100)
    assert not peer.is_cut
    peer.check(130)
    assert peer.is_cut
    assert peer.link.reason == "no_pong"


async def test_a_peer_that_is_gone_already_is_left_alone() -> None:
    peer = Peer()
    peer.link.abort("test")
    peer.transport.unsent = 1000
    assert peer.check(1000) == b""
    assert peer.check(2000) == b""
    assert peer.link.reason == "test"


async def test_a_write_that_is_not_taken_whole_blocks_the_outbox_until_it_is() -> None:
    peer = Peer()
    assert peer.transport.limits == (0, 0)
    outbox = peer.link.session.outbox
    peer.link.pause_writing()
    assert outbox.is_blocked
    peer.link.resume_writing()
    assert not outbox.is_blocked
    assert peer.floor.unblocks == 1


async def test_a_sealed_link_writes_nothing_and_unblocks_nobody() -> None:
    peer = Peer()
    peer.link.close(1012, "restart")
    written = list(peer.transport.written)
    assert written == [b"\x88\x09\x03\xf4restart"]
    peer.link.write(b"x")
    peer.link.close(1001, "going_away")
    peer.link.pause_writing()
    peer.link.resume_writing()
    peer.link.data_received(client_frame(PING, b"x") + client_frame(TEXT, PING_REQUEST))
    assert peer.transport.written == written
    assert peer.floor.unblocks == 0
    peer.link.connection_lost(None)
    assert peer.floor.closes == 1


async def test_what_comes_with_a_bad_message_in_one_piece_is_not_looked_at() -> None:
    peer = Peer()
    peer.link.data_received(client_frame(BINARY, b"x") + client_frame(TEXT, PING_REQUEST) + client_frame(PING, b"x"))
    assert peer.transport.written == [b"\x88\x12\x03\xebwrong_frame_kind"]
    peer.link.connection_lost(None)


@on_uvloop
async def test_everybody_gets_heartbeats_with_the_state_of_the_feed() -> None:
    async with served(heartbeat_ms=100) as bench:
        wheel = asyncio.create_task(bench.worker.turn_wheel())
        async with RawWebSocket(bench.port) as first, RawWebSocket(bench.port) as second:
            for ws in (first, second):
                beat = await ws.read_message("heartbeat")
                assert beat["feed"] == "down"
                assert "feed_age_ms" not in beat
            bench.worker.feed.state, bench.worker.feed.last_tick_ms = "ok", clock_ms() - 500
            while (beat := await first.read_message("heartbeat"))["feed"] != "ok":
                pass
            assert 500 <= beat["feed_age_ms"] < 20_000
        wheel.cancel()
        await asyncio.gather(wheel, return_exceptions=True)


@on_uvloop
async def test_a_peer_that_does_not_answer_pings_is_dropped_by_the_wheel() -> None:
    async with served(heartbeat_ms=100, ping_interval_s=0.1, ping_timeout_s=3.0) as bench:
        wheel = asyncio.create_task(bench.worker.turn_wheel())
        async with RawWebSocket(bench.port) as dead, connect(f"ws://127.0.0.1:{bench.port}/ws") as alive:
            # The raw client answers nothing by itself, the other one answers its pings.
            await wait_until(lambda: len(bench.worker.links) == 1, what="the dead one is dropped")
            assert await dead.is_cut()
            for _ in range(10):
                assert await asyncio.wait_for(alive.recv(), 5)
        assert bench.worker.closed_total["no_pong"] == 1
        wheel.cancel()
        await asyncio.gather(wheel, return_exceptions=True)


@on_uvloop
async def test_one_failing_link_does_not_stop_the_wheel(caplog: pytest.LogCaptureFixture) -> None:
    async with served(heartbeat_ms=100) as bench, RawWebSocket(bench.port) as ws:
        await ws.read_message("hello")
        wheel = asyncio.create_task(bench.worker.turn_wheel())
        settings = bench.worker._settings
        bench.worker._settings = None  # type: ignore[assignment]
        await wait_until(lambda: "could not be looked after" in caplog.text)
        bench.worker._settings = settings
        assert await ws.read_message("heartbeat")
        wheel.cancel()
        await asyncio.gather(wheel, return_exceptions=True)


@on_uvloop
async def test_draining_says_goodbye_and_cuts_off_who_stays() -> None:
    async with served() as bench, RawWebSocket(bench.port) as stays, connect(f"ws://127.0.0.1:{bench.port}/ws") as goes:
        await stays.read_message("hello")
        await goes.recv()
        await bench.worker.drain(0.1, 1500)
        assert bench.worker.is_draining
        await wait_until(lambda: not bench.worker.links)
        closing = orjson.loads(await goes.recv())
        assert (closing["state"], closing["retry_after_ms"]) == ("closing", 1500)
        await goes.wait_closed()
        assert (goes.close_code, goes.close_reason) == (1012, "restart")
        assert await stays.read_message("status")
        assert await stays.read_close() == (1012, "restart")


@on_uvloop
async def test_clients_of_a_server_that_ends_are_told_to_come_back_one_after_the_other() -> None:
    async with served() as bench, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(RawWebSocket(bench.port)) for _ in range(40)]
        for client in clients:
            await client.read_message("hello")
        await bench.worker.drain(0.1, 1000)
        told = sorted([(await client.read_message("status"))["retry_after_ms"] for client in clients])
        assert told == [1000 + n // 2 for n in range(40)]


def test_the_log_of_an_end_names_reason_and_counts_and_no_payload(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "quotepush.session")

    @on_uvloop
    async def run() -> None:
        async with served() as bench, RawWebSocket(bench.port) as ws:
            await ws.read_message("hello")
            await ws.request("subscribe", codes=["A"], note="private words")
            await ws.read_message("snapshot")
            await ws.send_frame(CLOSE, (1000).to_bytes(2, "big"))
            await ws.read_close()
            await bench.gone()

    run()
    assert "n.0.1: open from 127.0.0.1" in caplog.text
    assert "n.0.1: closed by client: closed after" in caplog.text
    assert "private words" not in caplog.text
