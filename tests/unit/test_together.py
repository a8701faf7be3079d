"""What lives together ends together, and whoever waits for it can always be stopped."""

import asyncio

import pytest

from quotepush.together import together


async def fail(when: asyncio.Event, fault: Exception) -> None:
    await when.wait()
    raise fault


async def live(ended: list[str], name: str) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        ended.append(name)


async def nothing() -> None:
    pass


async def test_all_end_when_one_fails_and_its_fault_is_raised_as_it_is() -> None:
    now, ended, fault = asyncio.Event(), list[str](), OSError("gone")
    now.set()
    with pytest.raises(OSError) as raised:
        await together(live(ended, "a"), fail(now, fault), live(ended, "b"), name="lives")
    assert raised.value is fault
    assert sorted(ended) == ["a", "b"]


async def test_who_ends_without_a_fault_ends_nobody_else() -> None:
    now, ended = asyncio.Event(), list[str]()
    await together(nothing(), nothing(), name="lives")
    task = asyncio.create_task(together(nothing(), live(ended, "a"), fail(now, KeyError()), name="lives"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done() and not ended
    now.set()
    with pytest.raises(KeyError):
        await task


async def test_of_two_faults_of_one_turn_the_first_in_order_is_raised() -> None:
    now = asyncio.Event()
    now.set()
    with pytest.raises(KeyError):
        await together(fail(now, KeyError()), fail(now, ValueError()), name="lives")


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("comes_first", ["the fault", "the cancellation"])
async def test_who_goes_on_after_a_fault_is_stopped_in_whichever_turn_he_is_cancelled(
    comes_first: str, turns: int
) -> None:
    now, has_begun, ended, lives = asyncio.Event(), asyncio.Event(), list[str](), 0

    async def go_on() -> None:
        nonlocal lives
        while True:
            lives += 1
            has_begun.set()
            try:
                await together(fail(now, OSError()), live(ended, "a"), name="lives")
            except OSError:
                now.clear()

    task = asyncio.create_task(go_on())
    await has_begun.wait()
    if comes_first == "the fault":
        now.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
    else:
        task.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        now.set()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
    assert lives == len(ended) or lives == len(ended) + 1  # cancelled before it had begun to live


async def test_a_fault_alone_ends_nobody_who_goes_on() -> None:
    now = asyncio.Event()
    now.set()
    for _ in range(3):
        with pytest.raises(OSError):
            await together(fail(now, OSError()), live([], "a"), name="lives")
    current = asyncio.current_task()
    assert current is not None and not current.cancelling()
