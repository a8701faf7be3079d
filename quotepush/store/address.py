"""What an address of Redis says, and what is wrong with one. No I/O.

::

    redis://[user:password@]host[:port][/db]               one server; rediss:// with TLS
    unix://[user:password@]/path/to/socket[?db=0]           one server on this machine
    redis+sentinel://[user:password@]host[:port],…/service[/db]
                                                            whichever server the sentinels call the master
    redis+cluster://[user:password@]host[:port],…           a Redis Cluster, found through some of its nodes

``rediss+sentinel://`` and ``rediss+cluster://`` speak TLS with everybody. User and password are those of Redis and
may be percent-encoded. What may follow a ``?`` is in ``OPTIONS``.

Law: no fault and no shown address has a password in it.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, unquote

__all__ = [
    "OPTIONS",
    "Address",
    "BadAddress",
    "parse_address",
    "shown_address",
    "with_password",
    "without_password",
]

Kind = Literal["server", "sentinel", "cluster"]
Place = tuple[str, int]

_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("server", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_PORT = 6379
_SENTINEL_PORT = 26379

OPTIONS: Mapping[str, str] = {
    "db": "number of the database, where it is not in the path",
    "username": "user of Redis, where it is not before the host",
    "password": "his password, where it is not before the host",
    "role": "with Sentinel: replica hears ticks from a replica, from the master while there is none",
    "sentinel_username": "user of the sentinels",
    "sentinel_password": "password of the sentinels; without it they are asked without one",
    "ssl_ca_certs": "with TLS: PEM file with the authorities that are trusted; else the system's",
    "ssl_ca_path": "with TLS: directory with such files",
    "ssl_certfile": "with TLS: PEM file with the certificate that we show",
    "ssl_keyfile": "with TLS: PEM file with its key",
    "ssl_password": "with TLS: password of that key",
    "ssl_cert_reqs": "with TLS: required (the default), optional or none: whether the server must show a certificate",
    "ssl_check_hostname": "with TLS: no: its certificate need not name the host",
    "ssl_ciphers": "with TLS: ciphers up to TLS 1.2, as OpenSSL writes them",
}
"""What may follow the ``?`` of an address."""

_ONLY_SENTINEL = ("role", "sentinel_username", "sentinel_password")
_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_BOOLEANS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_FORM = re.compile(r"([a-z+]+)://(?:([^/?#]*)@)?([^@/?#]*)([^?#]*)(?:\?([^#]*))?\Z")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+))(?::(\d+))?\Z")


class BadAddress(ValueError):
    """An address is none; the text says why and holds no secret."""


@dataclass(frozen=True, slots=True)
class Address:
    """A checked address.

    Attributes:
        kind: ``server`` (one), ``sentinel`` or ``cluster``.
        places: host and port: of the server, of the sentinels, or of some nodes of the cluster. None for a socket.
        path: of the socket.
        service: what the sentinels call it.
        from_replica: ticks are heard from a replica.
        credentials: ``username`` and ``password`` of Redis, as far as they are given.
        sentinel_credentials: the same of the sentinels.
        tls: options of TLS by redis-py's names; None: without TLS.
    """

    kind: Kind
    places: tuple[Place, ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    from_replica: bool = False
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    sentinel_credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    tls: Mapping[str, Any] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Where it points to, without user, password and options."""
        if self.path:
            return f"unix:{self.path}"
        places = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.places)
        if self.kind == "sentinel":
            return f"{self.service} of sentinels {places}"
        return f"cluster {places}" if self.kind == "cluster" else places


def parse_address(url: str) -> Address:
    """Return what an address says.

    Raises:
        BadAddress: it is none.
    """
    scheme = url.partition("://")[0]
    if scheme not in _SCHEMES:
        raise BadAddress(
            "must begin with redis://, rediss:// or unix://, or with redis+sentinel:// or redis+cluster:// "
            "(rediss+… with TLS)"
        )
    kind, is_tls = _SCHEMES[scheme]
    match = _FORM.match(url)
    if match is None:
        raise BadAddress("is not a URL; in a password write / ? # as %2F %3F %23")
    _, login, hosts, path, query = match.groups()
    options = _options(query or "", kind, is_tls)
    credentials = _credentials(login or "", options)
    db = options.pop("db", "")
    if scheme == "unix":
        if not path or hosts:
            raise BadAddress("names no socket; write unix:///path/to/socket")
        return Address(kind, path=unquote(path), db=_number(db), credentials=credentials)
    places = _places(hosts, _SENTINEL_PORT if kind == "sentinel" else _PORT)
    if kind == "server" and len(places) > 1:
        raise BadAddress("names several hosts; write redis+sentinel://… or redis+cluster://…")
    service, in_path = _service(path) if kind == "sentinel" else ("", path.strip("/"))
    number = _number(db or in_path)
    if kind == "cluster" and number:
        raise BadAddress("names a database, but a Redis Cluster has only database 0")
    return Address(
        kind, places,
        service=service, db=number, from_replica=options.pop("role", "master") == "replica", credentials=credentials,
        sentinel_credentials={
            name: options.pop(f"sentinel_{name}")
            for name in ("username", "password")
            if f"sentinel_{name}" in options
        },
        tls=_tls(options) if is_tls else None,
    )  # fmt: skip


def _options(query: str, kind: Kind, is_tls: bool) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in OPTIONS:
            # It is not named: it may be a part of a password that nobody has quoted.
            raise BadAddress("has an option that is unknown; see docs/operations.md for those that there are")
        if name in _ONLY_SENTINEL and kind != "sentinel":
            raise BadAddress(f"has the option {name}, which is for redis+sentinel://")
        if name.startswith("ssl_") and not is_tls:
            raise BadAddress(f"has the option {name}, but speaks no TLS; begin it with rediss")
    if options.get("role", "master") not in ("master", "replica"):
        raise BadAddress(f"has the role {options['role'][:40]!r}; it must be master or replica")
    return options


def _credentials(login: str, options: dict[str, str]) -> dict[str, str]:
    user, colon, password = login.partition(":")
    found = {"username": unquote(user), "password": unquote(password)}
    if not user:
        found["username"] = options.get("username", "")
    if not colon:
        found["password"] = options.get("password", "")
    options.pop("username", None)
    options.pop("password", None)
    return {name: value for name, value in found.items() if value}


def _places(hosts: str, port: int) -> tuple[Place, ...]:
    found = []
    for number, host in enumerate(hosts.split(","), 1):
        match = _HOST.match(host)
        if match is None:
            # What does not look like a host may be a part of a password.
            raise BadAddress(f"names no host and port in place {number}" if hosts else "names no host")
        at = int(match[3] or port)
        if not 0 < at < 65536:
            raise BadAddress(f"names the port {at}, which is none")
        found.append((match[1] or match[2], at))
    return tuple(found)


def _service(path: str) -> tuple[str, str]:
    service, _, db = path.removeprefix("/").partition("/")
    if not service:
        raise BadAddress("names no service of the sentinels; write redis+sentinel://host:26379/mymaster")
    return unquote(service), db


def _number(text: str) -> int:
    if text and not (text.isascii() and text.isdigit()):
        raise BadAddress("names a database that is no number")
    return int(text or 0)


def _tls(options: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = dict(options)
    if "ssl_check_hostname" in found:
        flag = _BOOLEANS.get(found["ssl_check_hostname"].lower())
        if flag is None:
            raise BadAddress("has an ssl_check_hostname that is neither yes nor no")
        found["ssl_check_hostname"] = flag
    if found.get("ssl_cert_reqs", "required") not in ("required", "optional", "none"):
        raise BadAddress("has an ssl_cert_reqs that is neither required, optional nor none")
    if "ssl_keyfile" in found and "ssl_certfile" not in found:
        raise BadAddress("has an ssl_keyfile without its ssl_certfile")
    for name in _FILES:
        if name in found and not os.access(found[name], os.R_OK):
            raise BadAddress(f"has an {name} that cannot be read: {found[name]}")
    return found


def shown_address(url: str) -> str:
    """Return where an address points to, without user, password and options."""
    try:
        return str(parse_address(url))
    except BadAddress:
        return "an address that is none"


def without_password(url: str) -> str:
    """Return an address that may be printed: passwords are replaced by ``***``, in broken addresses too."""
    # Up to the last @: in a password that nobody has quoted may stand whatever else divides a URL.
    url = re.sub(r"//([^:@/?#]*):.*@", r"//\1:***@", url)
    return re.sub(r"([?&])([^=&#]*)=([^&#]*)", _without_secret, url)


def _without_secret(option: "re.Match[str]") -> str:
    mark, name, value = option.groups()
    return f"{mark}{name}={'***' if unquote(name).lower().endswith('password') else value}"


def with_password(url: str, password: str) -> str:
    """Return an address with the password of Redis in it, unless it has one.

    Raises:
        BadAddress: it is none.
    """
    if not password or "password" in parse_address(url).credentials:
        return url
    scheme, _, rest = url.partition("://")
    end = re.search(r"[/?#]", rest)
    authority = rest[: end.start()] if end else rest
    login, _, hosts = authority.rpartition("@")
    return f"{scheme}://{login.partition(':')[0]}:{quote(password, safe='')}@{hosts}{rest[len(authority) :]}"
