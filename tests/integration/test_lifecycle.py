"""How the server starts, refuses to start, and ends: what an operator sees, and what it leaves behind."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from tests.support.command import Outcome, run_quotepush
from tests.support.ports import own_port
from tests.support.processes import command_line, is_alive
from tests.support.raw_websocket import RawWebSocket
from tests.support.redis_server import RedisServer
from tests.support.registry_truth import registry_equals
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish, steady_feed
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

StartServer = Callable[..., Awaitable[QuotepushServer]]

# Looks like nothing else, and holds every letter that a URL cannot carry as it is.
PASSWORD = "Tr0ub4dor/&#3:@ %zebra"
PASSWORD_PARTS = ("Tr0ub4dor", "zebra")


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        yield stranger.getsockname()[1]


def spawn(command: list[str], stdout: Path, stderr: Path | None = None, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command whose output goes to files."""
    with open(stdout, "wb") as out, open(stderr or stdout, "ab") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, **options)


def self_signed_certificate(openssl: str, directory: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1; return it and its key."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def flags(server: QuotepushServer, **settings: Any) -> list[str]:
    """The flags of ``server``, some of them changed: a second start beside it."""
    other = QuotepushServer(server.directory, "", **{**server.settings, **settings})
    return other.command()[3:]


def assert_one_line(text: str) -> str:
    """What an operator is told is one line, without a traceback."""
    assert "Traceback" not in text
    (line,) = text.splitlines()
    return line


# One instance


async def test_a_second_start_names_the_first_and_disturbs_nothing(
    quotepush_server: QuotepushServer, redis_server: RedisServer
) -> None:
    server = quotepush_server
    async with (
        redis_server.client() as redis,
        connected_clients(server.ws_url, 6, lambda n: ["AAPL"]) as clients,
        steady_feed(redis_server.url, ["AAPL"], 100) as feed,
    ):
        truth = {client.fd: {"AAPL"} for client in clients}
        await registry_equals(redis, truth)
        before = set(server.worker_pids())
        for _ in range(2):
            outcome = await run_quotepush(*flags(server))
            assert outcome.status == 3
            assert outcome.stdout == ""
            line = assert_one_line(outcome.stderr)
            assert "Process already exist" in line
            assert str(server.pid) in line
            assert server.settings["lock_file"] in line
        assert set(server.worker_pids()) == before
        await registry_equals(redis, truth)
        seen = [client.received for client in clients]
        await wait_until(lambda: all(c.received > n for c, n in zip(clients, seen, strict=True)))
        assert feed.published
        assert all(client.is_open for client in clients)
        assert (await server.admin("/readyz"))[0] == 200


async def test_the_lock_comes_before_everything_else(quotepush_server: QuotepushServer) -> None:
    # The second one's Redis and port are both wrong, but it never gets so far.
    outcome = await run_quotepush(
        *flags(quotepush_server, feed_redis=f"redis://127.0.0.1:{own_port()}/0", port=quotepush_server.port)
    )
    assert outcome.status == 3
    assert "Process already exist" in assert_one_line(outcome.stderr)


async def test_the_lock_file_stays_names_its_holder_and_can_be_used_again(start_server: StartServer) -> None:
    server = await start_server(workers=1)
    path = Path(server.settings["lock_file"])
    assert path.read_text().splitlines() == [str(server.pid), f"127.0.0.1:{server.admin_port}"]
    inode = path.stat().st_ino
    assert await server.stop() == 0
    assert path.stat().st_ino == inode
    assert path.read_text() == ""
    await server.start()
    assert path.stat().st_ino == inode
    assert path.read_text().splitlines()[0] == str(server.pid)


async def test_the_lock_of_a_killed_main_is_free(start_server: StartServer) -> None:
    server = await start_server(workers=1)
    first = server.pid
    await server.kill()
    path = Path(server.settings["lock_file"])
    assert path.read_text().splitlines()[0] == str(first)  # it had no time to clear it
    await server.start()
    assert path.read_text().splitlines()[0] == str(server.pid)


@pytest.mark.parametrize("place", ["missing/lock", "file/lock", "directory", "link"])
async def test_a_lock_file_that_cannot_be_made_has_an_error_of_its_own(
    place: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    path = str(tmp_path / place)
    outcome = await run_quotepush("serve", f"--redis={redis_server.url}", "--port=0", f"--lock-file={path}")
    assert (outcome.status, outcome.stdout) == (1, "")
    line = assert_one_line(outcome.stderr)
    assert "lock file" in line
    assert path in line
    assert not (tmp_path / "elsewhere").exists()


# Starts that fail


async def test_a_redis_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{own_port()}/0"
    outcome = await run_quotepush(
        "serve", f"--redis={url}", "--port=0", "--admin-port=0", f"--lock-file={tmp_path / 'lock'}", timeout_s=15
    )
    assert (outcome.status, outcome.stdout) == (1, "")
    line = assert_one_line(outcome.stderr)
    assert url in line
    assert "--redis" in line


async def test_a_redis_that_does_not_answer_is_one_line(tmp_path: Path, redis_server: RedisServer) -> None:
    redis_server.pause()
    outcome = await run_quotepush(
        "serve", f"--redis={redis_server.url}", "--port=0", "--admin-port=0", f"--lock-file={tmp_path / 'lock'}",
        "--redis-timeout-s=0.5", timeout_s=15,
    )  # fmt: skip
    assert (outcome.status, outcome.stdout) == (1, "")
    assert redis_server.url in assert_one_line(outcome.stderr)


async def test_a_registry_redis_that_is_not_there_is_named_as_such(tmp_path: Path, redis_server: RedisServer) -> None:
    url = f"redis://127.0.0.1:{own_port()}/0"
    outcome = await run_quotepush(
        "serve", f"--redis={redis_server.url}", f"--registry-redis={url}", "--port=0", "--admin-port=0",
        f"--lock-file={tmp_path / 'lock'}", timeout_s=15,
    )  # fmt: skip
    assert outcome.status == 1
    line = assert_one_line(outcome.stderr)
    assert url in line
    assert "registry_redis" in line


async def test_a_registry_that_takes_no_writes_is_one_line(tmp_path: Path, redis_server: RedisServer) -> None:
    async with redis_server.client() as redis:
        await redis.sadd("qp:node:test", "0.1")  # something to clear
        await redis.sadd("qp:node:test:0.1", "test.0.1")
        await redis.replicaof("127.0.0.1", own_port())
    outcome = await run_quotepush(
        "serve", f"--redis={redis_server.url}", "--port=0", "--admin-port=0", f"--lock-file={tmp_path / 'lock'}",
        "--node=test", timeout_s=15,
    )  # fmt: skip
    assert (outcome.status, outcome.stdout) == (1, "")
    assert redis_server.url in assert_one_line(outcome.stderr)


async def test_a_port_that_is_taken_is_one_line(tmp_path: Path, redis_server: RedisServer) -> None:
    with taken_port() as port:

        async def start(which: str) -> Outcome:
            ports = {"port": 0, "admin-port": 0, which: port}
            return await run_quotepush(
                "serve", f"--redis={redis_server.url}", f"--lock-file={tmp_path / which}", f"--node={which}",
                *(f"--{name}={number}" for name, number in ports.items()),
            )  # fmt: skip

        # Both at the same time, for each is patient for some seconds: the old server may just be ending.
        names = ("port", "admin-port")
        outcomes = await asyncio.gather(*map(start, names))
    for which, outcome in zip(names, outcomes, strict=True):
        assert (outcome.status, outcome.stdout) == (1, "")
        line = assert_one_line(outcome.stderr)
        assert str(port) in line
        assert line.endswith(f" --{which}")
    async with redis_server.client() as redis:
        assert await redis.keys("*") == []


async def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    config = tmp_path / "quotepush.toml"
    config.write_text('port = "many"\nwrokers = 2\nfeed_redis = "http://redis"\nping_timeout_s = 0\n')
    outcome = await run_quotepush(
        "serve", f"--config={config}", "--node=not a node", "--tls-cert=nowhere.pem",
        env={"QUOTEPUSH_MAX_CODES": "0", "QUOTEPUSH_NOTHING": "1"},
    )  # fmt: skip
    assert (outcome.status, outcome.stdout) == (2, "")
    assert "Traceback" not in outcome.stderr
    lines = outcome.stderr.splitlines()
    for what in (
        "port", "wrokers", "feed_redis", "ping_timeout_s", "node", "tls_cert", "max_codes", "QUOTEPUSH_NOTHING",
    ):  # fmt: skip
        assert any(what in line for line in lines), what
    assert any("workers?" in line for line in lines)  # did you mean
    assert (await run_quotepush("check", f"--config={config}")).status == 2


@pytest.mark.parametrize("option", ["nonsense=1", "socket_timeout=soon"])
async def test_a_redis_url_with_a_wrong_option_is_one_line(option: str, tmp_path: Path) -> None:
    outcome = await run_quotepush(
        "serve", f"--redis=redis://127.0.0.1:{own_port()}/0?{option}", "--port=0", "--admin-port=0",
        f"--lock-file={tmp_path / 'lock'}",
    )  # fmt: skip
    assert (outcome.status, outcome.stdout) == (2, "")
    assert option.partition("=")[0] in assert_one_line(outcome.stderr)


@pytest.mark.parametrize("arguments", [["--config=/does/not/exist"], ["--symbol-file=/does/not/exist"], ["--no-such"]])
async def test_a_wrong_argument_is_a_line_and_exit_status_2(arguments: list[str]) -> None:
    outcome = await run_quotepush("serve", *arguments)
    assert (outcome.status, outcome.stdout) == (2, "")
    assert "Traceback" not in outcome.stderr
    assert arguments[0].partition("=")[0] in outcome.stderr or "/does/not/exist" in outcome.stderr


async def test_a_symbol_file_with_a_bad_line_is_named_with_its_number(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    symbols = tmp_path / "symbols.txt"
    symbols.write_text("AAPL\nno such\n")
    outcome = await run_quotepush(
        "serve", f"--redis={redis_server.url}", "--port=0", f"--lock-file={tmp_path / 'lock'}",
        f"--symbol-file={symbols}",
    )  # fmt: skip
    assert outcome.status == 2
    assert f"{symbols}:2" in assert_one_line(outcome.stderr)


# Secrets


def with_password(redis: RedisServer, password: str) -> str:
    return f"redis://:{quote(password, safe='')}@127.0.0.1:{redis.port}/0"


@pytest.fixture
async def guarded_redis(redis_server: RedisServer) -> RedisServer:
    """It wants a password."""
    async with redis_server.client() as redis:
        await redis.config_set("requirepass", PASSWORD)
    return redis_server


def assert_no_secret(text: str) -> None:
    for part in PASSWORD_PARTS:
        assert part not in text


@pytest.mark.parametrize("password", ["", "Tr0ub4dor-zebra"])
async def test_a_wrong_password_is_one_line_that_does_not_show_it(
    password: str, guarded_redis: RedisServer, tmp_path: Path
) -> None:
    url = with_password(guarded_redis, password) if password else guarded_redis.url
    outcome = await run_quotepush(
        "serve", f"--redis={url}", "--port=0", "--admin-port=0", f"--lock-file={tmp_path / 'lock'}", timeout_s=15
    )
    assert (outcome.status, outcome.stdout) == (1, "")
    assert str(guarded_redis.port) in assert_one_line(outcome.stderr)
    assert_no_secret(outcome.stderr)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:Tr0ub4dor#zebra@127.0.0.1:6379/0",
        "redis://:Tr0ub4dor/zebra@127.0.0.1:6379/0",
        "redis://user:Tr0ub4dor?zebra@127.0.0.1:6379/0",
        "redis://:Tr0ub4dor@zebra@127.0.0.1:1/0",
        "http://:Tr0ub4dor-zebra@127.0.0.1/0",
        "redis://:Tr0ub4dor-zebra@127.0.0.1:port/0",
        "redis://:Tr0ub4dor-zebra@",
        "redis://127.0.0.1:1/0?password=Tr0ub4dor-zebra",
        "Tr0ub4dor-zebra",
    ],
)
async def test_a_url_that_cannot_be_used_is_not_shown_with_its_password(url: str, tmp_path: Path) -> None:
    arguments = (f"--redis={url}", "--port=0", "--admin-port=0", f"--lock-file={tmp_path / 'lock'}")
    checked, served = await asyncio.gather(*(run_quotepush(command, *arguments) for command in ("check", "serve")))
    for outcome in (checked, served):
        assert "Traceback" not in outcome.stderr
        if url != "Tr0ub4dor-zebra":  # nobody can know that this one is a secret
            assert_no_secret(outcome.stdout + outcome.stderr)
    assert served.status in (1, 2)


@pytest.mark.parametrize("source", ["url", "environment", "file"])
async def test_the_password_of_redis_works_from_anywhere_and_is_shown_nowhere(
    source: str, guarded_redis: RedisServer, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QUOTEPUSH_")}
    server = QuotepushServer(tmp_path / "server", guarded_redis.url, log_level="debug")
    if source == "url":
        server.settings["feed_redis"] = with_password(guarded_redis, PASSWORD)
    elif source == "environment":
        environment["QUOTEPUSH_FEED_REDIS_PASSWORD"] = PASSWORD
    else:
        secret = tmp_path / "secret"
        secret.write_text(PASSWORD + "\n")
        server.settings["feed_redis_password_file"] = str(secret)
    server.directory.mkdir()
    log_path = tmp_path / "log"
    process = spawn(server.command(), log_path, env=environment)
    try:
        ready = await wait_until(lambda: re.search(r"ready http://127\.0\.0\.1:(\d+)", log_path.read_text()), 30)
        async with (
            RecordingClient(f"ws://127.0.0.1:{ready[1]}/ws", ["AAPL"]) as client,
            guarded_redis.client(password=PASSWORD) as redis,
        ):
            await publish(redis, "AAPL", last=1)
            await wait_until(lambda: client.last("AAPL") == 1)
            await registry_equals(redis, {client.fd: {"AAPL"}})
            # A link that has to be made anew, and a worker too, need it once more.
            await redis.client_kill_filter(_type="pubsub")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in (process.pid, *map(int, children)):
                shown = command_line(pid)
                assert shown.startswith("quotepush[test]: ")
                assert_no_secret(shown)
            os.kill(int(children[1]), signal.SIGKILL)
            await wait_until(lambda: log_path.read_text().count("a new one follows") == 1)
            await wait_until(lambda: _hears(redis, client))
    finally:
        process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(process.wait, 20)
    assert status == 0
    assert_no_secret(log_path.read_text())


async def _hears(redis: Any, client: RecordingClient) -> bool:
    before = client.received
    await publish(redis, "AAPL", last=before + 2)
    await asyncio.sleep(0.05)
    return client.received > before or client.has_ended


# Running


async def test_every_process_says_in_its_title_what_it_is(quotepush_server: QuotepushServer) -> None:
    assert command_line(quotepush_server.pid) == "quotepush[test]: main"
    titles = sorted(command_line(pid) for pid in quotepush_server.worker_pids())
    assert titles == ["quotepush[test]: worker 0", "quotepush[test]: worker 1"]


async def test_ready_is_said_once_and_first_on_standard_output(tmp_path: Path, redis_server: RedisServer) -> None:
    server = QuotepushServer(tmp_path / "server", redis_server.url)
    server.directory.mkdir()
    process = spawn(server.command(), tmp_path / "out", tmp_path / "err")
    try:
        line = await wait_until((tmp_path / "out").read_text, 30)
        assert line.startswith("quotepush ready http://127.0.0.1:")
        assert " admin=http://127.0.0.1:" in line
        # Every worker accepts by now.
        port = int(line.split(":")[2].split("/")[0])
        # So many that the kernel surely gives each worker some of them.
        async with connected_clients(f"ws://127.0.0.1:{port}/ws", 40) as clients:
            assert {client.worker for client in clients} == {"0", "1"}
        # A worker that comes back is no second start.
        os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]), signal.SIGKILL)
        admin = line.split("admin=")[1].split()[0]

        async def is_whole_again() -> bool:
            async with aiohttp.ClientSession() as http, http.get(admin + "/metrics") as response:
                return "quotepush_workers_ready 1.0" not in await response.text()

        await wait_until(lambda: "a new one follows" in (tmp_path / "err").read_text())
        await wait_until(is_whole_again, 30)
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    assert (tmp_path / "out").read_text() == line


async def test_sighup_changes_nothing(quotepush_server: QuotepushServer, redis_server: RedisServer) -> None:
    server = quotepush_server
    workers = set(server.worker_pids())
    async with redis_server.client() as redis, RecordingClient(server.ws_url, ["AAPL"]) as client:
        for pid in (server.pid, *workers):
            os.kill(pid, signal.SIGHUP)
        await publish(redis, "AAPL", last=1)
        await wait_until(lambda: client.last("AAPL") == 1)
        assert (await server.admin("/readyz"))[0] == 200
        assert set(server.worker_pids()) == workers
        assert client.lives == 1


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_at_the_end_clients_are_told_to_come_back_and_nothing_is_left(
    number: signal.Signals, start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server()
    pids = [server.pid, *server.worker_pids()]
    clients = [await RecordingClient(server.ws_url, ["AAPL", f"C{n}"]).open() for n in range(20)]
    async with redis_server.client() as redis:
        await registry_equals(redis, {client.fd: client.codes for client in clients})
        async with steady_feed(redis_server.url, ["AAPL"], 200):
            os.kill(server.pid, number)
            assert await server.wait() == 0
        await wait_until(lambda: all(client.has_ended for client in clients))
        for client in clients:
            (closing,) = [m for m in client.control if m["type"] == "status"]
            assert (closing["scope"], closing["state"]) == ("connection", "closing")
            assert closing["retry_after_ms"] > 0
            assert (client.close_code, client.close_reason) == (1012, "restart")
            await client.close()
        assert not any(is_alive(pid) for pid in pids)
        # The newest rows are kept, and what was told as wanted, so that the next start tells what has changed.
        assert not [key for key in await redis.keys("*") if not key.startswith(("qp:row", "qp:demanded:"))]
    assert "ERROR" not in server.log()
    assert "Traceback" not in server.log()
    assert "killed" not in server.log()


async def test_whoever_is_told_to_end_while_it_starts_ends(tmp_path: Path, redis_server: RedisServer) -> None:
    server = QuotepushServer(tmp_path / "server", redis_server.url)
    server.directory.mkdir()
    redis_server.pause()
    process = spawn(server.command(), server.log_path)
    try:
        # As soon as it would not simply die of it, and long before it serves.
        await wait_until(lambda: catches(process.pid, signal.SIGTERM), 30)
        process.send_signal(signal.SIGTERM)
        redis_server.resume()
        assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        process.kill()
    async with redis_server.client() as redis:
        assert await redis.keys("*") == []
    assert "ERROR" not in server.log()
    assert "Traceback" not in server.log()


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (proc(5))."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


async def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_main_decides(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    server = QuotepushServer(tmp_path / "server", redis_server.url)
    server.directory.mkdir()
    process = spawn(server.command(), server.log_path, start_new_session=True)
    try:
        ready = await wait_until(lambda: re.search(r"ready http://127\.0\.0\.1:(\d+)", server.log()), 30)
        clients = [await RecordingClient(f"ws://127.0.0.1:{ready[1]}/ws", ["AAPL"]).open() for _ in range(8)]
        os.killpg(process.pid, signal.SIGINT)
        assert await asyncio.to_thread(process.wait, 20) == 0
        for client in clients:
            await wait_until(lambda client=client: client.has_ended)
            assert (client.close_code, client.states()) == (1012, ["closing"])
            await client.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    async with redis_server.client() as redis:
        assert not [key for key in await redis.keys("*") if not key.startswith("qp:demanded:")]
    assert "ERROR" not in server.log()
    assert "Traceback" not in server.log()


async def test_workers_alone_ignore_ctrl_c(quotepush_server: QuotepushServer, redis_server: RedisServer) -> None:
    server = quotepush_server
    workers = set(server.worker_pids())
    async with redis_server.client() as redis, RecordingClient(server.ws_url, ["AAPL"]) as client:
        for pid in workers:
            os.kill(pid, signal.SIGINT)
        await publish(redis, "AAPL", last=1)
        await wait_until(lambda: client.last("AAPL") == 1)
        assert set(server.worker_pids()) == workers


async def test_a_client_that_does_not_go_is_cut_off_after_the_drain_time(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, drain_timeout_s=1)
    async with RawWebSocket(server.port) as ws:  # it answers no close frame
        await ws.read_message("hello")
        assert await server.stop(15) == 0
        assert await ws.read_close() == (1012, "restart")
    async with redis_server.client() as redis:
        assert await redis.keys("*") == []


async def test_the_server_ends_in_order_while_its_redis_is_away(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(redis_timeout_s=2)
    async with RecordingClient(server.ws_url, ["AAPL"]) as client:
        redis_server.kill()
        assert await server.stop(25) == 0
        await wait_until(lambda: client.has_ended)
        assert (client.close_code, client.states()) == (1012, ["closing"])
    assert "Traceback" not in server.log()
    redis_server.start()


async def test_an_earlier_life_is_cleared_at_the_start(start_server: StartServer, redis_server: RedisServer) -> None:
    server = await start_server(workers=1)
    async with redis_server.client() as redis:
        clients = [await RecordingClient(server.ws_url, ["AAPL", "MSFT"]).open() for _ in range(3)]
        await registry_equals(redis, {client.fd: client.codes for client in clients})
        await redis.sadd("qp:codes", "IBM")  # another node's, which is not ours to clear
        await redis.sadd("qp:code:IBM", "other.0.1")
        await redis.sadd("qp:fd:other.0.1", "IBM")
        await redis.sadd("qp:node:other", "0.1")
        await redis.sadd("qp:node:other:0.1", "other.0.1")
        await server.kill()
        await server.start()
        assert "3 connections of an earlier life removed" in server.log()
        assert set(await redis.smembers("qp:codes")) == {"IBM"}
        keys = {
            key for key in await redis.keys("*") if not key.startswith(("qp:node:test", "qp:nodes", "qp:demanded:"))
        }
        assert keys == {"qp:codes", "qp:code:IBM", "qp:fd:other.0.1", "qp:node:other", "qp:node:other:0.1"}
        for client in clients:
            await client.close()


# Shapes of a deployment


async def test_ticks_and_registry_may_be_two_redis_servers(start_server: StartServer, tmp_path: Path) -> None:
    registry = RedisServer(tmp_path / "registry")
    registry.start()
    try:
        server = await start_server(registry_redis=registry.url, registry_check_s=0.3)
        feed_url = server.settings["feed_redis"]
        async with registry.client() as redis, connected_clients(server.ws_url, 5, lambda n: ["AAPL"]) as clients:
            await registry_equals(redis, {client.fd: {"AAPL"} for client in clients})
            await publish(redis, "AAPL", last=666)  # nobody listens there
            async with steady_feed(feed_url, ["AAPL"], 50) as feed:
                await wait_until(lambda: all(client.received > 3 for client in clients))
                assert await feed._redis.keys("*") == []
            assert all(client.last("AAPL") != 666 for client in clients)
            registry.kill()
            async with steady_feed(feed_url, ["AAPL"], 50):
                seen = [client.received for client in clients]
                await wait_until(lambda: all(c.received > n + 3 for c, n in zip(clients, seen, strict=True)))
            assert (await server.admin("/readyz"))[1]["feed"] == "ok"
            registry.start()
            await registry_equals(redis, {client.fd: {"AAPL"} for client in clients})
    finally:
        registry.stop()


class TlsServer(QuotepushServer):
    def _is_ready(self) -> bool:
        match = re.search(r"quotepush ready https://127\.0\.0\.1:(\d+)/ admin=http://127\.0\.0\.1:(\d+)", self.log())
        if match is None:
            assert self.is_running, self.log()
            return False
        self.port, self.admin_port = int(match[1]), int(match[2])
        return True


@pytest.fixture
async def tls_server(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[tuple[TlsServer, ssl.SSLContext]]:
    """A server with a certificate of its own making, and the context that trusts it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not on PATH")
    certificate, key = self_signed_certificate(openssl, tmp_path)
    # No heartbeat comes to the aid of a row that got stuck.
    server = TlsServer(
        tmp_path / "tls", redis_server.url, tls_cert=str(certificate), tls_key=str(key), heartbeat_ms=100_000
    )
    await server.start()
    yield server, ssl.create_default_context(cafile=certificate)
    try:
        await server.stop()
    finally:
        server.kill_everything()


async def test_wss_works_like_ws(tls_server: tuple[TlsServer, ssl.SSLContext], redis_server: RedisServer) -> None:
    server, context = tls_server
    url = f"wss://127.0.0.1:{server.port}/ws"
    async with redis_server.client() as redis, connected_clients(url, 8, lambda n: ["AAPL"], ssl=context) as clients:
        for price in (1, 2, 3):
            await publish(redis, "AAPL", last=price)
            await wait_until(lambda price=price: all(client.last("AAPL") == price for client in clients))
        async with steady_feed(redis_server.url, ["AAPL"], 300):
            await wait_until(lambda: all(client.received > 100 for client in clients))
        assert not any(client.states() for client in clients)
        clients[0].abort()
        truth = {client.fd: {"AAPL"} for client in clients[1:]}
        await registry_equals(redis, truth)
        async with aiohttp.ClientSession() as http, http.get(f"https://127.0.0.1:{server.port}/", ssl=context) as page:
            assert page.status == 200
        # Somebody who speaks no TLS harms nobody.
        with contextlib.suppress(OSError, EOFError):
            async with RawWebSocket(server.port):
                pass
        for client in clients[1:]:
            await client.ping()
    assert await server.stop() == 0
    assert "ERROR" not in server.log()
    assert "Traceback" not in server.log()


async def test_everything_public_lies_below_the_base_path(start_server: StartServer, redis_server: RedisServer) -> None:
    server = await start_server(workers=1, base_path="/live/quotes", ws_path="/socket")
    assert f"{server.url}/live/quotes/ admin=" in server.log()
    url = server.url.replace("http", "ws") + "/live/quotes/socket"
    async with redis_server.client() as redis, RecordingClient(url, ["AAPL"]) as client:
        await publish(redis, "AAPL", last=1)
        await wait_until(lambda: client.last("AAPL") == 1)
    async with aiohttp.ClientSession() as http:
        for path, status in (
            ("/live/quotes/", 200), ("/live/quotes/quotepush.js", 200), ("/live/quotes/socket", 426), ("/socket", 404),
            ("/ws", 404), ("/", 404),
        ):  # fmt: skip
            async with http.get(server.url + path) as response:
                assert response.status == status, path


async def test_it_is_ready_only_when_ticks_reach_it(tmp_path: Path, redis_server: RedisServer) -> None:
    admin_port = own_port()
    async with redis_server.client() as redis:
        await redis.execute_command("ACL", "SETUSER", "feed", "on", ">x", "~*", "&*", "+@all", "-psubscribe")
        url = redis_server.url.replace("//", "//feed:x@")
        server = QuotepushServer(tmp_path / "server", url, admin_port=admin_port)
        server.admin_port = admin_port
        server.spawn()
        try:

            async def only_the_link_is_missing() -> bool:
                try:
                    _, facts = await server.admin("/readyz")
                except aiohttp.ClientError:  # it has not got there yet
                    return False
                return bool(facts["workers"] == 2)

            await wait_until(only_the_link_is_missing, 30)
            assert "quotepush ready" not in server.log()
            await redis.execute_command("ACL", "SETUSER", "feed", "+psubscribe")
            await wait_until(lambda: "quotepush ready" in server.log(), 30)
            assert await redis.publish("quote.A", '{"last":1}') == 1
        finally:
            server.kill_everything()
