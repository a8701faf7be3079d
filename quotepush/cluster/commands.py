"""What programs tell the cluster to do with its connections, and what it answers: JSON on Redis channels.

Whoever commands (``cluster/routing.py``) and whoever carries out (``cluster/inbox.py``) read and write it here and
nowhere else, under names that :class:`ClusterKeys` makes. Law: a command is taken whole or refused as a whole, and what
was refused never reaches a connection; keys that nobody knows are ignored.

Pure: no loop, no Redis.
"""

import base64
import binascii
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import orjson

__all__ = [
    "CLAIM_MS", "MAX_COMMAND_BYTES", "OPS", "BadCommand", "ClusterKeys", "Command", "Kept", "NodeRecord",
    "Reply", "Sender", "Taken", "To", "decode_kept", "decode_node", "decode_reply", "decode_taken", "encode", "is_fd",
    "is_job", "is_name", "new_id", "node_of", "parse_command", "payload_of", "worker_of",
]  # fmt: skip

# A claim on what a dead node has left holds for so long, unless it is made again.
CLAIM_MS = 10_000

# A larger command is refused unread.
MAX_COMMAND_BYTES = 1 << 20

_FD = re.compile(r"([A-Za-z0-9-]{1,32})\.([0-9]{1,6})\.([0-9]{1,20})", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9-]{1,32}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NAME_CHARACTERS = 128

# Close codes that a program may use: those for applications (RFC 6455 §7.4.2), and a plain goodbye.
_CLOSE_CODES = (1000, *range(3000, 5000))


class BadCommand(ValueError):
    """This is no command.

    Attributes:
        error: ``bad_request``, or ``too_large``.
        id: what its caller called it, where that could be read; else empty.
        reply: the channel on which he waits, likewise.
    """

    def __init__(self, why: str, *, error: str = "bad_request", id: str = "", reply: str = "") -> None:
        super().__init__(why)
        self.error = error
        self.id = id
        self.reply = reply


class To(msgspec.Struct, omit_defaults=True, frozen=True):
    """To whom a message goes; exactly one is named."""

    conns: list[str] | None = None
    users: list[str] | None = None
    group: str | None = None
    all: bool = False


class Sender(msgspec.Struct, frozen=True):
    """The client who speaks; ``user`` is None for one without a user."""

    conn: str
    user: str | None = None


class Command(msgspec.Struct, omit_defaults=True, kw_only=True, frozen=True):
    """One command; which fields count depends on ``op`` (:data:`OPS`).

    Attributes:
        id: what the caller calls it (:func:`new_id`); the reply repeats it.
        reply: the channel on which the caller waits; empty: nobody waits.
        to: of ``send``.
        data: any JSON value: of ``send``, or session data.
        encoding: ``base64``: ``data`` is the base64 of bytes.
        raw: send the payload alone, as one frame.
        exclude: fds that do not get it.
        sender: whom the recipients see as the sender, and who does not get it himself.
        keep: a message that is kept for who is not here (in an inbox, or as a job), or that may come again: no
            connection takes two of one ``id``.
        sent: of a kept message: epoch milliseconds of the send; 0: now.
        until: of a kept message: epoch milliseconds after which nobody wants it; 0: as the server's settings say.
        conns, conn, users, user, group: whom it is about.
        conn_key: the key from the ``hello`` of ``conn``.
        code, reason: of ``close`` and ``kick``.
        claims: of ``entitle``.
    """

    op: str
    id: str = ""
    reply: str = ""
    to: To | None = None
    data: Any = None
    encoding: str = ""
    raw: bool = False
    exclude: list[str] = []
    sender: Sender | None = None
    keep: bool = False
    sent: int = 0
    until: int = 0
    conns: list[str] | None = None
    conn: str = ""
    users: list[str] | None = None
    user: str = ""
    group: str = ""
    conn_key: str = ""
    code: int = 4403
    reason: str = "kicked"
    claims: dict[str, Any] | None = None

    def fds(self) -> list[str] | None:
        """Return the connections that it names; None: it is about whoever is found here."""
        if self.to is not None:
            return self.to.conns
        return [self.conn] if self.conn else self.conns


class Reply(msgspec.Struct, omit_defaults=True):
    """What one node has done.

    Attributes:
        delivered: connections that took a message, or that were closed, bound, joined …
        fds: those of the named connections that were there.
        session: of ``get_session``, ``set_session`` and ``update_session``: the session data.
        users: of a kept message: those of its users who had a connection that took it.
        error: why nothing was done: ``bad_request``, ``too_large``, ``not_online``, ``wrong_key`` …
    """

    id: str
    node: str
    delivered: int = 0
    fds: list[str] = []
    session: dict[str, Any] | None = None
    users: list[str] = []
    error: str = ""
    message: str = ""


class Kept(msgspec.Struct, omit_defaults=True):
    """A message that waits for a user who is away, as it lies in his list.

    Attributes:
        at, until: epoch milliseconds of the send, and after which nobody wants it.
        id: of its command; a connection is sent no kept message twice.
        data, encoding, raw, sender: as in :class:`Command`.
    """

    at: int
    until: int
    data: Any = None
    encoding: str = ""
    raw: bool = False
    sender: Sender | None = None
    id: str = ""


class Taken(msgspec.Struct, frozen=True):
    """A message that a node has taken out of its user's list to deliver it, as it lies in the node's."""

    user: str
    message: msgspec.Raw  # a Kept


class NodeRecord(msgspec.Struct, frozen=True):
    """How a node stands in ``<p>nodes``: times are epoch milliseconds by the clock of Redis (``TIME``).

    Attributes:
        lease: milliseconds for which a renewal holds.
        owner: the life of a main that has the name, a random text.
        place, pid, born: where it runs, so that somebody there can tell whether it still does (``node/whereabouts``).
        cleaner: the owner of another node, which removes what this dead one has left.
        until: it has to say so again until then.
        is_cleaned: nothing is left.
    """

    renewed: int
    started: int
    version: str = ""
    workers: int = 0
    lease: int = 10_000
    owner: str = ""
    place: str = ""
    pid: int = 0
    born: str = ""
    cleaner: str = ""
    until: int = 0
    is_cleaned: bool = False

    def is_alive(self, now_ms: int) -> bool:
        """Whether its lease holds, by the clock of Redis."""
        return now_ms - self.renewed < self.lease and not self.cleaner and not self.is_cleaned

    def is_claimed(self, now_ms: int) -> bool:
        """Whether another node clears up after it. One that holds for longer than any is of a clock that went back."""
        return bool(self.cleaner) and 0 < self.until - now_ms <= CLAIM_MS


class ClusterKeys:
    """The names of keys and channels besides the registry's sets of codes."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes = f"{prefix}nodes"
        self.members = f"{prefix}members"
        self.to_all = f"{prefix}to"
        self.events = f"{prefix}events"
        # One slot of a Redis Cluster for all that is about jobs.
        self.jobs = f"{prefix}{{jobs}}"
        self.demand = f"{prefix}demand"

    def user(self, user: str) -> str:
        """Return the set of the fds of a user."""
        return f"{self.prefix}user:{user}"

    def group(self, group: str) -> str:
        """Return the set of the fds in a group."""
        return f"{self.prefix}group:{group}"

    def member(self, fd: str) -> str:
        """Return the set of what an fd is a member of, as ``u:<uid>`` and ``g:<group>``."""
        return f"{self.prefix}member:{fd}"

    def conn(self, fd: str) -> str:
        """Return the text with the user, groups and session data of an fd."""
        return f"{self.prefix}conn:{fd}"

    def inbox(self, node: str) -> str:
        """Return the stream of kept commands for a node; field ``c``."""
        return f"{self.prefix}inbox:{node}"

    def kept(self, user: str) -> str:
        """Return the list of messages for a user who is away."""
        return f"{self.prefix}kept:{user}"

    def taken(self, node: str) -> str:
        """Return the list of messages that a node has taken out of their users' lists and not yet delivered."""
        return f"{self.prefix}taken:{node}"

    def job(self, job: str) -> str:
        """Return the hash of a message that is to be sent later."""
        return f"{self.jobs}:{job}"

    def to_node(self, node: str) -> str:
        """Return the channel of commands for one node."""
        return f"{self.prefix}to:{node}"

    def reply(self) -> str:
        """Return a channel of one's own to wait for replies."""
        return f"{self.prefix}reply:{secrets.token_hex(8)}"


def new_id() -> str:
    """Return a name for a command that nobody else gives."""
    return secrets.token_hex(8)


def is_name(name: str) -> bool:
    """Say whether this can be the name of a user or a group: 1 to 128 characters, none of them a control character."""
    return 0 < len(name) <= _NAME_CHARACTERS and _CONTROL.search(name) is None


def is_fd(text: str) -> bool:
    """Say whether this can be the name of a connection."""
    return _FD.fullmatch(text) is not None


def is_job(text: str) -> bool:
    """Say whether this can be the id of a message that is sent later."""
    return _ID.fullmatch(text) is not None


def node_of(fd: str) -> str:
    """Return the node that an fd names; empty: it is none."""
    match = _FD.fullmatch(fd)
    return match[1] if match else ""


def worker_of(fd: str) -> int:
    """Return the worker that an fd names; -1: it is none."""
    match = _FD.fullmatch(fd)
    return int(match[2]) if match else -1


def payload_of(message: Command | Kept) -> Any:
    """Return the JSON value or, with ``encoding``, the bytes of a message.

    Raises:
        ValueError: it is no base64.
    """
    if not message.encoding:
        return message.data
    try:
        return base64.b64decode(message.data, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("data must be base64") from None


# ---------------------------------------------------------------------- bytes

_encoder = msgspec.json.Encoder()
_commands = msgspec.json.Decoder(Command)
_replies = msgspec.json.Decoder(Reply)
_kept = msgspec.json.Decoder(Kept)
_taken = msgspec.json.Decoder(Taken)
_nodes = msgspec.json.Decoder(NodeRecord)


def encode(said: Command | Reply | Kept | Taken | NodeRecord) -> bytes:
    """Return the JSON text."""
    return _encoder.encode(said)


def decode_reply(text: bytes) -> Reply | None:
    """Return a reply; None: it is none."""
    try:
        return _replies.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return None


def decode_kept(text: bytes) -> Kept | None:
    """Return a kept message; None: it is none."""
    try:
        return _kept.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return None


def decode_taken(text: bytes) -> Taken | None:
    """Return a message that a node has taken; None: it is none."""
    try:
        return _taken.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return None


def decode_node(text: bytes) -> NodeRecord | None:
    """Return how a node stands; None: somebody has written something else."""
    try:
        return _nodes.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return None


def parse_command(text: bytes) -> Command:
    """Return a checked command.

    Raises:
        BadCommand: it is none; nothing of it may be carried out.
    """
    if len(text) > MAX_COMMAND_BYTES:
        raise BadCommand(f"a command has at most {MAX_COMMAND_BYTES} bytes", error="too_large")
    try:
        command = _commands.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        raise BadCommand(f"not a command: {e}") from None
    check = OPS.get(command.op)
    why = f"{command.op[:40]!r} is none of {', '.join(OPS)}" if check is None else check(command) or _general(command)
    if why:
        raise BadCommand(why, id=command.id[:64], reply=command.reply[:256])
    return command


def _general(command: Command) -> str:
    if len(command.id) > 64 or len(command.reply) > 256:
        return "id has at most 64 characters and reply 256"
    return ""


def _data_fault(data: Any) -> str:
    try:
        orjson.dumps(data)
    except TypeError as e:  # deeper than 254, or a whole number of more than 64 bits
        return f"data cannot be told to clients: {e}"
    return ""


def _fds_fault(fds: Iterable[str]) -> str:
    return next((f"{fd[:60]!r} is no connection" for fd in fds if not is_fd(fd)), "")


def _name_fault(what: str, names: Iterable[str]) -> str:
    if all(map(is_name, names)):
        return ""
    return f"the name of a {what} has 1 to {_NAME_CHARACTERS} characters and no control characters"


def _check_send(command: Command) -> str:
    to = command.to
    if to is None or (to.conns is not None) + (to.users is not None) + (to.group is not None) + to.all != 1:
        return "to must name one of conns, users, group and all"
    if command.encoding not in ("", "base64"):
        return "encoding must be base64, or absent"
    try:
        payload_of(command)
    except ValueError as e:
        return str(e)
    return (
        _data_fault(command.data)
        or _fds_fault(to.conns or ())
        or _name_fault("user", to.users or ())
        or _name_fault("group", () if to.group is None else (to.group,))
    )


def _check_conns(command: Command) -> str:
    return "conns must be a list of connections" if command.conns is None else _fds_fault(command.conns)


def _check_conn(command: Command) -> str:
    return _fds_fault([command.conn])


def _check_end(command: Command) -> str:
    if command.code not in _CLOSE_CODES:
        return "code must be 1000 or in 3000 to 4999"
    return "" if len(command.reason.encode()) <= 123 else "reason has at most 123 bytes"


def _check_users(command: Command) -> str:
    return "users must be a list of users" if command.users is None else _name_fault("user", command.users)


def _check_session(command: Command) -> str:
    if type(command.data) is not dict:
        return "data must be an object"
    return _data_fault(command.data) or _check_conn(command)


def _check_entitle(command: Command) -> str:
    if command.claims is None or (command.conns is None) == (command.users is None):
        return "entitle has claims, and one of conns and users"
    return _check_users(command) if command.conns is None else _check_conns(command)


OPS: Mapping[str, Callable[[Command], str]] = {
    "send": _check_send,
    "close": lambda c: _check_end(c) or _check_conns(c),
    "kick": lambda c: _check_end(c) or _check_users(c),
    "bind": lambda c: _check_conn(c) or _name_fault("user", [c.user]),
    "unbind": _check_conn,
    "join": lambda c: _check_conns(c) or _name_fault("group", [c.group]),
    "leave": lambda c: _check_conns(c) or _name_fault("group", [c.group]),
    "dissolve": lambda c: _name_fault("group", [c.group]),
    "get_session": _check_conn,
    "set_session": _check_session,
    "update_session": _check_session,
    "entitle": _check_entitle,
    "collect": lambda c: _name_fault("user", [c.user]),  # kept messages wait for this user
    "poke": lambda c: "",  # something is in the inbox
}
