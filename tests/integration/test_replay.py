"""A recorded market replayed to many clients: each of them ends with exactly what the file says.

Larger runs by hand, e.g.::

    QUOTEPUSH_REPLAY_FILE=ticks.csv.gz QUOTEPUSH_REPLAY_SPEED=60 QUOTEPUSH_REPLAY_CLIENTS=200 \\
        python -m pytest tests/integration/test_replay.py -s -k at_once
"""

import asyncio
import csv
import gzip
import io
import json
import os
import sys
import time
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from tests.support.redis_server import RedisServer
from tests.support.registry_truth import registry_equals
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

ROOT = Path(__file__).parents[2]
RECORDING = ROOT / "tests" / "data" / "us-ticks-small.csv.gz"
FEED = ROOT / "tools" / "feed.py"

FILE = Path(os.environ.get("QUOTEPUSH_REPLAY_FILE", RECORDING))
SPEED = os.environ.get("QUOTEPUSH_REPLAY_SPEED", "max")
CLIENTS = int(os.environ.get("QUOTEPUSH_REPLAY_CLIENTS", "60"))

INTEGERS = {"ts", "volume", "last_size", "bid_size", "ask_size"}


@dataclass
class Expected:
    """What the merge of a file leaves of one code.

    Attributes:
        row: its fields at the last tick that changed more than the time.
        seq: which of the code's ticks that was.
        changes: how many of its ticks changed more than the time: as many rows there are.
    """

    row: dict[str, Any] = field(default_factory=dict)
    seq: int = 0
    changes: int = 0


@dataclass
class Recorded:
    """A recording, merged by the rules of docs/protocol.md alone, without a line of the server's code."""

    ticks: int
    span_s: float
    codes: dict[str, Expected]


def merge(path: Path) -> Recorded:
    """Read a CSV file of ticks and merge it."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    fields: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    codes: dict[str, Expected] = {}
    times: list[int] = []
    for line in csv.DictReader(io.StringIO(text)):
        code = line.pop("code")
        tick = {k: int(v) if k in INTEGERS else float(v) for k, v in line.items() if v}
        times.append(int(tick["ts"]))
        counts[code] = counts.get(code, 0) + 1
        row = fields.setdefault(code, {})
        before = {k: v for k, v in row.items() if k != "ts"}
        row |= tick
        derive(row)
        if before != {k: v for k, v in row.items() if k != "ts"}:
            changes = codes[code].changes if code in codes else 0
            codes[code] = Expected({"code": code, **row}, counts[code], changes + 1)
    return Recorded(len(times), (max(times) - min(times)) / 1000, codes)


def derive(row: dict[str, Any]) -> None:
    """Set ``change`` and ``change_pct`` where both prices are there."""
    last, prev_close = Decimal(str(row.get("last", 0))), Decimal(str(row.get("prev_close", 0)))
    if last > 0 and prev_close > 0:
        row["change"] = float(last - prev_close)
        row["change_pct"] = float((100 * (last - prev_close) / prev_close).quantize(Decimal("0.01"), ROUND_HALF_UP))


def asked_by(codes: list[str], n: int) -> list[str]:
    """The codes of the n-th client: another selection for each, one code to all of them."""
    chosen = n % (2 ** len(codes) - 1) + 1
    return [code for at, code in enumerate(codes) if chosen >> at & 1]


async def replay(path: Path, redis_url: str, speed: str, *flags: str) -> str:
    """Run the feed to its end; return its summary."""
    feed = await asyncio.create_subprocess_exec(
        sys.executable, str(FEED), f"--redis={redis_url}", f"--csv={path}", f"--speed={speed}", *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    out, err = await feed.communicate()
    assert feed.returncode == 0, err.decode()
    return out.decode()


def is_expected(row: dict[str, Any], expected: Expected) -> bool:
    return {k: v for k, v in row.items() if k not in ("seq", "prev", "epoch")} == expected.row and row[
        "seq"
    ] == expected.seq


async def check_replay(
    server: QuotepushServer, redis: RedisServer, path: Path, *flags: str, speed: str, count: int
) -> list[RecordingClient]:
    """Replay a file to many clients, and one that is nothing but a socket; compare what each ends with."""
    recorded = merge(path)
    codes = sorted(recorded.codes)
    plain: dict[str, Any] = {}

    async def plain_client() -> None:
        """The ten lines that a stranger would write."""
        async with connect(server.ws_url, proxy=None, max_size=None) as ws:
            await ws.send(json.dumps({"action": "subscribe", "codes": codes}))
            async for message in ws:
                said = json.loads(message)
                if said["type"] in ("snapshot", "tick"):
                    plain.update({row["code"]: row for row in said["data"]})

    stranger = asyncio.create_task(plain_client())
    await wait_until(lambda: len(plain) == len(codes))
    began = time.monotonic()
    async with connected_clients(server.ws_url, count, lambda n: asked_by(codes, n)) as clients:
        assert {client.worker for client in clients} == {"0", "1"}
        assert len({frozenset(client.codes) for client in clients}) == min(count, 2 ** len(codes) - 1)
        connected_s = time.monotonic() - began
        summary = await replay(path, redis.url, speed, *flags)

        def has_all(client: RecordingClient) -> bool:
            client.check()
            return all(client.rows.get(c, {}).get("seq", 0) >= recorded.codes[c].seq for c in client.codes)

        await wait_until(lambda: all(has_all(client) for client in clients), 60)
        took_s = time.monotonic() - began - connected_s
        for client in clients:
            assert client.rows.keys() == client.codes
            for code, row in client.rows.items():
                assert is_expected(row, recorded.codes[code]), f"{client.fd}: {row} is not {recorded.codes[code]}"
        await wait_until(lambda: all(is_expected(plain[code], recorded.codes[code]) for code in codes))
        # Whoever comes late starts from the same rows.
        async with RecordingClient(server.ws_url, codes) as late:
            for code in codes:
                assert late.rows[code]["last"] == recorded.codes[code].row["last"]
                assert late.rows[code]["volume"] == recorded.codes[code].row["volume"]
        async with redis.client() as registry:
            # The stranger has one life more, whose name only the registry can tell.
            named = {client.fd: client.codes for client in clients}

            async def nameless() -> set[str]:
                return {fd async for fd in registry.scan_iter("qp:fd:*")} - {f"qp:fd:{fd}" for fd in named}

            async def only_one() -> set[str]:
                found = await nameless()
                return found if len(found) == 1 else set()

            (unnamed,) = await wait_until(only_one)
            await registry_equals(registry, {**named, unnamed.removeprefix("qp:fd:"): set(codes)})

        async def are_taken() -> bool:  # behind those that have made rows others may come that have not
            return await server.metric("ticks_accepted") == recorded.ticks

        await wait_until(are_taken)
        assert await server.metric("ticks_refused") == 0
        rows = sum(client.received for client in clients)
        merged = sum(client.merged for client in clients)
        late_rows = await server.merged_by_main()
        print(
            f"\n{path.name}: {recorded.ticks:,} ticks of {len(codes)} codes over {recorded.span_s:.0f} s at speed "
            f"{speed} to {count} clients: {took_s:.1f} s, {rows:,} rows delivered, {merged:,} merged or unchanged "
            f"({late_rows:,.0f} by main), {sum('conflating' in c.states() for c in clients)} clients conflating; "
            f"{summary.strip()}"
        )
    stranger.cancel()
    await asyncio.wait([stranger])
    return clients


publishing = pytest.mark.parametrize("flags", [(), ("--plain",)], ids=["logged", "plain"])


@publishing
async def test_every_client_ends_with_the_merge_of_the_file_when_it_comes_at_once(
    quotepush_server: QuotepushServer, redis_server: RedisServer, flags: tuple[str, ...]
) -> None:
    await check_replay(quotepush_server, redis_server, FILE, *flags, speed=SPEED, count=CLIENTS)


@publishing
async def test_every_client_ends_with_the_merge_of_the_file_and_got_every_row_at_a_market_s_pace(
    quotepush_server: QuotepushServer, redis_server: RedisServer, flags: tuple[str, ...]
) -> None:
    speed = str(round(merge(RECORDING).span_s / 5))
    clients = await check_replay(quotepush_server, redis_server, RECORDING, *flags, speed=speed, count=CLIENTS)
    if not await quotepush_server.merged_by_main():  # a machine that is too slow merges as it should
        recorded = merge(RECORDING)
        for client in clients:
            if not client.states():
                changes = sum(recorded.codes[code].changes for code in client.rows)
                # The first row of the log's life comes as a snapshot, and if the server takes its time, a later one.
                assert changes - client.passed_over <= client.received + client.restated <= changes


@publishing
async def test_change_is_derived_where_the_previous_close_is_known(
    quotepush_server: QuotepushServer, redis_server: RedisServer, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    path = tmp_path / "day.csv"
    path.write_text(
        "ts,code,last,prev_close,volume\n"
        "1767623400000,600519.SH,1500.0,1488.88,100\n"
        "1767623400001,600519.SH,1477.76,,200\n"
        "1767623400002,AAPL,230.07,,300\n"
        "1767623400003,ADA-USD,0.4321,0.4,1\n"
        "1767623400004,ADA-USD,0.43219,,1\n"
        "1767623400005,600519.SH,1477.77,,300\n"
    )
    assert "change" not in merge(path).codes["AAPL"].row
    assert merge(path).codes["600519.SH"].row["change_pct"] == -0.75
    # So many that they are all on one worker only once in 32,768 times.
    await check_replay(quotepush_server, redis_server, path, *flags, speed="max", count=16)
