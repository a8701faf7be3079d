"""Both clients over links that are cut, stall and trickle at random: no row is lost that the server still holds."""

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from quotepush import QuoteClient
from quotepush.client import Gap, StateChange
from tests.support.door import Door, door_to
from tests.support.mishaps import Mishaps
from tests.support.numbered_feed import NumberedFeed
from tests.support.redis_server import RedisServer
from tests.support.script_client import ScriptClient, node
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.fault

StartServer = Callable[..., Awaitable[QuotepushServer]]

CODES = ["AAPL", "MSFT", "600519.SH"]
# However long a busy machine takes to come back, the rows of that time are kept.
KEPT = {
    "heartbeat_ms": 200,
    "ring_age_s": 600,
    "ring_code_bytes": 4_000_000,
    "replay_bytes": 20_000_000,
}

ROUNDS = [1, pytest.param(12, marks=[pytest.mark.long, pytest.mark.timeout(600)])]


class Taker(ABC):
    """One client of either language, as far as these tests look at it."""

    @abstractmethod
    def rows(self, code: str) -> list[tuple[int, float]]:
        """Return number and ``last`` of each row, in order."""

    @abstractmethod
    def merged(self, code: str) -> int: ...

    @abstractmethod
    def gaps(self) -> list[Any]: ...

    @abstractmethod
    def losses(self) -> int:
        """Return how many connections it has lost or given up."""

    def newest(self, code: str) -> int:
        rows = self.rows(code)
        return rows[-1][0] if rows else 0


class ScriptTaker(Taker):
    def __init__(self, client: ScriptClient) -> None:
        self.client = client

    def rows(self, code: str) -> list[tuple[int, float]]:
        return [(row["seq"], row["last"]) for row in self.client.rows(code)]

    def merged(self, code: str) -> int:
        return sum(event["count"] for event in self.client.of("merged") if event["code"] == code)

    def gaps(self) -> list[Any]:
        return self.client.of("gap")

    def losses(self) -> int:
        return [state["state"] for state in self.client.of("state")].count("waiting")

    def newest(self, code: str) -> int:
        for name, payload in reversed(self.client.events):
            if name == "row" and payload["code"] == code:
                return int(payload["seq"])
        return 0


class PythonTaker(Taker):
    def __init__(self, client: QuoteClient) -> None:
        self.client = client
        self._rows: dict[str, list[tuple[int, float]]] = {code: [] for code in CODES}
        self._gaps: list[Gap] = []
        self._states: list[StateChange] = []
        client.on("row", lambda row: self._rows[row["code"]].append((row["seq"], row["last"])))
        client.on("gap", self._gaps.append)
        client.on("state", self._states.append)

    def rows(self, code: str) -> list[tuple[int, float]]:
        return self._rows[code]

    def merged(self, code: str) -> int:
        return self.client.merged[code]

    def gaps(self) -> list[Any]:
        return self._gaps

    def losses(self) -> int:
        return [change.state for change in self._states].count("waiting")


@contextlib.asynccontextmanager
async def script_taker(door: Door) -> AsyncIterator[Taker]:
    async with ScriptClient(door.url + "/ws", hurry=10) as client:
        await client.call("subscribe", CODES)
        yield ScriptTaker(client)


@contextlib.asynccontextmanager
async def python_taker(door: Door) -> AsyncIterator[Taker]:
    async with QuoteClient(door.url, min_backoff_s=0.05, max_backoff_s=2.0) as client:
        taker = PythonTaker(client)
        subscribing = asyncio.create_task(client.subscribe(CODES))
        yield taker
        await subscribing


async def every_row_comes_once(
    server: QuotepushServer, feed: NumberedFeed, seed: int, rounds: int, kinds: list[Any], *, is_blocked: bool = False
) -> None:
    """Let mishaps happen to some clients at one door, and look at what each has got."""
    print(f"seed {seed}")
    async with contextlib.AsyncExitStack() as stack:
        door = await stack.enter_async_context(door_to(server, "http://127.0.0.1:{port}"))
        door.refuses_upgrades = is_blocked
        takers = [await stack.enter_async_context(kind(door)) for kind in kinds]

        async def go_on() -> None:
            newest = {code: seq + 5 for code, seq in feed.newest.items()}
            await wait_until(
                lambda: all(taker.newest(code) >= seq for taker in takers for code, seq in newest.items()), 60
            )

        await go_on()
        mishaps = Mishaps(door, seed, lambda: min(taker.losses() for taker in takers), go_on)
        await mishaps.happen(rounds)
        await feed.stop()
        for taker in takers:
            await wait_until(lambda t=taker: all(t.newest(code) == feed.newest[code] for code in CODES), 60)
            assert taker.gaps() == []
            for code in CODES:
                feed.judge(code, taker.rows(code), taker.merged(code))
            assert taker.losses() >= 2 * rounds  # those of the stalls at least
        assert mishaps.happened.total() == 6 * rounds


@pytest.fixture
async def feed(redis_server: RedisServer) -> AsyncIterator[NumberedFeed]:
    async with NumberedFeed(redis_server.url, *CODES) as feed:
        feed.start()
        yield feed


@pytest.mark.parametrize("rounds", ROUNDS)
async def test_python_client_gets_every_row_once_whatever_happens_to_its_link(
    rounds: int, start_server: StartServer, feed: NumberedFeed
) -> None:
    server = await start_server(workers=2, **KEPT)
    await every_row_comes_once(server, feed, random.randrange(10**6), rounds, [python_taker] * 2)


@pytest.mark.skipif(node() is None, reason="needs a Node with WebSocket and EventSource, 20.18 or later")
@pytest.mark.parametrize("is_blocked", [False, pytest.param(True, marks=pytest.mark.long)], ids=["socket", "stream"])
@pytest.mark.parametrize("rounds", ROUNDS)
async def test_browser_client_gets_every_row_once_whatever_happens_to_its_link(
    rounds: int, is_blocked: bool, start_server: StartServer, feed: NumberedFeed
) -> None:
    server = await start_server(workers=2, **KEPT)
    seed = random.randrange(10**6)
    await every_row_comes_once(server, feed, seed, rounds, [script_taker] * 2, is_blocked=is_blocked)
