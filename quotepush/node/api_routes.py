"""The calls of the HTTP API: one table, of which the routes and their description are both made.

Bodies and answers are types: what they say is what is checked, and what ``/api/v1/openapi.json`` describes.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from quotepush.backend import Backend, Done, Job, Listing, Page, Session
from quotepush.backend_sending import JobOptions
from quotepush.cluster.commands import To
from quotepush.errors import CallRefused

__all__ = ["LARGEST_PAGE", "PATH_WORDS", "ROUTES", "Ask", "Error", "Route"]

LARGEST_PAGE = 1_000
_PAGE = 100

# What stands for a part of a path, and what it means.
PATH_WORDS = {
    "conn": "Name of a connection (fd), which its hello calls conn.",
    "user": "Name of a user, percent-encoded.",
    "group": "Name of a group, percent-encoded.",
    "code": "A code in any accepted spelling.",
    "job": "Id of a message that is to be sent later.",
}


# What comes in


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """A misspelled option is refused: who excludes somebody means it."""


class Recipients(_Body):
    """Whom a message is for; exactly one of these."""

    conns: Annotated[list[str] | None, Meta(description="Connections.")] = None
    users: Annotated[list[str] | None, Meta(description="All connections of these users.")] = None
    group: Annotated[str | None, Meta(description="All connections in this group.")] = None
    all: Annotated[bool, Meta(description="Every connection of every node.")] = False


class Message(_Body):
    """A message and how it is sent."""

    to: Recipients
    data: Annotated[Any, Meta(description="Any JSON value; with encoding, the base64 of bytes.")]
    encoding: Annotated[Literal["base64"] | None, Meta(description="base64: data is bytes.")] = None
    raw: Annotated[bool, Meta(description="Send the payload alone, as one text or binary frame.")] = False
    exclude: Annotated[list[str], Meta(description="Connections that do not get it.")] = []
    delivery: Annotated[
        Literal["now", "kept"] | None,
        Meta(
            description="now: to whoever is there. kept: it also waits for who is away. Absent: the server's setting."
        ),
    ] = None
    at: Annotated[
        int | None,
        Meta(description="Send it then, in milliseconds since 1970; what is over already is sent at once."),
    ] = None
    every: Annotated[
        float | None,
        Meta(description="Send it again after so many seconds, at least 1; without at, the first time is then."),
    ] = None
    until: Annotated[int | None, Meta(description="Do not send it after that, in milliseconds.")] = None
    count: Annotated[int | None, Meta(description="With every: how many times in all.")] = None


class Goodbye(_Body):
    """How connections are closed."""

    code: Annotated[int, Meta(description="Close code: 1000, or 3000 to 4999.")] = 4403
    reason: Annotated[str, Meta(description="What the clients are told, at most 123 bytes.")] = "kicked"


class GoodbyeToMany(Goodbye, kw_only=True):
    """Which connections are closed, and how."""

    conns: list[str]


class Binding(_Body):
    """Whose a connection becomes."""

    user: str
    conn_key: Annotated[str, Meta(description="From its hello; needed where the server has require_conn_key.")] = ""


# What goes out


class Error(msgspec.Struct):
    """Why it was not done."""

    error: Annotated[str, Meta(description="A word for programs.")]
    message: Annotated[str, Meta(description="A sentence for people.")]


class SendOutcome(msgspec.Struct):
    """What became of a message, or the job that sends it later."""

    delivered: Annotated[int, Meta(description="To how many connections it was written.")]
    nodes: Annotated[dict[str, int], Meta(description="The same for each node that answered.")]
    missing: Annotated[list[str], Meta(description="Nodes with a recipient that did not answer in time.")]
    kept: Annotated[int, Meta(description="How many messages wait for who is away.")]
    job: Annotated[Job | msgspec.UnsetType, Meta(description="Only where it is sent later.")] = msgspec.UNSET


class Jobs(msgspec.Struct):
    """A page of messages that are to be sent later."""

    items: list[Job]
    cursor: Annotated[str, Meta(description="For the next page; empty: this was the last.")]


class Cancelled(msgspec.Struct):
    """Whether a message was still to be sent."""

    job: str
    cancelled: bool


class Closed(msgspec.Struct):
    """Whether the connection was there."""

    closed: bool


class Connection(msgspec.Struct):
    """A connection as the registry knows it."""

    conn: str
    online: bool
    user: str | None
    codes: Annotated[list[str], Meta(description="What it watches.")]


class SessionData(msgspec.Struct):
    """The session data of a connection."""

    conn: str
    data: dict[str, Any]


class Entitled(msgspec.Struct):
    """What a connection may have now."""

    conn: str
    claims: dict[str, Any]


class Bound(msgspec.Struct):
    """Whose a connection is now."""

    conn: str
    user: str | None


class User(msgspec.Struct):
    """A user."""

    user: str
    online: bool
    conns: int


class Group(msgspec.Struct):
    """A group."""

    group: str
    conns: int


class Membership(msgspec.Struct):
    """Whether a connection is in a group now."""

    group: str
    conn: str
    member: bool


class Names(msgspec.Struct):
    """A page of names."""

    items: list[str]
    cursor: Annotated[str, Meta(description="For the next page; empty: this was the last.")]


class Sessions(msgspec.Struct):
    """A page of sessions."""

    items: list[Session]
    cursor: Annotated[str, Meta(description="For the next page; empty: this was the last.")]


class NodeStats(msgspec.Struct):
    """A server that is alive."""

    node: str
    conns: int
    workers: int
    version: str
    started: Annotated[int, Meta(description="Milliseconds.")]


class Overview(msgspec.Struct):
    """The cluster at a glance."""

    nodes: list[NodeStats]
    conns: int
    codes: Annotated[int, Meta(description="How many codes are watched.")]


class Published(msgspec.Struct):
    """What became of ticks."""

    seqs: Annotated[list[int], Meta(description="The seq of each, in the order of the request.")]


# The calls


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: what stood in its path and query, and its body as its route's type."""

    path: Mapping[str, str]
    cursor: str = ""
    limit: int = _PAGE
    body: Any = None
    delivery: Literal["now", "kept"] = "now"


Do = Callable[[Backend, Ask], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Route:
    """One call.

    Attributes:
        do: carries it out.
        answer: the type of its answer.
        body: the type of its body; None: it has none.
        is_body_optional: without a body its defaults count.
        refusals: the words of errors besides those that every call may have.
    """

    method: str
    path: str
    name: str
    summary: str
    do: Do
    answer: Any
    body: Any = None
    is_body_optional: bool = False
    is_paged: bool = False
    refusals: tuple[str, ...] = ()


async def _send(backend: Backend, ask: Ask) -> SendOutcome:
    message: Message = ask.body
    to, data = message.to, message.data
    if (to.conns is not None) + (to.users is not None) + (to.group is not None) + to.all != 1:
        raise CallRefused("bad_request", "to must name one of conns, users, group and all")
    if message.encoding:
        try:
            data = msgspec.convert(data, bytes)  # from base64
        except msgspec.ValidationError:
            raise CallRefused("bad_request", "data must be base64") from None
    options: JobOptions = {
        "exclude": message.exclude, "raw": message.raw, "delivery": message.delivery or ask.delivery,
        "at": message.at, "every": message.every, "until": message.until, "count": message.count,
    }  # fmt: skip
    sent = await backend.send(To(conns=to.conns, users=to.users, group=to.group, all=to.all), data, options)
    if isinstance(sent, Job):
        return SendOutcome(0, {}, [], 0, sent)
    return SendOutcome(sent.delivered, sent.nodes, list(sent.missing), sent.kept)


async def _cancel_job(backend: Backend, ask: Ask) -> Cancelled:
    return Cancelled(ask.path["job"], await backend.cancel_job(ask.path["job"]))


async def _publish(backend: Backend, ask: Ask) -> Published:
    ticks = ask.body if isinstance(ask.body, list) else [ask.body]
    return Published(await backend.publish(ticks))


async def _stats(backend: Backend, ask: Ask) -> Overview:
    stats = await backend.stats()
    nodes = [
        NodeStats(node.name, stats.conns.get(node.name, 0), node.workers, node.version, node.started)
        for node in stats.nodes.values()
    ]
    return Overview(nodes, sum(stats.conns.values()), stats.codes)


async def _conn(backend: Backend, ask: Ask) -> Connection:
    conn = ask.path["conn"]
    if not await backend.is_online(conn):
        return Connection(conn, False, None, [])
    return Connection(conn, True, await backend.conn_user(conn), await backend.conn_codes(conn))


async def _close(backend: Backend, ask: Ask) -> Closed:
    return Closed(await backend.close_conn(ask.path["conn"], code=ask.body.code, reason=ask.body.reason))


async def _close_many(backend: Backend, ask: Ask) -> Done:
    return await backend.close_conns(ask.body.conns, code=ask.body.code, reason=ask.body.reason)


async def _get_session(backend: Backend, ask: Ask) -> SessionData:
    return SessionData(ask.path["conn"], await backend.get_session(ask.path["conn"]))


async def _set_session(backend: Backend, ask: Ask) -> SessionData:
    return SessionData(ask.path["conn"], await backend.set_session(ask.path["conn"], ask.body))


async def _update_session(backend: Backend, ask: Ask) -> SessionData:
    return SessionData(ask.path["conn"], await backend.update_session(ask.path["conn"], ask.body))


async def _bind(backend: Backend, ask: Ask) -> Bound:
    await backend.bind_user(ask.path["conn"], ask.body.user, conn_key=ask.body.conn_key)
    return Bound(ask.path["conn"], ask.body.user)


async def _unbind(backend: Backend, ask: Ask) -> Bound:
    await backend.unbind_user(ask.path["conn"])
    return Bound(ask.path["conn"], None)


async def _entitle_conn(backend: Backend, ask: Ask) -> Entitled:
    await backend.entitle_conn(ask.path["conn"], ask.body)
    return Entitled(ask.path["conn"], ask.body)


async def _entitle_user(backend: Backend, ask: Ask) -> Done:
    return await backend.entitle_user(ask.path["user"], ask.body)


async def _user(backend: Backend, ask: Ask) -> User:
    count = await backend.user_count(ask.path["user"])
    return User(ask.path["user"], count > 0, count)


async def _kick(backend: Backend, ask: Ask) -> Done:
    return await backend.kick_user(ask.path["user"], code=ask.body.code, reason=ask.body.reason)


async def _group(backend: Backend, ask: Ask) -> Group:
    return Group(ask.path["group"], await backend.group_count(ask.path["group"]))


async def _dissolve(backend: Backend, ask: Ask) -> Done:
    return await backend.dissolve_group(ask.path["group"])


async def _join(backend: Backend, ask: Ask) -> Membership:
    await backend.join_group(ask.path["conn"], ask.path["group"])
    return Membership(ask.path["group"], ask.path["conn"], True)


async def _leave(backend: Backend, ask: Ask) -> Membership:
    await backend.leave_group(ask.path["conn"], ask.path["group"])
    return Membership(ask.path["group"], ask.path["conn"], False)


def _page_of(listing: Callable[[Backend, Ask], Listing[Any]], kind: Callable[[list[Any], str], Any]) -> Do:
    async def do(backend: Backend, ask: Ask) -> Any:
        page: Page[Any] = await listing(backend, ask).page(ask.cursor, ask.limit)
        return kind(list(page.items), page.cursor)

    return do


_user_conns = _page_of(lambda backend, ask: backend.user_conns(ask.path["user"]), Names)
_group_conns = _page_of(lambda backend, ask: backend.group_conns(ask.path["group"]), Names)
_group_sessions = _page_of(lambda backend, ask: backend.group_sessions(ask.path["group"]), Sessions)
_code_conns = _page_of(lambda backend, ask: backend.code_conns(ask.path["code"]), Names)
_sessions = _page_of(lambda backend, ask: backend.sessions(), Sessions)
_users = _page_of(lambda backend, ask: backend.users(), Names)
_groups = _page_of(lambda backend, ask: backend.groups(), Names)
_jobs = _page_of(lambda backend, ask: backend.jobs(), Jobs)
_codes = _page_of(lambda backend, ask: backend.codes(), Names)

_Object = dict[str, Any]
_Ticks = dict[str, Any] | list[dict[str, Any]]
_GONE = ("not_online",)

ROUTES = (
    Route("POST", "/send", "send", "Send a message to connections, users, a group or everybody, now or later.",
          _send, SendOutcome, Message, refusals=("job_limit",)),
    Route("GET", "/jobs", "jobs", "The messages that are to be sent later, in no order.", _jobs, Jobs, is_paged=True),
    Route("DELETE", "/jobs/{job}", "cancel_job", "Forget a message that is to be sent later.", _cancel_job, Cancelled),
    Route("POST", "/publish", "publish", "Publish a tick, or an array of at most 1,000, in order and as a whole.",
          _publish, Published, _Ticks, refusals=("bad_tick",)),
    Route("GET", "/stats", "stats", "The nodes that are alive, and how many connections they have.", _stats, Overview),
    Route("GET", "/sessions", "sessions", "All sessions, page by page.", _sessions, Sessions, is_paged=True),
    Route("POST", "/conns/close", "close_conns", "Close connections.", _close_many, Done, GoodbyeToMany),
    Route("GET", "/conns/{conn}", "conn", "Whether a connection is there, whose it is, and what it watches.",
          _conn, Connection),
    Route("POST", "/conns/{conn}/close", "close_conn", "Close a connection.", _close, Closed, Goodbye,
          is_body_optional=True),
    Route("GET", "/conns/{conn}/session", "get_session", "The session data of a connection.", _get_session,
          SessionData, refusals=_GONE),
    Route("PUT", "/conns/{conn}/session", "set_session", "Replace the session data of a connection.", _set_session,
          SessionData, _Object, refusals=_GONE),
    Route("PATCH", "/conns/{conn}/session", "update_session", "Merge into the session data; null removes.",
          _update_session, SessionData, _Object, refusals=_GONE),
    Route("PUT", "/conns/{conn}/user", "bind_user", "Make a connection a user's.", _bind, Bound, Binding,
          refusals=(*_GONE, "key_needed", "wrong_key")),
    Route("DELETE", "/conns/{conn}/user", "unbind_user", "Take a connection from its user.", _unbind, Bound,
          refusals=_GONE),
    Route("PUT", "/conns/{conn}/entitlement", "entitle_conn", "Let a connection have what these claims of a token say.",
          _entitle_conn, Entitled, _Object, refusals=_GONE),
    Route("PUT", "/users/{user}/entitlement", "entitle_user", "Do the same with the connections that a user has now.",
          _entitle_user, Done, _Object),
    Route("GET", "/users", "users", "The users who are online.", _users, Names, is_paged=True),
    Route("GET", "/users/{user}", "user", "Whether a user is online.", _user, User),
    Route("GET", "/users/{user}/conns", "user_conns", "The connections of a user.", _user_conns, Names,
          is_paged=True),
    Route("POST", "/users/{user}/kick", "kick_user", "Close every connection of a user.", _kick, Done, Goodbye,
          is_body_optional=True),
    Route("GET", "/groups", "groups", "The groups that have a connection.", _groups, Names, is_paged=True),
    Route("GET", "/groups/{group}", "group", "How many connections are in a group.", _group, Group),
    Route("DELETE", "/groups/{group}", "dissolve_group", "Take every connection out of a group.", _dissolve, Done),
    Route("GET", "/groups/{group}/conns", "group_conns", "The connections in a group.", _group_conns, Names,
          is_paged=True),
    Route("GET", "/groups/{group}/sessions", "group_sessions", "The sessions in a group.", _group_sessions, Sessions,
          is_paged=True),
    Route("PUT", "/groups/{group}/conns/{conn}", "join_group", "Put a connection into a group.", _join, Membership,
          refusals=_GONE),
    Route("DELETE", "/groups/{group}/conns/{conn}", "leave_group", "Take a connection out of a group.", _leave,
          Membership, refusals=_GONE),
    Route("GET", "/codes", "codes", "The codes that somebody watches.", _codes, Names, is_paged=True),
    Route("GET", "/codes/{code}/conns", "code_conns", "The connections that watch a code.", _code_conns, Names,
          is_paged=True, refusals=("bad_code",)),
)  # fmt: skip
