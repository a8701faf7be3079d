"""Whose request it is: the address of a client that may stand behind proxies.

Law: no address is believed that a client could have made up. A header is read only when the peer itself is a trusted
proxy, from its right end, where the proxies wrote; each hop names the one before it, and the first that is no trusted
proxy is the client. What cannot be read ends the walk: the client is then the last address that is known for true.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

__all__ = ["UNKNOWN", "Proxies", "counted_by"]

UNKNOWN = "?"
# So many proxies in a row are followed; a longer list is somebody's trick.
_MOST_HOPS = 50
# Clients get at least a whole /64 each (RFC 6177), so one may have as many addresses as it likes.
_IPV6_BITS = 64

# An address with or without a port, which may be a name that hides it (RFC 7239 §6.2).
_NODE = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]+))?", re.ASCII)
_PARAMETER = re.compile(r'[ \t]*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)=("(?:[^"\\]|\\.)*"|[^",;\s]*)[ \t]*(?:;|\Z)', re.ASCII)

_Address = IPv4Address | IPv6Address


class Proxies:
    """The proxies in front of this server, and what they say of their clients.

    Args:
        trusted: their addresses and networks; none: no header is believed.
        header: where they name their clients: ``x-forwarded-for`` (a list of addresses, de facto) or ``forwarded`` (of
            parameters, RFC 7239). The other one is never read: a proxy that does not know it would let it pass.
    """

    def __init__(self, trusted: Sequence[str], header: str) -> None:
        self.header = header
        self._trusted = [_plain_network(ip_network(text)) for text in trusted]
        self._hops = _forwarded_hops if header == "forwarded" else _listed_hops

    def client_of(self, peer: str | None, said: Sequence[str]) -> str:
        """Return the address of the client.

        Args:
            peer: who is at the other end of the socket; None or empty: nobody knows.
            said: the lines of the header, in their order.
        """
        if not peer:
            return UNKNOWN
        if not self._trusted:
            return _plain_text(peer)
        address = _address(peer.partition("%")[0])
        if address is None:
            return UNKNOWN
        for number, hop in enumerate(self._hops(",".join(said)) if said else ()):
            if number == _MOST_HOPS or not self._trusts(address):
                break
            before = _node(hop)
            if before is None:
                break
            address = before
        return str(address)

    def _trusts(self, address: _Address) -> bool:
        return any(address in network for network in self._trusted)


def counted_by(address: str) -> str:
    """Return what the limits of an address are counted by: itself, or the /64 of an IPv6 address; empty: unknown."""
    if ":" not in address:
        return "" if address == UNKNOWN else address
    whole = int(IPv6Address(address))
    return f"{IPv6Address(whole >> _IPV6_BITS << _IPV6_BITS)}/{_IPV6_BITS}"


def _plain(address: _Address) -> _Address:
    """Return an IPv4 address that came in at an IPv6 socket (RFC 4291 §2.5.5.2) as what it is."""
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def _plain_text(peer: str) -> str:
    """Return the kernel's text of a peer's address without a zone, and IPv4 as IPv4."""
    if ":" not in peer:
        return peer
    address = _address(peer.partition("%")[0])
    return UNKNOWN if address is None else str(address)


def _plain_network(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is None or network.prefixlen < 96:
        return network
    return IPv4Network((mapped, network.prefixlen - 96))


def _address(text: str) -> _Address | None:
    try:
        return _plain(ip_address(text))
    except ValueError:
        return None


def _node(text: str) -> _Address | None:
    """Return the address that a hop names; None: it names none (``unknown``, ``_hidden``), or is garbage."""
    found = _NODE.fullmatch(text)
    if found is not None:
        return _address(found[1] or found[2])
    return _address(text) if "%" not in text else None  # IPv6 without brackets, and so without a port


def _listed_hops(said: str) -> Iterator[str]:
    """Yield the hops of X-Forwarded-For, the nearest first."""
    for hop in _from_the_right(said):
        hop = hop.strip(" \t")
        yield hop[1:-1] if len(hop) > 1 and hop[0] == hop[-1] == '"' else hop


def _forwarded_hops(said: str) -> Iterator[str]:
    """Yield the hops of Forwarded (RFC 7239 §4), the nearest first; an empty text where one names nobody."""
    for element in _from_the_right(said):
        yield _named_in(element)


def _named_in(element: str) -> str:
    """Return the ``for`` of one element, without its quotes; nothing when it is not there exactly once."""
    named: list[str] = []
    at = 0
    while at < len(element):
        found = _PARAMETER.match(element, at)
        if found is None:
            return ""
        if found[1].lower() == "for":
            value = found[2]
            named.append(re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value)
        at = found.end()
    return named[0] if len(named) == 1 else ""


def _from_the_right(said: str) -> Iterator[str]:
    """Yield what stands between the commas outside of quotes, from the right.

    A quote that a client leaves open thus never swallows what a proxy has written behind it.
    """
    if '"' not in said:
        yield from _between_commas(said)
        return
    end = len(said)
    is_quoted = False
    for at in range(len(said) - 1, -1, -1):
        letter = said[at]
        if letter == '"':
            first = at
            while first and said[first - 1] == "\\":
                first -= 1
            if (at - first) % 2 == 0:  # else it is escaped
                is_quoted = not is_quoted
        elif letter == "," and not is_quoted:
            yield said[at + 1 : end]
            end = at
    yield said[:end]


def _between_commas(said: str) -> Iterable[str]:
    return reversed(said.rsplit(",", _MOST_HOPS + 1))
