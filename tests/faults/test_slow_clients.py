"""A twentieth of the clients stop reading: the others lose no row, and the server holds no more than its settings say.

The times that rows take are printed (``-s`` shows them), never judged: clients, feed and server share one machine.
"""

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from time import time_ns
from typing import Any

import pytest

from tests.support.processes import proportional_bytes
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import SteadyFeed, steady_feed
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

pytestmark = [pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(300)]

StartServer = Callable[..., Awaitable[QuotepushServer]]

CODES = [f"C{n:03}" for n in range(100)]
CODES_EACH = 10
READERS, STALLED = 190, 10
# Each code has twenty watchers: 5,000 rows and 15 MB a second.
TICKS_PER_S = 250
BULK = {"text": "x" * 3000}
ROW_BYTES = 3200
MERGE_ABOVE_BYTES = 65_536
# What may wait for those who stall: each one's rows before they are merged, the newest row of each of his codes, and
# what his socket has not taken of one write, which is no longer than what may wait.
BOUND_BYTES = STALLED * (2 * MERGE_ABOVE_BYTES + CODES_EACH * ROW_BYTES)
# What the processes' memory moves by on its own: allocators, collector, figures.
RESERVE_BYTES = 8 << 20


def codes_of(n: int) -> list[str]:
    """Ten codes, so that each code has as many watchers as any other."""
    return [CODES[(n + step * step) % len(CODES)] for step in range(CODES_EACH)]


class Scene:
    """Readers, clients that will stall, and a feed.

    Attributes:
        delivered: rows by client and code.
        merged: rows by client and code that the server says it merged into others.
        first_seqs: by client, the first seq of each code since it was last told ``conflating``.
        delays_us: from publishing to reading, of the readers' rows since the last :meth:`take_delays`.
        peak_bytes: the most memory that the server was seen with.
    """

    def __init__(self, server: QuotepushServer) -> None:
        self.server = server
        self.feed: SteadyFeed
        self.readers: list[RecordingClient] = []
        self.stalled: list[RecordingClient] = []
        self.delivered: defaultdict[RecordingClient, Counter[str]] = defaultdict(Counter)
        self.merged: defaultdict[RecordingClient, Counter[str]] = defaultdict(Counter)
        self.first_seqs: defaultdict[RecordingClient, dict[str, int]] = defaultdict(dict)
        self._times_conflating: Counter[RecordingClient] = Counter()
        self.delays_us: list[int] = []
        self.peak_bytes = 0

    def note_reader(self, client: RecordingClient, rows: Sequence[dict[str, Any]]) -> None:
        now_us = time_ns() // 1000
        self.delays_us += [now_us - row["sent_us"] for row in rows]
        self.note_rows(client, rows)

    def note_stalled(self, client: RecordingClient, rows: Sequence[dict[str, Any]]) -> None:
        times = client.states().count("conflating")
        if times != self._times_conflating[client]:
            self._times_conflating[client] = times
            self.first_seqs[client].clear()
        for row in rows:
            self.first_seqs[client].setdefault(row["code"], row["seq"])
        self.note_rows(client, rows)

    def note_rows(self, client: RecordingClient, rows: Sequence[dict[str, Any]]) -> None:
        delivered, merged = self.delivered[client], self.merged[client]
        for row in rows:
            delivered[row["code"]] += 1
            merged[row["code"]] += row["seq"] - row["prev"] - 1

    def take_delays(self) -> str:
        """Say how long rows took, and begin anew."""
        delays, self.delays_us = sorted(self.delays_us), []
        p50, p99 = (delays[len(delays) * share // 100] / 1000 for share in (50, 99))
        return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(delays):,} rows"

    async def feed_goes_on(self, seconds: float) -> None:
        """Wait until as many ticks were published as the feed wants to in so long; look at the memory meanwhile."""
        begin = self.feed.published
        for part in range(1, 1 + round(seconds * 4)):
            await wait_until(lambda enough=begin + part * TICKS_PER_S // 4: self.feed.published >= enough, 60)
            self.look_at_memory()

    def look_at_memory(self) -> None:
        self.peak_bytes = max(self.peak_bytes, proportional_bytes(self.server))

    async def newest_row_everywhere(self, clients: Sequence[RecordingClient]) -> None:
        """End the feed; each client has the newest price of each of its codes, and every row was sent or merged."""
        newest = await self.feed.finish()
        for client in clients:
            await wait_until(lambda c=client: all(c.last(code) == newest[code] for code in c.codes), 60)
            told = {code: self.delivered[client][code] + self.merged[client][code] for code in client.codes}
            assert told == {code: self.feed.published_of[code] for code in client.codes}

    async def readers_noticed_nothing(self, figures: str) -> None:
        """Each reader got every row; if main itself was late, every one that main made."""
        for client in self.readers:
            client.check()
            assert (client.lives, client.is_open, client.states()) == (1, True, []), figures
        if not await self.server.merged_by_main():
            assert [client.merged for client in self.readers] == [0] * READERS, figures

    def newest_seqs(self, worker: str) -> dict[str, int]:
        """The newest rows that readers have had from a worker: it knows of them, and perhaps of newer ones."""
        seqs: dict[str, int] = {}
        for client in self.readers:
            if client.worker == worker:
                for code, row in client.rows.items():
                    seqs[code] = max(seqs.get(code, 0), row["seq"])
        return seqs


@contextlib.asynccontextmanager
async def scene_of(server: QuotepushServer, redis: RedisServer) -> AsyncIterator[Scene]:
    """Everybody has subscribed before the first tick, and reads."""
    scene = Scene(server)
    async with (
        connected_clients(server.ws_url, READERS, codes_of, on_ticks=scene.note_reader) as scene.readers,
        connected_clients(
            server.ws_url, STALLED, lambda n: codes_of(READERS + n), on_ticks=scene.note_stalled,
            receive_buffer_bytes=8192,
        ) as scene.stalled,
        steady_feed(redis.url, CODES, TICKS_PER_S, BULK) as scene.feed,
    ):  # fmt: skip
        yield scene
    assert "Traceback" not in server.log()
    assert "ERROR" not in server.log()


async def test_clients_that_stall_for_twenty_seconds_catch_up_and_the_others_get_every_row(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(merge_above_bytes=MERGE_ABOVE_BYTES, stall_timeout_s=600)
    async with scene_of(server, redis_server) as scene:
        await scene.feed_goes_on(5)
        before_bytes, scene.peak_bytes = scene.peak_bytes, 0
        before = scene.take_delays()

        for client in scene.stalled:
            client.stop_reading()
        await scene.feed_goes_on(20)
        growth_bytes = scene.peak_bytes - before_bytes
        figures = (
            f"\nall read: {before}, {before_bytes / 2**20:.1f} MiB\n"
            f"{STALLED} of {READERS + STALLED} stall: {scene.take_delays()}, {growth_bytes / 2**20:+.1f} MiB at most "
            f"(bound {BOUND_BYTES / 2**20:.1f} + {RESERVE_BYTES / 2**20:.0f} MiB)"
        )
        assert growth_bytes <= BOUND_BYTES + RESERVE_BYTES, figures

        at_least = {client: scene.newest_seqs(client.worker) for client in scene.stalled}
        for client in scene.stalled:
            client.go_on_reading()
        for client in scene.stalled:
            await wait_until(lambda c=client: "conflating" in c.states() and c.states()[-1] == "realtime", 60)
        await scene.feed_goes_on(2)
        print(f"{figures}\nall read again: {scene.take_delays()}")

        await scene.newest_row_everywhere([*scene.readers, *scene.stalled])
        await scene.readers_noticed_nothing(figures)
        for client in scene.stalled:
            states = client.states()
            assert states == ["conflating", "realtime"] * (len(states) // 2)
            assert client.merged > 0
            # Behind what was on its way already came each code's newest row, and nothing older.
            firsts = scene.first_seqs[client]
            assert firsts.keys() == client.codes
            assert [code for code, seq in firsts.items() if seq < at_least[client].get(code, 0)] == []
            listed = (await client.request("list"))["subscriptions"]
            assert {e["code"]: e["merged"] for e in listed} == {c: scene.merged[client][c] for c in client.codes}


async def test_clients_that_never_read_again_are_aborted_and_nobody_else(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(merge_above_bytes=MERGE_ABOVE_BYTES, stall_timeout_s=5, heartbeat_ms=500)
    async with scene_of(server, redis_server) as scene:
        await scene.feed_goes_on(5)
        before_bytes, scene.peak_bytes = scene.peak_bytes, 0
        before = scene.take_delays()
        fds = {client.fd for client in scene.stalled}

        for client in scene.stalled:
            client.stop_reading()

        async def are_gone() -> bool:
            await scene.feed_goes_on(0.5)
            return await server.metric("connections_closed", reason="stalled") == STALLED

        await wait_until(are_gone, 60)
        growth_bytes = scene.peak_bytes - before_bytes
        figures = (
            f"\nall read: {before}, {before_bytes / 2**20:.1f} MiB\n"
            f"{STALLED} of {READERS + STALLED} stall: {scene.take_delays()}, {growth_bytes / 2**20:+.1f} MiB at most "
            f"(bound {BOUND_BYTES / 2**20:.1f} + {RESERVE_BYTES / 2**20:.0f} MiB)"
        )
        assert growth_bytes <= BOUND_BYTES + RESERVE_BYTES, figures
        await scene.feed_goes_on(2)
        print(f"{figures}\nthey are gone: {scene.take_delays()}")

        assert set(re.findall(r"(\S+): closed by server: stalled after", server.log())) == fds
        for client in scene.stalled:
            client.go_on_reading()
            await wait_until(lambda c=client: c.has_ended)
            assert client.close_code == 1006
        await scene.newest_row_everywhere(scene.readers)
        await scene.readers_noticed_nothing(figures)
        assert await server.metric("connections_closed") == STALLED
        assert await server.metric("connections") == READERS
