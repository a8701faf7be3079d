"""How a worker takes connections: a few a turn, through shortages and past broken peers, from sockets that are lent."""

import asyncio
import logging
import os
import resource
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from quotepush.node.accept import TAKEN_PER_TURN, Acceptor
from quotepush.node.sockets import open_sockets
from tests.support.waiting import wait_until
from tests.unit.test_websocket import on_uvloop


class Host:
    """Listening sockets of an owner, and an acceptor that serves what comes to them."""

    def __init__(self, sockets: int, options: dict[str, Any]) -> None:
        self.listening = open_sockets("127.0.0.1", 0, sockets, 1024)
        self.acceptor = Acceptor(self.welcome, **options)
        self.guests: list[Guest] = []
        self.left = 0

    @property
    def address(self) -> Any:
        return self.listening[0].getsockname()

    def welcome(self) -> "Guest":
        return Guest(self)

    def open(self) -> None:
        for listening in self.listening:
            self.acceptor.open(listening.fileno(), 1024)


class Guest(asyncio.Protocol):
    """Says back what it hears."""

    def __init__(self, host: Host) -> None:
        self._host = host
        host.guests.append(self)
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's only looks like an asyncio.Transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._host.left += 1


@asynccontextmanager
async def host(sockets: int = 1, **options: Any) -> AsyncIterator[Host]:
    """Nothing is taken until the test says ``open``."""
    found = Host(sockets, options)
    try:
        yield found
    finally:
        await found.acceptor.stop()
        for guest in found.guests:
            if hasattr(guest, "transport"):
                guest.transport.abort()
        for listening in found.listening:
            listening.close()
        await asyncio.sleep(0)


@contextmanager
def crowd(address: Any, count: int) -> Iterator[list[socket.socket]]:
    """So many connections that have said something already."""
    clients: list[socket.socket] = []
    try:
        for _ in range(count):
            clients.append(socket.create_connection(address, timeout=10))
            clients[-1].sendall(b"?")
            clients[-1].setblocking(False)
        yield clients
    finally:
        for client in clients:
            client.close()


async def hears(client: socket.socket) -> bytes:
    """The next bytes that a client gets; none at the end, however it comes."""
    try:
        async with asyncio.timeout(10):
            return await asyncio.get_running_loop().sock_recv(client, 100)
    except ConnectionError:
        return b""


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def most_per_turn(house: Host, count: int) -> int:
    """Turn after turn until ``count`` guests are there; the most that came in one."""
    most = before = 0
    async with asyncio.timeout(20):
        while len(house.guests) < count:
            await asyncio.sleep(0)
            most = max(most, len(house.guests) - before)
            before = len(house.guests)
    return most


# A few a turn


@on_uvloop
async def test_a_storm_is_taken_a_few_a_turn_and_others_run_in_between() -> None:
    async with host() as house:
        with crowd(house.address, 200) as clients:
            house.open()
            assert await most_per_turn(house, 200) == TAKEN_PER_TURN
            assert [await hears(client) for client in clients] == [b"?"] * 200


@on_uvloop
async def test_several_sockets_share_what_is_taken_in_a_turn() -> None:
    async with host(sockets=3) as house:
        with crowd(house.address, 300):  # the kernel spreads them
            house.open()
            assert await most_per_turn(house, 300) <= TAKEN_PER_TURN


@on_uvloop
async def test_who_says_nothing_is_taken_too_so_that_its_time_can_run_out() -> None:
    async with host() as house:
        house.open()
        with socket.create_connection(house.address, timeout=10):
            await wait_until(lambda: house.guests)


@on_uvloop
async def test_what_is_taken_sends_at_once_and_is_kept_alive() -> None:
    async with host() as house:
        house.open()
        with crowd(house.address, 1) as (client,):
            assert await hears(client) == b"?"
            taken = house.guests[0].transport.get_extra_info("socket")
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@on_uvloop
async def test_two_who_share_a_socket_take_each_connection_once() -> None:
    async with host() as house:
        sibling = Acceptor(house.welcome)
        house.open()
        sibling.open(house.listening[0].fileno(), 1024)
        with crowd(house.address, 100) as clients:
            assert [await hears(client) for client in clients] == [b"?"] * 100
        await wait_until(lambda: house.left == 100)
        assert len(house.guests) == 100
        await sibling.stop()


# What goes wrong


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@on_uvloop
async def test_without_a_free_file_it_rests_says_so_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    async with host(rest_s=0.05) as house:
        house.open()
        with crowd(house.address, 1) as (old,):
            assert await hears(old) == b"?"
            for _ in range(2):
                waiting = socket.socket()
                waiting.setblocking(False)
                with no_more_files():
                    await loop.sock_connect(waiting, house.address)
                    await loop.sock_sendall(waiting, b"?")
                    await wait_until(lambda: house.acceptor.is_resting)
                    await loop.sock_sendall(old, b"!")
                    assert await hears(old) == b"!"
                assert await hears(waiting) == b"?"
                waiting.close()
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(errors) == 1
    assert "Too many open files" in errors[0]


@on_uvloop
async def test_a_socket_that_comes_during_a_rest_is_served_after_it() -> None:
    loop = asyncio.get_running_loop()
    async with host(sockets=2, rest_s=0.05) as house:
        first, second = (listening.fileno() for listening in house.listening)
        house.acceptor.open(first, 1024)
        clients = [socket.socket() for _ in range(40)]  # the kernel spreads them over both
        with no_more_files():
            for client in clients:
                client.setblocking(False)
                await loop.sock_connect(client, house.address)
                await loop.sock_sendall(client, b"?")
            await wait_until(lambda: house.acceptor.is_resting)
        house.acceptor.open(second, 1024)
        assert house.acceptor.is_resting
        assert [await hears(client) for client in clients] == [b"?"] * 40
        for client in clients:
            client.close()


@on_uvloop
async def test_a_stop_during_a_rest_ends_it() -> None:
    async with host(rest_s=1000) as house:
        house.open()
        client = socket.socket()
        client.setblocking(False)
        with no_more_files():
            await asyncio.get_running_loop().sock_connect(client, house.address)
            await asyncio.get_running_loop().sock_sendall(client, b"?")
            await wait_until(lambda: house.acceptor.is_resting)
        await house.acceptor.stop()
        assert not house.acceptor.is_resting
        assert house.guests == []
        client.close()


@on_uvloop
async def test_peers_that_are_gone_before_they_are_taken_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with host() as house:
        with crowd(house.address, 60) as clients:
            for client in clients[::2]:
                reset(client)
            house.open()
            assert [await hears(client) for client in clients[1::2]] == [b"?"] * 30
        await wait_until(lambda: house.left == len(house.guests))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@on_uvloop
async def test_a_bug_met_with_one_connection_is_that_connections_end_only(caplog: pytest.LogCaptureFixture) -> None:
    async with host() as house:
        bugs = iter([RuntimeError("a bug")])

        def welcome() -> Guest:
            for bug in bugs:
                raise bug
            return Guest(house)

        acceptor = Acceptor(welcome)
        acceptor.open(house.listening[0].fileno(), 1024)
        with crowd(house.address, 2) as clients:
            assert {await hears(client) for client in clients} == {b"", b"?"}
        assert [r.getMessage() for r in caplog.records] == ["a connection could not be handed to its protocol"]
        await acceptor.stop()


# TLS


@pytest.fixture
def tls(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The context of the server, and of a client that trusts it."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("needs openssl for a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=cert)


async def echo_over_tls(address: Any, context: ssl.SSLContext) -> bytes:
    reader, writer = await asyncio.open_connection(*address, ssl=context)
    writer.write(b"?")
    heard = await reader.read(100)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return heard


@on_uvloop
async def test_tls_peers_are_served(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = tls
    async with host(tls=server) as house:
        house.open()
        assert await asyncio.gather(*(echo_over_tls(house.address, client) for _ in range(40))) == [b"?"] * 40
        await wait_until(lambda: house.left == 40)


@on_uvloop
async def test_who_cannot_speak_tls_or_never_finishes_its_handshake_is_cut_off(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], caplog: pytest.LogCaptureFixture
) -> None:
    server, client = tls
    async with host(tls=server, tls_timeout_s=0.2) as house:
        house.open()
        with crowd(house.address, 30) as (plain, beginning, *gone):
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            beginning.sendall(b"\x16\x03\x01")
            for one in gone:
                reset(one)
            while await hears(plain):  # an alert comes first
                pass
            while await hears(beginning):
                pass
        house.acceptor._tls_timeout_s = 60.0  # for one who does it right, but on a busy machine
        assert await echo_over_tls(house.address, client) == b"?"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@on_uvloop
async def test_a_stop_cuts_off_who_has_not_finished_its_tls_handshake(
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    async with host(tls=tls[0]) as house:
        house.open()
        with socket.create_connection(house.address, timeout=10) as client:
            client.sendall(b"\x16\x03\x01")  # the first bytes of a handshake record
            client.setblocking(False)
            await wait_until(lambda: house.guests)
            await house.acceptor.stop()
            assert await hears(client) == b""


# Giving back


@on_uvloop
async def test_after_a_stop_nothing_is_taken_and_the_socket_is_its_owners_still() -> None:
    async with host() as house:
        house.open()
        with crowd(house.address, 1) as (before,):
            assert await hears(before) == b"?"
            await house.acceptor.stop()
            with crowd(house.address, 1) as (after,):
                taken, _ = await asyncio.get_running_loop().sock_accept(house.listening[0])
                taken.sendall(b"the owner's")
                assert await hears(after) == b"the owner's"
                taken.close()
            assert len(house.guests) == 1
            before.sendall(b"!")
            assert await hears(before) == b"!"  # who was served is served


@on_uvloop
async def test_a_lent_socket_is_given_back_alone_and_can_be_lent_again() -> None:
    async with host(sockets=2) as house:
        own, lent = (listening.fileno() for listening in house.listening)
        house.open()
        assert own in house.acceptor and lent in house.acceptor
        house.acceptor.close(lent)
        assert own in house.acceptor and lent not in house.acceptor
        with crowd(house.address, 100) as clients:  # the kernel spreads them over both
            await wait_until(lambda: house.guests)
            house.acceptor.open(lent, 1024)
            assert [await hears(client) for client in clients] == [b"?"] * 100
