"""Every setting of the server: its default, its unit, what happens at the limit.

One frozen dataclass is the whole truth. ``--help``, ``docs/settings.md`` and
``quotepush.example.toml`` are generated from it, and no other module reads the
environment. Sources, the later ones win: the TOML file, ``QUOTEPUSH_<NAME>``
in the environment, flags. All faults of all sources are found at once.

Passwords may come in the Redis URL, or from ``QUOTEPUSH_FEED_REDIS_PASSWORD`` and
``QUOTEPUSH_REGISTRY_REDIS_PASSWORD``, or from a file (``feed_redis_password_file``,
``registry_redis_password_file``: for secrets that a supervisor mounts). Keys of tokens
and the token of the HTTP API have files too (``token_key_file``, ``api_token_file``). No secret
is in a ``repr`` or in a fault.
"""

import dataclasses
import ipaddress
import math
import os
import re
import socket
import tempfile
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from quotepush.entitlement import MOST_RATE, BadClaim, Codes, Entitlement
from quotepush.errors import SettingsError
from quotepush.store.address import BadAddress, parse_address, with_password, without_password
from quotepush.token_keys import BadKey, parse_keys, secret_key

__all__ = ["ENV_PREFIX", "Settings", "default_node", "example_toml", "load", "markdown"]

ENV_PREFIX = "QUOTEPUSH_"
_NODE = re.compile(r"[A-Za-z0-9-]{1,32}\Z")
_URLS = ("feed_redis", "registry_redis")
_PASSWORDS = tuple(f"{name}_password" for name in _URLS)
_OF_COMMANDS = ("config", "token")  # read by click: where the file is, and what `watch` shows to a server
_MOST_LEEWAY_S = 60
_LEAST_REFRESH_S = 10
_SECRETS = ("token_key", "api_token")
_LEAST_API_TOKEN = 16  # letters
_PROXY_HEADERS = ("x-forwarded-for", "forwarded")
# What else is at the public port, below base_path.
_OTHER_PATHS = ("/stream", "/quotes", "/codes")


def _setting(default: Any, doc: str, *, unit: str = "", at_least: float | None = None) -> Any:
    """Declare one setting: its sentence, its unit and its lowest value."""
    metadata = {"doc": doc, "unit": unit, "at_least": at_least}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one node, checked. Made by :func:`load`."""

    # Where clients connect.
    host: str = _setting("127.0.0.1", "Address of the public listener; 0.0.0.0 or :: for every interface.")
    port: int = _setting(8008, "Port of the public listener; 0 takes any free one.", at_least=0)
    base_path: str = _setting("", "Path in front of everything public, e.g. /quotes, when a proxy does not strip it.")
    ws_path: str = _setting("/ws", "Path of the WebSocket below base_path.")
    allowed_origins: list[str] = _setting(
        [], 'Origins of pages that may connect; empty: only pages of the server\'s own host; ["*"]: all.'
    )
    trusted_proxies: list[str] = _setting(
        [],
        "Addresses and networks of proxies whose word for a client's address is taken, e.g. 127.0.0.1 or 10.0.0.0/8; "
        "empty: nobody's, and the client is whoever is at the other end.",
    )
    proxy_header: str = _setting(
        "x-forwarded-for", "Where trusted_proxies name their clients: x-forwarded-for or forwarded; only one is read."
    )
    request_timeout_s: float = _setting(
        30.0,
        "A connection that has sent no whole request so long after it came, or after its last answer, is closed.",
        unit="s", at_least=0.1,
    )  # fmt: skip
    backlog: int = _setting(4096, "Connections the kernel holds until a worker accepts them.", at_least=1)
    tls_cert: str = _setting("", "PEM file with the certificate chain; with tls_key the public listener speaks TLS.")
    tls_key: str = _setting("", "PEM file with the private key of tls_cert.")

    # The private listener.
    admin_host: str = _setting(
        "127.0.0.1",
        "Address of the private listener (health, metrics, HTTP API); one that is no loopback needs an api_token.",
    )
    admin_port: int = _setting(8009, "Port of the private listener; 0 takes any free one.", at_least=0)

    api_token: str = _setting(
        "",
        "Secret that callers of the HTTP API show, at least 16 letters; empty: there is no HTTP API. "
        "A flag can be seen in the list of processes.",
    )
    api_token_file: str = _setting("", "File with api_token, instead of it; read at the start.")

    # Tokens.
    token_key: str = _setting(
        "",
        "Secret with which tokens are signed (HS256), at least 32 bytes. Without any key there are no tokens, and "
        "everybody may subscribe. A flag can be seen in the list of processes.",
    )
    token_key_file: list[str] = _setting(
        [],
        "Files with keys: a secret, public keys (RSA, EC P-256, Ed25519) as PEM, or a JWKS; read again when changed.",
    )
    token_jwks_url: str = _setting("", "Address of a JWKS with public keys; https, or http on this machine.")
    token_jwks_refresh_s: float = _setting(
        300.0, "How often token_jwks_url is fetched, besides when a token names an unknown key; at least 10.", unit="s"
    )
    token_audience: list[str] = _setting(
        [], "Each token must be for one of these (aud); empty: for nobody in particular."
    )
    token_issuer: list[str] = _setting([], "Each token must be of one of these (iss); empty: of anybody.")
    token_leeway_s: float = _setting(
        5.0, "By how much the clocks of whoever signs tokens and of this machine may differ, at most 60.", unit="s",
        at_least=0,
    )  # fmt: skip
    delays: list[int] = _setting(
        [900], "What a token's delay_s may be; with tokens, what the board showed is kept for the longest. []: none.",
        unit="s",
    )  # fmt: skip
    delay_bytes: int = _setting(
        268_435_456, "What is kept for delayed quotes; above it their rows stand for longer than a second.",
        unit="bytes", at_least=1 << 20,
    )  # fmt: skip
    anonymous: bool = _setting(False, "Whether clients without a token may come in where tokens are taken.")
    anonymous_codes: list[str] = _setting(["*"], "Codes that they may see, as in a token's codes: *.SH,AAPL.")
    anonymous_max_rate: float = _setting(
        0.0, "Most rows a second and code for them, at most 1000; 0: every row.", unit="1/s", at_least=0
    )
    anonymous_max_codes: int = _setting(0, "Codes of one connection of theirs; 0: max_codes.", at_least=0)
    anonymous_delay_s: int = _setting(0, "How old their quotes are, one of delays; 0: live.", unit="s", at_least=0)
    auth_timeout_s: float = _setting(
        10.0, "Without a token for so long a connection that needs one is closed with 4408.", unit="s", at_least=0.1
    )

    # This node.
    node: str = _setting("", "Name of this node in its cluster, [A-Za-z0-9-]{1,32}; empty: the host name.")
    lock_file: str = _setting(
        "", "One main per lock file; empty: quotepush-<node>.lock in $XDG_RUNTIME_DIR or the temporary directory."
    )
    workers: int = _setting(0, "Worker processes; 0 or auto: one per core this process may use.", at_least=0)
    pin_workers: bool = _setting(False, "Bind worker i to the i-th core this process may use (Linux).")
    drain_timeout_s: float = _setting(10.0, "How long a stop waits for connections to close.", unit="s", at_least=0)
    log_level: str = _setting("info", "debug, info, warning or error; debug adds a line per opened session.")

    # Redis.
    feed_redis: str = _setting(
        "redis://127.0.0.1:6379/0",
        "Address of the Redis that ticks come from: redis://, rediss://, unix://, redis+sentinel:// or "
        "redis+cluster://; operations.md shows the forms.",
    )
    registry_redis: str = _setting("", "Address of the Redis that holds the registry; empty: feed_redis.")
    feed_redis_password_file: str = _setting("", "File with the password for feed_redis.")
    registry_redis_password_file: str = _setting("", "File with the password for registry_redis.")
    redis_prefix: str = _setting("qp:", "What every key and channel of the server's own begins with.")
    redis_timeout_s: float = _setting(5.0, "Longest wait for an answer of Redis.", unit="s", at_least=0.1)
    feed_channels: list[str] = _setting(
        ["quote.{code}"],
        "Channels of ticks; {code} stands for the code, * for anything; without {code} the tick names it.",
    )
    probe_interval_s: float = _setting(
        0.5, "How often the feed link is asked for a sign of life.", unit="s", at_least=0.05
    )
    probe_timeout_s: float = _setting(
        1.5, "A feed link that does not answer for so long is cut and made anew.", unit="s", at_least=0.1
    )

    # Ticks and the board.
    max_tick_bytes: int = _setting(8192, "A larger tick is refused (at most 1 MiB).", unit="bytes", at_least=64)
    max_row_bytes: int = _setting(
        16384, "A tick that would make its row larger is refused.", unit="bytes", at_least=256
    )
    max_board_codes: int = _setting(200_000, "A tick of one more code is refused.", at_least=1)
    rows_interval_s: float = _setting(
        10.0, "The newest rows of plain ticks are kept in Redis so often; 0: never.", unit="s", at_least=0
    )
    ring_age_s: float = _setting(60.0, "Rows are kept so long for clients that come back.", unit="s", at_least=0)
    ring_code_bytes: int = _setting(
        16_384, "Kept rows of one code; the oldest go first. 0: none are kept.", unit="bytes", at_least=0
    )
    ring_bytes: int = _setting(
        67_108_864, "Kept rows of all codes; above it every code gives up the older half.", unit="bytes", at_least=0
    )
    replay_bytes: int = _setting(
        1_048_576,
        "Missed rows that wait for one client; codes with more get their newest row.",
        unit="bytes",
        at_least=0,
    )
    last_max_age_s: int = _setting(864_000, "A row without a tick for so long leaves the board.", unit="s", at_least=60)
    drop_older: bool = _setting(False, "Refuse a tick whose ts is older than the row's (redundant feeds).")
    trading_day_zones: dict[str, str] = _setting(
        {"SH": "Asia/Shanghai", "SZ": "Asia/Shanghai", "BJ": "Asia/Shanghai", "HK": "Asia/Hong_Kong"},
        "Time zone per market suffix; the first tick of a later day there replaces the row. A code without a listed "
        'suffix is never reset by the clock; the key "" stands for codes without a market.',
    )
    feed_stale_s: float = _setting(
        10.0, "Without any tick for so long the feed is called stale.", unit="s", at_least=0.1
    )
    code_stale_s: float = _setting(
        300.0, "Without a tick for so long a watched code is called stale; 0: never.", unit="s", at_least=0
    )

    # Limits of clients, checked before the upgrade where they can be.
    max_connections: int = _setting(
        0, "Connections of this machine; more get HTTP 503. 0: the open-file limit less a reserve.", at_least=0
    )
    max_connections_per_ip: int = _setting(
        0,
        "Connections of one address to this machine (IPv6: of its /64); more get HTTP 429. 0: any number.",
        at_least=0,
    )
    connects_per_ip_s: float = _setting(
        0.0,
        "Attempts of one address to open a connection, in each worker; more get HTTP 429. As many as in 10 s may come "
        "at once; 0: any number.",
        unit="1/s", at_least=0,
    )  # fmt: skip
    questions_per_ip_s: float = _setting(
        100.0,
        "Questions of one address over HTTP (/quotes, /codes, the look at the WebSocket's path), in each worker; more "
        "get HTTP 429. As many as in 10 s may come at once; 0: any number.",
        unit="1/s", at_least=0,
    )  # fmt: skip
    max_codes: int = _setting(1000, "Codes of one connection; more are rejected with code_limit.", at_least=1)
    codes_per_request: int = _setting(1000, "Codes in one request; more get bad_request.", at_least=1)
    requests_per_s: float = _setting(
        10.0, "Requests of one connection; more get rate_limited.", unit="1/s", at_least=0.1
    )
    message_bytes: int = _setting(
        131_072, "A larger message of a client closes it with 1009.", unit="bytes", at_least=1024
    )
    extra_fields: list[str] = _setting(
        [], "Fields of your feed that clients may name in fields, besides those of the protocol."
    )
    symbol_file: str = _setting("", "Text file with one known code a line; others are refused with unknown_code.")

    # Pushing.
    max_flush_delay_ms: float = _setting(
        5.0, "Longest wait of a row for company in one write, under load only.", unit="ms", at_least=0
    )
    merge_above_rows: int = _setting(
        1000, "A session with more rows waiting gets the newest per code only.", at_least=1
    )
    merge_above_bytes: int = _setting(262_144, "The same, in bytes waiting.", unit="bytes", at_least=1024)
    stall_timeout_s: float = _setting(
        30.0, "A socket that takes nothing at all for so long is aborted.", unit="s", at_least=1
    )
    heartbeat_ms: int = _setting(5000, "Every session gets a heartbeat so often.", unit="ms", at_least=100)
    ping_interval_s: float = _setting(15.0, "A WebSocket ping goes out so often.", unit="s", at_least=0.1)
    ping_timeout_s: float = _setting(30.0, "A peer silent for so long after a ping is dropped.", unit="s", at_least=0.1)

    # The registry.
    registry_interval_s: float = _setting(0.1, "How far the sets in Redis may lag when idle.", unit="s", at_least=0.01)
    registry_ttl_s: int = _setting(
        7200, "Registry keys expire so long after their node last renewed them.", unit="s", at_least=60
    )
    registry_check_s: float = _setting(
        5.0, "How often a part of the sets is compared with the truth.", unit="s", at_least=0.1
    )
    lease_s: float = _setting(
        10.0,
        "A node whose record was not renewed for so long is dead for the others: its name is free, and what it had in "
        "the registry is removed.",
        unit="s", at_least=1,
    )  # fmt: skip
    demand_debounce_s: float = _setting(
        5.0, "Feeds are told that nobody wants a code when nobody has wanted it for so long.", unit="s", at_least=0
    )

    # Users, groups and messages.
    delivery: str = _setting(
        "now",
        "How messages are sent when nothing is said: now, or kept for users who are away and nodes that are cut off.",
    )
    inbox_concurrency: int = _setting(10, "Kept messages that a node has in work at a time.", at_least=1)
    inbox_max: int = _setting(
        10_000, "Kept messages that wait for a node, about; the oldest ones go first.", at_least=1
    )
    kept_max: int = _setting(100, "Messages that wait for a user who is away; the oldest ones go first.", at_least=1)
    kept_ttl_s: int = _setting(86_400, "A message for a user who is away waits no longer.", unit="s", at_least=1)
    jobs_max: int = _setting(
        10_000, "Messages of all backends that wait to be sent later; more are refused with job_limit.", at_least=1
    )
    client_message_bytes: int = _setting(
        16_384, "Data of a message that a client sends; more is refused with too_large.", unit="bytes", at_least=1
    )
    client_sends_per_s: float = _setting(
        5.0, "Messages that one client may send; more get rate_limited.", unit="1/s", at_least=0.01
    )
    require_conn_key: bool = _setting(
        False, "A backend that binds a user to a connection has to know the conn_key of its hello."
    )
    secret_params: list[str] = _setting([], "Parameters of the handshake that stay out of session data, besides token.")
    events: bool = _setting(False, "Tell in Redis, on the channel of events, who comes and goes.")

    # Supervision.
    worker_silence_s: float = _setting(
        10.0, "A worker silent for so long is killed and replaced.", unit="s", at_least=1
    )

    def __repr__(self) -> str:
        shown = (f"{f.name}={_without_secret(f.name, getattr(self, f.name))!r}" for f in dataclasses.fields(self))
        return f"Settings({', '.join(shown)})"

    @property
    def registry_url(self) -> str:
        """URL of the registry Redis, password included."""
        return self.registry_redis or self.feed_redis

    @property
    def has_tokens(self) -> bool:
        """Whether this server takes tokens."""
        return bool(self.token_key or self.token_key_file or self.token_jwks_url)

    @property
    def anonymous_entitlement(self) -> Entitlement | None:
        """What clients without a token may have where tokens are taken; None: nothing.

        Raises:
            BadClaim: ``anonymous_codes`` are no patterns.
        """
        if not self.anonymous:
            return None
        return Entitlement(
            codes=Codes(self.anonymous_codes),
            max_rate=self.anonymous_max_rate or None,
            max_codes=self.anonymous_max_codes or None,
            delay_s=self.anonymous_delay_s,
        )

    @property
    def worker_count(self) -> int:
        """How many workers to run."""
        return self.workers or _cores()

    @property
    def ws_url_path(self) -> str:
        """Where the WebSocket is, e.g. ``/ws``."""
        return self.base_path + self.ws_path


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def default_node() -> str:
    """Return the host's name in the letters a node may have."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname().split(".")[0]).strip("-")[:32] or "node"


def _without_secret(name: str, value: Any) -> Any:
    if name in _URLS:
        return without_password(value)
    return "***" if name in _SECRETS and value else value


def load(
    file: str | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Read, merge and check the settings.

    Args:
        file: path of a TOML file; None: no file.
        env: the environment; None: this process's.
        flags: values by setting name; None values are ignored.

    Raises:
        SettingsError: with every fault that was found, one line each.
    """
    env = os.environ if env is None else env
    faults: list[str] = []
    values: dict[str, Any] = {}
    kinds = typing.get_type_hints(Settings)
    for source, raw in (
        (file or "", _read_file(file, faults)),
        ("environment", _read_env(env, kinds, faults)),
        ("flags", {name: value for name, value in (flags or {}).items() if value is not None}),
    ):
        for name, value in raw.items():
            if name not in kinds:
                faults.append(f"{source}: there is no setting called {name!r}{_nearest(name, kinds)}")
                continue
            if name == "workers" and value == "auto":
                value = 0
            try:
                values[name] = _coerce(value, kinds[name])
            except ValueError as e:
                # What holds a secret is not repeated, whatever its type.
                faults.append(f"{source}: {name} {'must be a text' if name in (*_URLS, *_SECRETS) else e}")
    settings = _resolve(Settings(**values), env, faults)
    faults += _faults(settings)
    if faults:
        raise SettingsError(faults)
    return settings


def _read_file(file: str | None, faults: list[str]) -> dict[str, Any]:
    if not file:
        return {}
    try:
        with open(file, "rb") as f:
            return tomllib.load(f)
    except OSError as e:
        faults.append(f"{file}: cannot be read: {e.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        faults.append(f"{file}: is not TOML: {e}")
    return {}


def _read_env(env: Mapping[str, str], kinds: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, text in env.items():
        name = key[len(ENV_PREFIX) :].lower()
        if not key.startswith(ENV_PREFIX) or name in _PASSWORDS or name in _OF_COMMANDS:
            continue
        if name not in kinds:
            faults.append(f"environment: there is no setting called {key}{_nearest(name, kinds)}")
            continue
        found[name] = text
    return found


def _nearest(name: str, kinds: Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name, kinds, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _coerce(value: Any, kind: Any) -> Any:
    """Turn what a file, the environment or a flag said into the setting's type, or raise ValueError."""
    origin = typing.get_origin(kind) or kind
    if kind == list[int]:
        return _whole_numbers(value)
    if isinstance(value, str) and origin is not str:
        return _parse(value, origin)
    if origin is float and type(value) is int:
        return float(value)
    if type(value) is not origin:
        raise ValueError(f"must be {_called(origin)}, not {value!r}")
    if origin is list and not all(isinstance(item, str) for item in value):
        raise ValueError(f"must be a list of texts, not {value!r}")
    if origin is dict and not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"must be a table of texts, not {value!r}")
    return value


def _whole_numbers(value: Any) -> list[int]:
    items = _parse(value, list) if isinstance(value, str) else value
    try:
        if type(items) is list and all(type(item) in (int, str) for item in items):
            return [int(item) for item in items]
    except ValueError:
        pass
    raise ValueError(f"must be a list of whole numbers, not {value!r}")


def _parse(text: str, origin: Any) -> Any:
    if origin is bool:
        word = text.strip().lower()
        if word in ("1", "true", "yes", "on"):
            return True
        if word in ("0", "false", "no", "off"):
            return False
        raise ValueError(f"must be true or false, not {text!r}")
    if origin is list:
        return [item.strip() for item in text.split(",") if item.strip()]
    if origin is dict:
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(f"must be like SH=Asia/Shanghai,HK=Asia/Hong_Kong, not {text!r}")
        return {key.strip(): value.strip() for key, _, value in pairs}
    try:
        return origin(text)
    except ValueError:
        raise ValueError(f"must be {_called(origin)}, not {text!r}") from None


def _called(origin: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a table"}.get(
        origin, "a text"
    )


def _resolve(settings: Settings, env: Mapping[str, str], faults: list[str]) -> Settings:
    """Fill in what depends on the machine: node, lock file, passwords."""
    node = settings.node or default_node()
    lock_file = settings.lock_file or str(
        Path(env.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"quotepush-{node}.lock"
    )
    urls: dict[str, Any] = {}
    for role in ("feed_redis", "registry_redis"):
        url = getattr(settings, role)
        password = env.get(f"{ENV_PREFIX}{role.upper()}_PASSWORD", "")
        name = f"{role}_password_file"
        if getattr(settings, name):
            password = _read_secret(name, getattr(settings, name), faults)
        if url:
            try:
                urls[role] = with_password(url, password)
            except BadAddress:
                continue  # _faults names the broken URL
        elif password:
            faults.append(f"{role}: a password is set, but no {role}")
    api_token = settings.api_token
    if settings.api_token_file:
        if api_token:
            faults.append("api_token and api_token_file are both set; keep one of them")
        others = len(faults)
        api_token = _read_secret("api_token_file", settings.api_token_file, faults)
        if not api_token and len(faults) == others:
            faults.append(f"api_token_file: there is no token in {settings.api_token_file}")
    return dataclasses.replace(settings, node=node, lock_file=lock_file, api_token=api_token, **urls)


def _read_secret(name: str, path: str, faults: list[str]) -> str:
    """Return the text of a file without the blanks around it; if it cannot be read, nothing, and that is a fault."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        faults.append(f"{name}: {path} cannot be read: {e}")
        return ""


def _faults(s: Settings) -> list[str]:
    """Name everything that is wrong with the values, one line each."""
    found = []
    for f in dataclasses.fields(s):
        lowest = f.metadata["at_least"]
        value = getattr(s, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{f.name} must be a finite number, not {value!r}")
        elif lowest is not None and not value >= lowest:
            found.append(f"{f.name} must be at least {lowest:g}, not {value!r}")
    if not _NODE.match(s.node):
        found.append(f"node must be 1 to 32 letters, digits or hyphens, not {s.node!r}")
    for name in ("port", "admin_port"):
        if getattr(s, name) > 65535:
            found.append(f"{name} must be at most 65535, not {getattr(s, name)}")
    if s.port and s.port == s.admin_port and s.host == s.admin_host:
        found.append(f"port and admin_port are both {s.port}; the private listener needs its own")
    if s.api_token and not re.match(rf"[!-~]{{{_LEAST_API_TOKEN},}}\Z", s.api_token):
        found.append(
            f"api_token must be at least {_LEAST_API_TOKEN} letters, digits or signs of ASCII without blanks; make one "
            'with: python -c "import secrets; print(secrets.token_hex(32))"'
        )
    if s.admin_host not in ("localhost",) and not _is_loopback(s.admin_host) and not s.api_token:
        found.append(
            f"admin_host must be a loopback address, not {s.admin_host!r}, unless there is an api_token or an "
            "api_token_file"
        )
    for name in ("feed_redis", "registry_redis"):
        url = getattr(s, name)
        if url and (fault := _redis_url_fault(url)):
            found.append(f"{name}: {fault}")
    found += [f"feed_channels: {fault}" for fault in _channel_faults(s.feed_channels)]
    for market, zone in s.trading_day_zones.items():
        try:
            ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            found.append(f"trading_day_zones: {market or 'no market'}: there is no time zone {zone!r}")
    if s.log_level not in ("debug", "info", "warning", "error"):
        found.append(f"log_level must be debug, info, warning or error, not {s.log_level!r}")
    if s.max_tick_bytes > 1 << 20:
        found.append(f"max_tick_bytes must be at most 1048576, not {s.max_tick_bytes}")
    for name in ("base_path", "ws_path"):
        path = getattr(s, name)
        if (path or name == "ws_path") and not re.match(r"(/[A-Za-z0-9._~-]+)+\Z", path):
            found.append(f"{name} must look like /quotes, without a slash at its end, not {path!r}")
    if s.ws_path in _OTHER_PATHS:
        found.append(f"ws_path must not be {s.ws_path}: something else is there")
    if s.delivery not in ("now", "kept"):
        found.append(f"delivery must be now or kept, not {s.delivery!r}")
    found += _token_faults(s)
    for text in s.trusted_proxies:
        try:
            ipaddress.ip_network(text)
        except ValueError as e:
            found.append(f"trusted_proxies: {e}")
    if s.proxy_header not in _PROXY_HEADERS:
        found.append(f"proxy_header must be {' or '.join(_PROXY_HEADERS)}, not {s.proxy_header!r}")
    if bool(s.tls_cert) != bool(s.tls_key):
        found.append("tls_cert and tls_key go together")
    for name in ("tls_cert", "tls_key", "symbol_file"):
        path = getattr(s, name)
        if path and not os.access(path, os.R_OK):
            found.append(f"{name}: {path} cannot be read")
    return found


def _token_faults(s: Settings) -> list[str]:
    found = []
    if s.token_key:
        try:
            secret_key(s.token_key)
        except BadKey as e:
            found.append(f"token_key {e}")
    for path in s.token_key_file:
        try:
            parse_keys(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            found.append(f"token_key_file: {path} cannot be read: {e}")
        except BadKey as e:
            found.append(f"token_key_file: {path} {e}")
    if s.token_jwks_url and (fault := _key_url_fault(s.token_jwks_url)):
        found.append(f"token_jwks_url {fault}")
    if s.token_jwks_refresh_s < _LEAST_REFRESH_S:
        found.append(f"token_jwks_refresh_s must be at least {_LEAST_REFRESH_S}, not {s.token_jwks_refresh_s!r}")
    if s.token_leeway_s > _MOST_LEEWAY_S:
        found.append(f"token_leeway_s must be at most {_MOST_LEEWAY_S}, not {s.token_leeway_s!r}")
    if any(delay <= 0 for delay in s.delays):
        found.append(f"delays must be whole numbers above 0, not {s.delays!r}")
    return found + _anonymous_faults(s)


def _anonymous_faults(s: Settings) -> list[str]:
    changed = [
        f.name
        for f in dataclasses.fields(s)
        if f.name.startswith("anonymous") and getattr(s, f.name) != _shown_default(f)
    ]
    if changed and not s.has_tokens:
        return [f"{changed[0]} is for servers with tokens; without a key everybody is anonymous and has every code"]
    if changed and not s.anonymous:
        return [f"{changed[0]} is set, but anonymous is not: nobody comes in without a token"]
    found = []
    if s.anonymous_max_rate > MOST_RATE:
        found.append(f"anonymous_max_rate must be at most {MOST_RATE:g}, not {s.anonymous_max_rate!r}")
    if s.anonymous_delay_s and s.anonymous_delay_s not in s.delays:
        found.append(f"anonymous_delay_s must be one of delays, not {s.anonymous_delay_s}")
    try:
        _ = s.anonymous_entitlement
    except BadClaim as e:
        found.append(f"anonymous_codes: {e}")
    return found


def _key_url_fault(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "is not a URL"
    if "@" in parts.netloc:
        return "must not hold a password"
    if not parts.hostname or parts.scheme not in ("http", "https"):
        return "must begin with https:// and name a host"
    if parts.scheme == "http" and parts.hostname != "localhost" and not _is_loopback(parts.hostname):
        return "must begin with https://: whoever sits between could put his own keys there"
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _redis_url_fault(url: str) -> str:
    try:
        parse_address(url)
    except BadAddress as e:
        return f"{without_password(url)!r} {e}"
    return ""


def _channel_faults(templates: list[str]) -> list[str]:
    found = [] if templates else ["must name at least one channel"]
    for template in templates:
        if template.count("{code}") > 1:
            found.append(f"{template!r} has {{code}} more than once")
        elif not template or re.search(r"[\[\]?\\\s]", template) or re.search(r"[{}]", template.replace("{code}", "")):
            found.append(f"{template!r} may have one {{code}} and *, and no other pattern")
    return found


def _shown_default(f: "dataclasses.Field[Any]") -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    assert f.default_factory is not dataclasses.MISSING
    return f.default_factory()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def example_toml() -> str:
    """Return ``quotepush.example.toml``: every setting with its default, commented out."""
    lines = ["# quotepush: every setting with its default. Uncomment what you change.", ""]
    for f in dataclasses.fields(Settings):
        unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
        lines += [f"# {f.metadata['doc']}{unit}", f"#{f.name} = {_toml(_shown_default(f))}", ""]
    return "\n".join(lines)


def markdown() -> str:
    """Return ``docs/settings.md``."""
    lines = [
        "# Settings",
        "",
        "Generated from `quotepush/settings.py`; `quotepush check` names every fault of a configuration at once.",
        "A setting comes from the TOML file (`--config`), from the environment (`QUOTEPUSH_` and its name in capitals;",
        "lists with commas) or from a flag (`--name`, hyphens for underscores). Flags win over the environment, which",
        "wins over the file. The passwords of Redis may also come from `QUOTEPUSH_FEED_REDIS_PASSWORD` and",
        "`QUOTEPUSH_REGISTRY_REDIS_PASSWORD`.",
        "",
        "| setting | default | unit | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for f in dataclasses.fields(Settings):
        lines.append(f"| `{f.name}` | `{_toml(_shown_default(f))}` | {f.metadata['unit']} | {f.metadata['doc']} |")
    return "\n".join(lines) + "\n"


def flag_type(name: str) -> Any:
    """Return the plain type of a setting: str, int, float, bool, list or dict."""
    kind = typing.get_type_hints(Settings)[name]
    assert not isinstance(kind, types.UnionType)
    return typing.get_origin(kind) or kind
