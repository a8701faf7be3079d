"""Whose request it is: what trusted proxies say is believed, what a client makes up never."""

from ipaddress import IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.push.addresses import UNKNOWN, Proxies, counted_by

TRUSTED = ["10.0.0.0/8", "127.0.0.1", "2001:db8:1::/48"]
PROXY = "127.0.0.1"

addresses = st.ip_addresses().map(str)
strangers = addresses.filter(
    lambda text: (
        not any(
            ip in ip_network(net)
            for net in TRUSTED
            for ip in (ip_address(text), getattr(ip_address(text), "ipv4_mapped", None) or ip_address(text))
        )
    )
)
own = st.sampled_from(["10.0.0.1", "10.255.255.255", "127.0.0.1", "2001:db8:1::7", "::ffff:10.1.2.3"])


def listed(peer: str | None, *said: str) -> str:
    return Proxies(TRUSTED, "x-forwarded-for").client_of(peer, said)


def forwarded(peer: str | None, *said: str) -> str:
    return Proxies(TRUSTED, "forwarded").client_of(peer, said)


def plain(text: str) -> str:
    ip = ip_address(text)
    return str((isinstance(ip, IPv6Address) and ip.ipv4_mapped) or ip)


def as_forwarded(text: str) -> str:
    return f'for="[{text}]"' if ":" in text else f"for={text}"


# Who is believed


@settings(deadline=None)
@given(strangers, st.lists(st.text(max_size=30), max_size=5))
def test_a_peer_that_is_no_trusted_proxy_is_the_client_whatever_it_says(peer: str, said: list[str]) -> None:
    assert listed(peer, *said) == forwarded(peer, *said) == plain(peer)


@settings(deadline=None)
@given(addresses, st.lists(st.text(max_size=30), max_size=5))
def test_without_trusted_proxies_no_header_is_believed(peer: str, said: list[str]) -> None:
    for header in ("x-forwarded-for", "forwarded"):
        assert Proxies([], header).client_of(peer, said) == plain(peer)


@settings(deadline=None)
@given(strangers, st.lists(own, max_size=10), st.text(max_size=60), st.integers(0, 3))
def test_what_a_client_makes_up_before_its_proxies_changes_nothing(
    client: str, proxies: list[str], made_up: str, lines: int
) -> None:
    hops = [client, *proxies]
    assert listed(PROXY, *[made_up] * lines, ", ".join(hops)) == plain(client)
    assert forwarded(PROXY, *[made_up] * lines, ", ".join(map(as_forwarded, hops))) == plain(client)


@settings(deadline=None)
@given(strangers, st.lists(own, max_size=10), st.text(alphabet='",;=\\ for[]:.1a_', max_size=60))
def test_a_quote_that_a_client_leaves_open_swallows_nothing(client: str, proxies: list[str], made_up: str) -> None:
    said = ",".join([made_up, *map(as_forwarded, [client, *proxies])])
    assert forwarded(PROXY, said) == plain(client)


@settings(deadline=None)
@given(strangers, st.lists(own, min_size=1, max_size=10), st.data())
def test_it_is_the_same_however_many_lines_the_header_has(client: str, proxies: list[str], data: st.DataObject) -> None:
    hops = [client, *proxies]
    at = data.draw(st.integers(1, len(hops) - 1))
    assert listed(PROXY, ",".join(hops[:at]), " , ".join(hops[at:])) == plain(client)


@settings(deadline=None)
@given(st.lists(st.text(max_size=200), max_size=5), st.one_of(st.none(), st.text(max_size=30), addresses))
def test_whatever_is_said_the_answer_is_an_address_or_that_nobody_knows(said: list[str], peer: str | None) -> None:
    for found in (listed(peer, *said), forwarded(peer, *said)):
        assert found == UNKNOWN or plain(found) == found


# How addresses are written


@pytest.mark.parametrize(
    ("hop", "client"),
    [
        ("192.0.2.7", "192.0.2.7"), (" 192.0.2.7\t", "192.0.2.7"), ("192.0.2.7:4711", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7"), ("[2001:db8::7]", "2001:db8::7"), ("[2001:db8::7]:4711", "2001:db8::7"),
        ('"[2001:db8::7]:4711"', "2001:db8::7"), ('"192.0.2.7"', "192.0.2.7"), ("2001:DB8:0:0::7", "2001:db8::7"),
        ("::ffff:192.0.2.7", "192.0.2.7"), ("[::ffff:192.0.2.7]:1", "192.0.2.7"), ("192.0.2.7:_port", "192.0.2.7"),
    ],
)  # fmt: skip
def test_a_listed_hop_may_be_written_in_many_ways(hop: str, client: str) -> None:
    assert listed(PROXY, f"203.0.113.9, {hop}") == client


@pytest.mark.parametrize(
    ("element", "client"),
    [
        ("for=192.0.2.7", "192.0.2.7"), ("For=192.0.2.7;proto=http;by=203.0.113.43", "192.0.2.7"),
        ("proto=https ; FOR=192.0.2.7", "192.0.2.7"), ('for="192.0.2.7:4711"', "192.0.2.7"),
        ('for="[2001:db8::7]:4711"', "2001:db8::7"), ('for="[2001:db8::7]:_x"', "2001:db8::7"),
        ("for=192.0.2.7:4711", "192.0.2.7"), ('host="a,b;\\"c";for=192.0.2.7', "192.0.2.7"),
        ('for="\\192.0.2.7"', "192.0.2.7"), ('by="_x\\\\";for=192.0.2.7', "192.0.2.7"),
    ],
)  # fmt: skip
def test_a_forwarded_hop_may_be_written_in_many_ways(element: str, client: str) -> None:
    assert forwarded(PROXY, f"for=203.0.113.9, {element}") == client


HIDDEN = [
    "unknown", "_hidden", "_SEVKISEK", "", " ", "garbage", "999.1.1.1", "1.2.3", "[::1", "::1]", "1.2.3.4:", "a b",
    "1.2.3.4:123456", "fe80::1%eth0", "[fe80::1%eth0]", "01.2.3.4", "1.2.3.4/8", "\u0661.2.3.4", "[1.2.3.4",
]  # fmt: skip


@pytest.mark.parametrize("hop", HIDDEN)
def test_behind_what_cannot_be_read_the_client_is_the_last_address_that_is_known(hop: str) -> None:
    assert listed(PROXY, f"192.0.2.7, {hop}, 10.0.0.3") == "10.0.0.3"
    assert listed(PROXY, f"192.0.2.7, {hop}") == PROXY
    assert forwarded(PROXY, f'for=192.0.2.7, for="{hop}", for=10.0.0.3') == "10.0.0.3"


@pytest.mark.parametrize(
    "element",
    ["by=192.0.2.7", "for=192.0.2.7;for=192.0.2.8", "for", "for 192.0.2.7", "192.0.2.7", 'for="192.0.2.7', ";",
     "for=;x", "for=192.0.2.7 x", "=192.0.2.7", 'for="192.0.2.7"x'],
)  # fmt: skip
def test_a_forwarded_element_that_does_not_say_exactly_one_client_says_nobody(element: str) -> None:
    assert forwarded(PROXY, f"for=203.0.113.9, {element}, for=10.0.0.3") == "10.0.0.3"


# Peers and chains


@pytest.mark.parametrize("peer", [None, "", "?", "/run/quotepush.sock"])
def test_nobody_knows_who_is_behind_a_peer_without_an_address(peer: str | None) -> None:
    assert listed(peer, "192.0.2.7") == UNKNOWN


@pytest.mark.parametrize("trusted", [TRUSTED, []])
def test_the_zone_of_a_peer_is_no_part_of_its_address(trusted: list[str]) -> None:
    assert Proxies(trusted, "forwarded").client_of("fe80::1%eth0", ()) == "fe80::1"


def test_a_network_of_mapped_addresses_is_one_of_ipv4() -> None:
    proxies = Proxies(["::ffff:10.0.0.0/104"], "x-forwarded-for")
    assert proxies.client_of("::ffff:10.1.1.1", ["192.0.2.7"]) == "192.0.2.7"


def test_when_every_hop_is_a_trusted_proxy_the_first_is_the_client() -> None:
    assert listed(PROXY, "10.0.0.1, 10.0.0.2") == "10.0.0.1"
    assert listed(PROXY) == PROXY


@pytest.mark.parametrize(("proxies", "is_found"), [(48, True), (49, True), (50, False), (1500, False)])
def test_no_more_than_fifty_hops_are_followed(proxies: int, is_found: bool) -> None:
    chain = ["192.0.2.7", *(f"10.0.{n // 250}.{n % 250}" for n in range(proxies))]
    found = listed(PROXY, ",".join(chain))
    assert found == ("192.0.2.7" if is_found else chain[-50])
    assert forwarded(PROXY, ",".join(map(as_forwarded, chain))) == found


# What the limits count by


@settings(deadline=None)
@given(st.ip_addresses(v=4).map(str))
def test_an_ipv4_address_counts_for_itself(address: str) -> None:
    assert counted_by(address) == address


@settings(deadline=None)
@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1), st.integers(0, 127))
def test_ipv6_addresses_count_together_exactly_within_their_64(ip: IPv6Address, low: int, bit: int) -> None:
    sibling = IPv6Address(int(ip) >> 64 << 64 | low)
    other = IPv6Address(int(ip) ^ 1 << bit)
    assert counted_by(str(ip)) == counted_by(str(sibling))
    assert (counted_by(str(ip)) == counted_by(str(other))) is (bit < 64)
    assert ip in ip_network(counted_by(str(ip)))


def test_whom_nobody_knows_nobody_counts() -> None:
    assert counted_by(UNKNOWN) == ""
