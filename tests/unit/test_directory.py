"""What codes there are: prefixes and names, the biggest movers; a few codes at a time, and never too many searches."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from quotepush.node import directory as directory_module
from quotepush.node.directory import Directory
from quotepush.quote.board import Board, TradingDays
from tests.support.waiting import wait_until

NOW_MS = 1_800_000_000_000


class Bench:
    def __init__(self, *unknown: str) -> None:
        self.board = Board(epoch="e", days=TradingDays({}), watched=set())
        self.directory = Directory(self.board.quotes, lambda code: code not in unknown)

    def tick(self, code: str, **fields: Any) -> None:
        self.board.apply(code, orjson.dumps(fields), NOW_MS)

    async def found(self, text: str | None, limit: int = 20, allowed: tuple[str, ...] | None = None) -> Any:
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self.directory.ask(text, limit, future.set_result, allowed)
        answer = await asyncio.wait_for(future, 20)
        assert answer is not None
        return orjson.loads(answer)

    async def codes(self, text: str, limit: int = 20) -> list[str]:
        return [entry["code"] for entry in await self.found(text, limit)]


@asynccontextmanager
async def bench(*unknown: str) -> AsyncIterator[Bench]:
    found = Bench(*unknown)
    found.tick("600519.SH", name="贵州茅台", last=1688.0, prev_close=1675.5, volume=5)
    found.tick("600518.SH", name="康美药业", last=1.0)
    found.tick("AAPL", name="Apple Inc", last=199.0, prev_close=200.0)
    found.tick("APP", name="AppLovin", last=11.0, prev_close=10.0)
    found.tick("SNAP", name="pineapple", last=9.0, prev_close=10.0)
    found.tick("QUIET", last=10.0, prev_close=10.0)
    running = asyncio.create_task(found.directory.run())
    try:
        yield found
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_codes_that_begin_so_come_before_names_that_contain_it() -> None:
    async with bench() as b:
        assert await b.codes("app") == ["APP", "AAPL", "SNAP"]
        assert await b.codes("APP", limit=1) == ["APP"]
        assert await b.codes("茅台") == ["600519.SH"]
        assert await b.codes("60051") == ["600518.SH", "600519.SH"]
        assert await b.codes("sh600519") == ["600519.SH"]
        assert await b.codes("nothing like it") == []


async def test_nobody_hears_of_codes_that_he_may_not_have() -> None:
    async with bench() as b:
        for allowed, text, codes in (
            (("*.SH",), "60051", ["600518.SH", "600519.SH"]),
            (("*.SH",), "app", []),
            (("A*",), "app", ["APP", "AAPL"]),
            (("AAPL", "*8.SH"), "a", ["AAPL"]),
            (("AAPL", "*8.SH"), "康美", ["600518.SH"]),
            (("AAPL", "*8.SH"), "sh600519", []),
            ((), "app", []),
        ):
            assert [entry["code"] for entry in await b.found(text, allowed=allowed)] == codes
        found = await b.found(None, 10, ("*.SH", "AAPL"))
        assert [[entry["code"] for entry in found[way]] for way in ("up", "down")] == [["600519.SH"], ["AAPL"]]
        assert await b.found(None, 10, ()) == {"up": [], "down": []}


async def test_a_limit_counts_only_codes_that_are_shown() -> None:
    async with bench() as b:
        for n in range(600):
            b.tick(f"M{n:03}", last=20.0 + n, prev_close=10.0)
        found = await b.found(None, 3, ("APP", "*.SH", "M0*9"))
        assert [entry["code"] for entry in found["up"]] == ["M099", "M089", "M079"]
        assert [e["code"] for e in await b.found("m", 2, ("*9",))] == ["M009", "M019"]


async def test_an_entry_has_what_a_list_shows_and_nothing_that_is_unknown() -> None:
    async with bench() as b:
        assert await b.found("600519") == [
            {"code": "600519.SH", "name": "贵州茅台", "last": 1688.0, "prev_close": 1675.5, "change": 12.5,
             "change_pct": 0.75}
        ]  # fmt: skip
        assert await b.found("600518") == [{"code": "600518.SH", "name": "康美药业", "last": 1.0}]


async def test_the_biggest_movers_up_and_down() -> None:
    async with bench() as b:
        found = await b.found(None, 10)
        assert [entry["code"] for entry in found["up"]] == ["APP", "600519.SH"]
        assert [entry["code"] for entry in found["down"]] == ["SNAP", "AAPL"]
        assert [entry["code"] for entry in (await b.found(None, 1))["up"]] == ["APP"]


async def test_a_code_that_may_not_be_subscribed_is_not_shown() -> None:
    async with bench("APP") as b:
        assert await b.codes("app") == ["AAPL", "SNAP"]
        assert [entry["code"] for entry in (await b.found(None))["up"]] == ["600519.SH"]


async def test_the_board_is_read_again_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as b:
        monkeypatch.setattr(directory_module, "_READ_EVERY_S", 1000.0)
        assert await b.codes("new") == []
        b.tick("NEW", last=1.0)
        assert await b.codes("new") == []
        b.directory._read_again_s = 0.0
        assert await b.codes("new") == ["NEW"]


async def test_a_large_board_is_gone_through_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "_READ_PER_SLICE", 7)
    monkeypatch.setattr(directory_module, "_READ_REST_S", 0.0)
    monkeypatch.setattr(directory_module, "_SEARCHED_PER_SLICE", 11)
    async with bench() as b:
        for n in range(300):
            b.tick(f"X{n:03}", name="many", last=100.0 + n % 150, prev_close=100.0)
        assert await b.codes("many", limit=50) == [f"X{n:03}" for n in range(50)]
        assert [entry["code"] for entry in (await b.found(None, 3))["up"]] == ["X149", "X299", "X148"]


async def test_only_so_many_searches_wait() -> None:
    b = Bench()
    answers: list[bytes | None] = []
    for _ in range(100):
        b.directory.ask("A", 5, answers.append)
    assert answers == [None] * 36
    running = asyncio.create_task(b.directory.run())
    await wait_until(lambda: len(answers) == 100)
    running.cancel()
    assert answers[36:] == [b"[]"] * 64


async def test_a_search_that_fails_is_the_end_of_none_but_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench() as b:
        monkeypatch.setattr(Directory, "_shown", None)
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        b.directory.ask("a", 5, future.set_result)
        assert await future is None
        monkeypatch.undo()
        assert await b.codes("aap") == ["AAPL"]
        assert "a search has failed" in caplog.text
