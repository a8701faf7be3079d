"""How long a client stays away, for one and for a thousand."""

import random
from collections import Counter

import pytest

from quotepush.client_link import pause_s


@pytest.mark.parametrize(("attempt", "bound_s"), [(0, 0.5), (1, 1.0), (5, 16.0), (6, 20.0), (10**9, 20.0)])
def test_the_bound_of_a_pause_doubles_up_to_the_most(attempt: int, bound_s: float) -> None:
    assert pause_s(attempt, 0.0, 0.5, 20.0, 0.0) == 0.0
    assert pause_s(attempt, 0.0, 0.5, 20.0, 0.5) == bound_s / 2
    assert pause_s(attempt, 7.0, 0.5, 20.0, 1.0) == 7.0 + bound_s


def attempts_of(clients: int, away_s: float, told_s: float = 0.0) -> tuple[Counter[int], list[float]]:
    """Let clients lose their server together for so long; attempts by tenth of a second, and when each was back."""
    chance = random.Random(1).random
    attempts: Counter[int] = Counter()
    back: list[float] = []
    for _ in range(clients):
        now_s, attempt = 0.0, 0
        while True:
            now_s += pause_s(attempt, told_s if attempt == 0 else 0.0, 0.5, 20.0, chance())
            attempts[int(now_s * 10)] += 1
            attempt += 1
            if now_s >= away_s:
                break
        back.append(now_s)
    return attempts, sorted(back)


def test_a_thousand_clients_come_back_to_a_restarted_server_spread_evenly() -> None:
    """It asks for a second: they come in the half second after it, about 200 in each tenth, none before."""
    attempts, back = attempts_of(1000, 1.0, told_s=1.0)
    assert attempts.keys() == {10, 11, 12, 13, 14}
    assert all(160 < count < 240 for count in attempts.values())
    assert back[0] >= 1.0 and back[-1] < 1.5


def test_a_thousand_clients_come_back_without_a_storm_after_half_a_minute() -> None:
    """By then their pauses are up to 20 s: about 10 come in each tenth of a second, half of them within 5 s."""
    attempts, back = attempts_of(1000, 30.0)
    assert max(count for tenth, count in attempts.items() if tenth >= 300) < 30
    assert 2 < back[500] - 30 < 8
    assert back[-1] < 50
    # Meanwhile nobody hammers: the attempts of a second fall from two thousand to a hundred.
    assert sum(attempts[tenth] for tenth in range(290, 300)) < 150
