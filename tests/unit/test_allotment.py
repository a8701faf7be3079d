"""Main's count of places: for workers, and for addresses."""

import random
from collections import Counter

import pytest

from quotepush.node.allotment import Allotment


def test_a_worker_gets_what_it_needs_and_spare_places_while_there_are_many() -> None:
    allotment = Allotment(2, 1000)
    assert allotment.grant(0, 1, 64) == 65
    assert allotment.held(0) == 65
    assert allotment.grant(1, 5, 64) == 69


def test_near_the_limit_nobody_gets_places_to_spare_and_beyond_it_nobody_gets_any() -> None:
    allotment = Allotment(2, 10)
    assert allotment.grant(0, 6, 64) == 6
    assert allotment.grant(1, 6, 64) == 4
    assert allotment.grant(0, 1, 64) == 0
    allotment.give_back(1, 3)
    assert allotment.grant(0, 5, 0) == 3


def test_an_address_gets_no_more_than_it_may_have_on_all_workers_together() -> None:
    allotment = Allotment(2, 100, 3)
    assert allotment.seat(0, ["a", "a", "b"]) == ["", "", ""]
    assert allotment.seat(1, ["a", "a", "b"]) == ["", "too_many_connections", ""]
    allotment.give_back(0, 0, ["a"])
    assert allotment.seat(1, ["a", "a"]) == ["", "too_many_connections"]


def test_a_full_machine_is_full_for_every_address() -> None:
    allotment = Allotment(1, 2, 1)
    assert allotment.seat(0, ["a", "b", "c", "a"]) == ["", "", "overloaded", "too_many_connections"]


def test_whom_nobody_knows_takes_a_place_and_is_not_counted() -> None:
    allotment = Allotment(1, 3, 1)
    assert allotment.seat(0, ["", "", "", ""]) == ["", "", "", "overloaded"]
    assert allotment.addresses == 0
    allotment.give_back(0, 0, ["", ""])
    assert allotment.held(0) == 1


def test_a_worker_that_dies_gives_back_its_places_and_its_addresses_and_nobody_elses() -> None:
    allotment = Allotment(2, 4, 2)
    allotment.seat(0, ["a", "b"])
    allotment.seat(1, ["a"])
    allotment.forget(0)
    assert (allotment.held(0), allotment.held(1), allotment.addresses) == (0, 1, 1)
    assert allotment.seat(0, ["a", "a", "b"]) == ["", "too_many_connections", ""]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_counts_are_those_of_the_open_connections(seed: int) -> None:
    rng = random.Random(seed)
    workers, most, each = rng.choice([1, 3]), rng.choice([5, 50]), rng.choice([1, 4])
    allotment = Allotment(workers, most, each)
    is_open: list[list[str]] = [[] for _ in range(workers)]
    for _ in range(500):
        worker = rng.randrange(workers)
        step = rng.random()
        if step < 0.6:
            asked = [rng.choice(["", "a", "b", "c", f"d{rng.randrange(30)}"]) for _ in range(rng.randrange(4))]
            words = allotment.seat(worker, asked)
            is_open[worker] += [address for address, word in zip(asked, words, strict=True) if not word]
        elif step < 0.95:
            rng.shuffle(is_open[worker])
            gone = [is_open[worker].pop() for _ in range(min(len(is_open[worker]), rng.randrange(4)))]
            allotment.give_back(worker, 0, gone)
        else:
            allotment.forget(worker)
            is_open[worker] = []
        counts = Counter(address for some in is_open for address in some if address)
        assert [allotment.held(n) for n in range(workers)] == [len(some) for some in is_open]
        assert sum(map(len, is_open)) <= most
        assert max(counts.values(), default=0) <= each
        assert allotment.addresses == len(counts)
    everybody = Counter(address for some in is_open for address in some if address)
    for address, count in everybody.items():  # who has room left has exactly that
        room = min(each - count, most - sum(map(len, is_open)))
        assert allotment.seat(0, [address] * (room + 1)).count("") == room
        allotment.give_back(0, 0, [address] * room)
