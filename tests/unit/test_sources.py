"""Sources yield batches when they are due, by a clock that the test moves."""

import asyncio
import gzip
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quotepush.errors import SettingsError
from quotepush.feed.replay import CodedTick
from quotepush.feed.simulate import Market
from quotepush.feed.sources import MAX_BATCH, RecordingUnreadable, piped, replayed, simulated
from tests.support.manual_clock import ManualClock
from tests.support.waiting import wait_until

RECORDED = "ts,code,last\n1000,A,1\n1000,B,2\n1500,A,3\n,B,4\n61000,A,5\n"


class Taken:
    """What a source has yielded so far."""

    def __init__(self) -> None:
        self.batches: list[list[CodedTick]] = []
        self.rejected: list[tuple[int, str]] = []
        self.ended = False

    @property
    def lasts(self) -> list[float]:
        return [tick["last"] for batch in self.batches for _, tick in batch]

    @property
    def times(self) -> list[int | None]:
        return [tick.get("ts") for batch in self.batches for _, tick in batch]

    def reject(self, number: int, reason: str) -> None:
        self.rejected.append((number, reason))

    async def take(self, source: AsyncGenerator[list[CodedTick], None]) -> None:
        async with aclosing(source) as batches:
            async for batch in batches:
                self.batches.append(batch)
        self.ended = True


@asynccontextmanager
async def taking(source: AsyncGenerator[list[CodedTick], None], taken: Taken) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(taken.take(source))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def asleep(manual: ManualClock) -> None:
    """Let a source that only ever waits for the clock go on until it does."""
    for _ in range(1000):
        if manual.is_slept_on:
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not wait for the clock")


def recording(directory: Path, text: str = RECORDED) -> Path:
    path = directory / "ticks.csv"
    path.write_text(text, encoding="utf-8")
    return path


def replay(path: Path, manual: ManualClock, taken: Taken, **options: Any) -> AsyncGenerator[list[CodedTick], None]:
    options = {"speed": 1.0, "is_now": False, **options}
    return replayed(path, clock=manual.clock, reject=taken.reject, warn=pytest.fail, **options)


async def test_recording_is_replayed_at_its_own_pace(tmp_path: Path):
    manual, taken = ManualClock(), Taken()
    async with taking(replay(recording(tmp_path), manual, taken), taken):
        await wait_until(lambda: manual.is_slept_on)
        assert taken.lasts == [1, 2]

        manual.advance(0.499)
        assert taken.lasts == [1, 2]
        manual.advance(0.001)
        # A tick without a time is due with the one before it.
        await wait_until(lambda: taken.lasts == [1, 2, 3, 4])

        await wait_until(lambda: manual.is_slept_on)
        manual.advance(59.5)
        await wait_until(lambda: taken.ended)
    assert taken.lasts == [1, 2, 3, 4, 5]
    assert taken.times == [1000, 1000, 1500, None, 61000]


async def test_speed_sixty_makes_a_minute_of_a_second(tmp_path: Path):
    manual, taken = ManualClock(), Taken()
    async with taking(replay(recording(tmp_path), manual, taken, speed=60), taken):
        for expected in ([1, 2], [1, 2, 3, 4]):
            await wait_until(lambda: manual.is_slept_on)
            assert taken.lasts == expected
            manual.advance(0.5 / 60)
        manual.advance(1)
        await wait_until(lambda: taken.ended)
    assert manual.at_s < 1.1


async def test_now_moves_the_recorded_times_to_those_of_the_replay(tmp_path: Path):
    manual, taken = ManualClock(epoch_ms=2_000_000), Taken()
    manual.advance(7)
    async with taking(replay(recording(tmp_path), manual, taken, speed=2, is_now=True), taken):
        for seconds in (0.25, 30):
            await wait_until(lambda: manual.is_slept_on)
            manual.advance(seconds)
        await wait_until(lambda: taken.ended)
    assert taken.times == [2_007_000, 2_007_000, 2_007_250, None, 2_037_000]


async def test_full_speed_never_sleeps_and_batches_are_bounded(tmp_path: Path):
    lines = "".join(f"{1000 * n},A,{n}\n" for n in range(3 * MAX_BATCH + 1))
    manual, taken = ManualClock(), Taken()

    await taken.take(replay(recording(tmp_path, "ts,code,last\n" + lines), manual, taken, speed=math.inf))

    assert taken.lasts == list(range(3 * MAX_BATCH + 1))
    assert [len(batch) for batch in taken.batches] == [MAX_BATCH] * 3 + [1]


async def test_compressed_recording_with_bad_lines_is_read_to_its_end(tmp_path: Path):
    path = tmp_path / "named-otherwise"
    path.write_bytes(gzip.compress(b"ts,code,last\n1,A,1\nrubbish\n1,A,-3\n\n1,B,2"))
    taken = Taken()

    await taken.take(replay(path, ManualClock(), taken))

    assert taken.lasts == [1, 2]
    assert [number for number, _ in taken.rejected] == [3, 4]


async def test_broken_off_recording_yields_what_it_had_and_says_so(tmp_path: Path):
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(gzip.compress(os.urandom(40_000).hex().encode())[:-2000])
    whole = gzip.compress(b"code,last\nA,1\n")
    path.write_bytes(whole + path.read_bytes())
    taken = Taken()

    with pytest.raises(RecordingUnreadable, match=r"cut\.csv\.gz"):
        await taken.take(replay(path, ManualClock(), taken))

    assert taken.lasts == [1]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
async def test_recording_without_a_header_is_a_wrong_setting(tmp_path: Path, text: str):
    taken = Taken()
    with pytest.raises(SettingsError, match="--csv"):
        await taken.take(replay(recording(tmp_path, text), ManualClock(), taken))


async def test_missing_recording_is_a_wrong_setting(tmp_path: Path):
    taken = Taken()
    with pytest.raises(SettingsError, match="cannot open"):
        await taken.take(replay(tmp_path / "absent.csv", ManualClock(), taken))


async def test_steady_simulation_yields_exactly_its_rate():
    manual, taken = ManualClock(), Taken()
    async with taking(simulated(Market(10, 1), 2000, is_steady=True, clock=manual.clock), taken):
        for _ in range(100):
            await asleep(manual)
            manual.advance(0.01)
        await asleep(manual)
    assert abs(sum(map(len, taken.batches)) - 2000) <= 1


async def test_simulation_follows_the_day_unless_steady():
    manual, taken = ManualClock(), Taken()
    async with taking(simulated(Market(10, 1), 1000, is_steady=False, clock=manual.clock), taken):
        for _ in range(400):
            await asleep(manual)
            manual.advance(0.01)
        await asleep(manual)
    assert sum(map(len, taken.batches)) > 4000


async def test_simulation_that_was_held_up_does_not_flood():
    manual, taken = ManualClock(), Taken()
    async with taking(simulated(Market(10, 1), 1000, is_steady=True, clock=manual.clock), taken):
        await wait_until(lambda: manual.is_slept_on)
        manual.advance(3600)
        await wait_until(lambda: taken.batches and manual.is_slept_on)
    assert sum(map(len, taken.batches)) <= 250


async def test_piped_lines_come_as_they_are_written_and_end_with_the_writer():
    read_fd, write_fd = os.pipe()
    taken = Taken()
    async with taking(piped(read_fd, reject=taken.reject), taken):
        os.write(write_fd, b'{"code":"A","last":1}\nrubbish\n{"code":"A","la')
        await wait_until(lambda: taken.lasts == [1])
        os.write(write_fd, b'st":2}\n{"code":"B","last":3}')
        await wait_until(lambda: taken.lasts == [1, 2])
        os.close(write_fd)
        await wait_until(lambda: taken.ended)
    os.close(read_fd)
    assert taken.lasts == [1, 2, 3]
    assert [number for number, _ in taken.rejected] == [2]


async def test_piped_input_may_be_a_plain_file(tmp_path: Path):
    path = tmp_path / "lines"
    path.write_text("".join(f'{{"code":"A","last":{n}}}\n' for n in range(20_000)), encoding="utf-8")
    taken = Taken()
    fd = os.open(path, os.O_RDONLY)
    try:
        await taken.take(piped(fd, reject=taken.reject))
    finally:
        os.close(fd)
    assert taken.lasts == list(range(20_000))
    assert max(map(len, taken.batches)) <= MAX_BATCH
