"""The listing of a simulated market: real codes first, invented ones that stand on nobody's."""

import re

import pytest

from quotepush.feed.listing import MAX_CODES, PINNED, listed


def test_shortest_listing_is_the_two_pinned_codes():
    assert tuple(one.code for one in listed(2, seed=1)) == PINNED


def test_well_known_codes_come_with_their_names_and_limits():
    by_code = {one.code: one for one in listed(200, seed=1)}

    assert by_code["600519.SH"].name == "贵州茅台"
    assert by_code["000001.SZ"].name == "平安银行"
    assert by_code["BRK.B"].name == "Berkshire Hathaway B"
    assert by_code["600519.SH"].limit_tenths == 1
    assert by_code["300750.SZ"].limit_tenths == by_code["688981.SH"].limit_tenths == 2
    assert by_code["AAPL"].limit_tenths == 0


def test_longest_listing_has_no_code_twice_and_only_well_formed_ones():
    listing = listed(MAX_CODES, seed=3)

    codes = [one.code for one in listing]
    assert len(codes) == len(set(codes)) == MAX_CODES
    assert all(re.fullmatch(r"[0-9]{6}\.(SH|SZ)|[A-Z.]{1,5}", code) for code in codes)
    assert all(one.name and one.price_cents >= 100 for one in listing)


def test_both_markets_share_a_listing_of_thousands():
    a_shares = sum(one.limit_tenths > 0 for one in listed(3000, seed=1))

    assert 1400 < a_shares < 1600


def test_same_seed_lists_the_same_and_a_longer_listing_begins_with_the_shorter():
    assert listed(2000, seed=5)[:500] == listed(500, seed=5)
    assert listed(2000, seed=5) != listed(2000, seed=6)


@pytest.mark.parametrize("count", [1, MAX_CODES + 1])
def test_impossible_length_is_refused(count: int):
    with pytest.raises(ValueError, match="codes"):
        listed(count, seed=1)
