"""A worker's share of the machine's connections, against a main that can be slow, empty or generous."""

import asyncio
import random

import pytest

from quotepush.node.allotment import Allotment
from quotepush.node.places import SPARE_PLACES, Places, PlacesByAddress


class FakeMain:
    """Counts like the supervisor; answers when a test says so."""

    def __init__(self, limit: int, *, spares: bool = True) -> None:
        self.limit = limit
        self.spares = spares
        self.granted = 0
        self.questions: list[tuple[int, int]] = []
        self.places = Places(lambda needed, spare: self.questions.append((needed, spare)), self.take_back)

    def take_back(self, count: int) -> None:
        self.granted -= count
        assert self.granted >= 0

    def answer(self) -> None:
        needed, spare = self.questions.pop(0)
        count = min(self.limit - self.granted, needed + (spare if self.spares else 0))
        self.granted += count
        self.places.granted(count)


async def test_the_first_connection_waits_for_main_and_the_next_ones_do_not() -> None:
    main = FakeMain(1000)
    first = asyncio.ensure_future(main.places.take())
    await asyncio.sleep(0)
    assert not first.done()
    main.answer()
    assert await first == ""
    for _ in range(SPARE_PLACES // 2):
        assert await main.places.take() == ""
    assert main.questions == []


async def test_more_is_asked_for_before_the_spare_places_are_used_up() -> None:
    main = FakeMain(1000)
    task = asyncio.ensure_future(main.places.take())
    await asyncio.sleep(0)
    main.answer()
    await task
    for _ in range(SPARE_PLACES // 2 + 1):
        await main.places.take()
    assert main.questions == [(0, SPARE_PLACES)]


async def test_a_full_machine_refuses_exactly_those_who_find_no_place() -> None:
    main = FakeMain(3, spares=False)
    tasks = [asyncio.ensure_future(main.places.take()) for _ in range(5)]
    await asyncio.sleep(0)
    while main.questions:
        main.answer()
    assert await asyncio.gather(*tasks) == ["", "", "", "overloaded", "overloaded"]


async def test_on_a_full_machine_a_place_goes_back_at_once_so_that_another_worker_can_give_it_away() -> None:
    main = FakeMain(3, spares=False)
    tasks = [asyncio.ensure_future(main.places.take()) for _ in range(3)]
    await asyncio.sleep(0)
    while main.questions:
        main.answer()
    assert not any(await asyncio.gather(*tasks))
    main.places.leave()
    assert main.granted == 2
    again = asyncio.ensure_future(main.places.take())
    await asyncio.sleep(0)
    main.answer()
    assert await again == ""


async def test_a_client_that_gives_up_while_main_is_asked_leaves_its_place_to_another() -> None:
    main = FakeMain(1, spares=False)
    impatient = asyncio.ensure_future(main.places.take())
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    main.answer()
    assert await main.places.take() == ""


async def test_spare_places_that_nobody_needs_go_back_within_two_rounds() -> None:
    main = FakeMain(1000)
    task = asyncio.ensure_future(main.places.take())
    await asyncio.sleep(0)
    main.answer()
    await task
    main.places.settle()
    assert main.places.settle() == 0
    assert main.granted == 1


async def test_many_leaving_at_once_give_their_places_back() -> None:
    main = FakeMain(1000)
    for _ in range(500):
        task = asyncio.ensure_future(main.places.take())
        await asyncio.sleep(0)
        while main.questions:
            main.answer()
        assert await task == ""
    for _ in range(500):
        main.places.leave()
    assert main.granted <= 2 * SPARE_PLACES


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_main_counts_at_least_the_open_connections_and_never_more_than_the_limit(
    seed: int,
) -> None:
    rng = random.Random(seed)
    main = FakeMain(rng.choice([1, 5, 200]))
    is_open = 0
    waiting: list[asyncio.Future[str]] = []
    for _ in range(600):
        step = rng.random()
        if step < 0.4:
            waiting.append(asyncio.ensure_future(main.places.take()))
        elif step < 0.6 and is_open:
            is_open -= 1
            main.places.leave()
        elif step < 0.65 and waiting:
            rng.choice(waiting).cancel()
        elif step < 0.7:
            main.places.settle()
        elif main.questions:
            main.answer()
        await asyncio.sleep(0)
        still: list[asyncio.Future[str]] = []
        for task in waiting:
            if not task.done():
                still.append(task)
            elif not task.cancelled() and not task.result():
                is_open += 1
        waiting = still
        assert is_open <= main.granted <= main.limit
    while main.questions:
        main.answer()
    is_open += (await asyncio.gather(*waiting)).count("")
    for _ in range(is_open):
        main.places.leave()
    for _ in range(2):
        main.places.settle()
    assert main.granted == 0


async def test_a_storm_puts_one_question_for_all_who_wait() -> None:
    main = FakeMain(100_000)
    tasks = [asyncio.ensure_future(main.places.take()) for _ in range(300)]
    await asyncio.sleep(0)
    while main.questions:
        main.answer()
        await asyncio.sleep(0)
    assert not any(await asyncio.gather(*tasks))
    assert main.granted <= 300 + 2 * SPARE_PLACES


# Places that are counted by address


class CountingMain:
    """Counts like the supervisor where addresses are counted; answers when a test says so."""

    def __init__(self, most: int, each: int) -> None:
        self.allotment = Allotment(1, most, each)
        self.questions: list[list[str]] = []
        self.places = PlacesByAddress(self.questions.append, lambda back: self.allotment.give_back(0, 0, back))

    def answer(self) -> None:
        self.places.granted(0, self.allotment.seat(0, self.questions.pop(0)))


async def test_each_address_is_asked_for_and_hears_its_own_word() -> None:
    main = CountingMain(3, 2)
    tasks = [asyncio.ensure_future(main.places.take(address)) for address in ("a", "b", "a", "a", "b")]
    await asyncio.sleep(0)
    while main.questions:
        main.answer()
    assert await asyncio.gather(*tasks) == ["", "", "", "too_many_connections", "overloaded"]
    main.places.leave("a")
    again = asyncio.ensure_future(main.places.take("a"))
    await asyncio.sleep(0)
    main.answer()
    assert await again == ""


async def test_a_storm_of_addresses_is_two_questions() -> None:
    main = CountingMain(1000, 0)
    tasks = [asyncio.ensure_future(main.places.take(f"a{n}")) for n in range(300)]
    await asyncio.sleep(0)
    assert [len(question) for question in main.questions] == [1]
    main.answer()
    assert [len(question) for question in main.questions] == [299]
    main.answer()
    assert set(await asyncio.gather(*tasks)) == {""}
    assert main.places.settle() == 0


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_main_counts_the_open_connections_of_each_address(seed: int) -> None:
    rng = random.Random(seed)
    main = CountingMain(rng.choice([2, 20]), rng.choice([1, 3]))
    is_open: list[str] = []
    waiting: list[tuple[str, asyncio.Future[str]]] = []
    for _ in range(500):
        step = rng.random()
        if step < 0.4:
            address = rng.choice("abcdefgh")
            waiting.append((address, asyncio.ensure_future(main.places.take(address))))
        elif step < 0.6 and is_open:
            main.places.leave(is_open.pop(rng.randrange(len(is_open))))
        elif step < 0.7 and waiting:
            rng.choice(waiting)[1].cancel()
        elif main.questions:
            main.answer()
        await asyncio.sleep(0)
        for address, task in [entry for entry in waiting if entry[1].done()]:
            waiting.remove((address, task))
            if not task.cancelled() and not task.result():
                is_open.append(address)
        assert len(is_open) <= main.allotment.held(0) <= main.allotment.most
    while main.questions:
        main.answer()
        await asyncio.sleep(0)
    said = await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
    is_open += [address for (address, _), word in zip(waiting, said, strict=True) if word == ""]
    assert (main.allotment.held(0), main.allotment.addresses) == (len(is_open), len(set(is_open)))
