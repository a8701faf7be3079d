"""The commands for backends and operators: send, kick, who is there, groups, sessions, events.

They go through Redis as :class:`~quotepush.backend.Backend` does; the settings say where it is.
"""

import base64
import binascii
import sys
import time
from typing import TYPE_CHECKING, Any

import click
import orjson

from quotepush.commanding_jobs import job_options, jobs, say_job
from quotepush.errors import SettingsError
from quotepush.reaching import NOBODY, reaching, run, say, say_json, warn

if TYPE_CHECKING:
    from quotepush.backend import Backend

__all__ = ["COMMANDS"]

_SILENT = 1


def _conns(count: int) -> str:
    return f"{count} connection{'' if count == 1 else 's'}"


def _outcome(what: str, count: int, nodes: dict[str, int], missing: tuple[str, ...], kept: int = 0) -> int:
    """Say what became of a call; return its exit code."""
    where = ", ".join(f"{node}: {number}" for node, number in nodes.items())
    say(f"{what} {_conns(count)}{f' ({where})' if where else ''}{f'; {kept} kept for later' if kept else ''}")
    if missing:
        warn(f"no answer in time from {', '.join(missing)}; it may have happened there all the same")
        return _SILENT
    return 0 if count or kept else NOBODY


def _exit_of(count: int, missing: tuple[str, ...], kept: int = 0) -> int:
    return _SILENT if missing else 0 if count or kept else NOBODY


def _payload(text: str, is_text: bool, is_base64: bool) -> Any:
    """What the word on the command line stands for; ``-`` for what comes on standard input."""
    if text == "-":
        text = sys.stdin.read()
    if is_base64:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise SettingsError(["--base64: DATA is no base64"]) from None
    if is_text:
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


@click.command()
@click.argument("data")
@click.option("--user", "users", multiple=True, metavar="USER", help="To all connections of a user; also repeated.")
@click.option("--conn", "conns", multiple=True, metavar="CONN", help="To a connection; also repeated.")
@click.option("--group", metavar="GROUP", help="To a group.")
@click.option("--all", "is_all", is_flag=True, help="To every connection of every node.")
@click.option("--exclude", multiple=True, metavar="CONN", help="But not to this connection; also repeated.")
@click.option("--kept", is_flag=True, help="It waits for users who are away, and for nodes that are cut off.")
@click.option("--raw", "is_raw", is_flag=True, help="Send DATA alone, as one frame.")
@click.option("--text", "is_text", is_flag=True, help="DATA is a text, even if it looks like JSON.")
@click.option("--base64", "is_base64", is_flag=True, help="DATA is the base64 of bytes.")
@click.option("--at", metavar="TIME", help="Send it then: 2026-07-25T09:30+08:00, or from now: +90s, +30m, +1d.")
@click.option("--every", metavar="TIME", help="Send it again after so long: 90s, 30m, 1h, 1d.")
@click.option("--until", metavar="TIME", help="Do not send it after that.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="With --every: how many times in all.")
@reaching
def send(
    data: str, users: tuple[str, ...], conns: tuple[str, ...], group: str | None, is_all: bool,
    exclude: tuple[str, ...], kept: bool, is_raw: bool, is_text: bool, is_base64: bool, at: str | None,
    every: str | None, until: str | None, count: int | None, is_json: bool, **where: Any,
) -> None:  # fmt: skip
    """Send DATA, a JSON value or else a text ("-": standard input), to users, connections, a group or everybody.

    With --at or --every it is sent later, by whichever server runs then; "quotepush jobs" lists and cancels.

    Exit codes: 0 somebody took it, or it is kept, or for later; 1 Redis, or a node, does not answer in time; 2
    something is wrong with the call; 3 nobody was there to take it.
    """
    if bool(users) + bool(conns) + (group is not None) + is_all != 1:
        raise SettingsError(["send: give one of --user, --conn, --group and --all"])
    payload = _payload(data, is_text or is_raw, is_base64)
    times = job_options(at, every, until, count)

    async def do(backend: "Backend") -> int:
        from quotepush.backend import Job
        from quotepush.cluster.commands import To

        to = To(conns=list(conns) or None, users=list(users) or None, group=group, all=is_all)
        options: Any = {"exclude": exclude, "raw": is_raw, "delivery": "kept" if kept else "now", **times}
        sent = await backend.send(to, payload, options)
        if isinstance(sent, Job):
            say_job(sent, is_json=is_json)
            return 0
        if is_json:
            say_json(sent)
            return _exit_of(sent.delivered, sent.missing, sent.kept)
        return _outcome("delivered to", sent.delivered, sent.nodes, sent.missing, sent.kept)

    run(do, **where)


@click.command()
@click.option("--user", metavar="USER", help="All connections of a user.")
@click.option("--conn", "conns", multiple=True, metavar="CONN", help="A connection; also repeated.")
@click.option("--code", default=4403, show_default=True, help="Close code: 1000, or 3000 to 4999.")
@click.option("--reason", default="kicked", show_default=True, help="What the client is told.")
@reaching
def kick(user: str | None, conns: tuple[str, ...], code: int, reason: str, is_json: bool, **where: Any) -> None:
    """Close connections. Our clients do not come back after the code 4403.

    Exit codes: 0 some were closed; 1 Redis, or a node, does not answer in time; 2 something is wrong with the call; 3
    there was none.
    """
    if (user is None) == (not conns):
        raise SettingsError(["kick: give either --user or --conn"])

    async def do(backend: "Backend") -> int:
        if user is not None:
            done = await backend.kick_user(user, code=code, reason=reason)
        else:
            done = await backend.close_conns(conns, code=code, reason=reason)
        if is_json:
            say_json(done)
            return _exit_of(done.count, done.missing)
        return _outcome("closed", done.count, done.nodes, done.missing)

    run(do, **where)


@click.command()
@click.option("--user", metavar="USER", help="Those of a user.")
@click.option("--group", metavar="GROUP", help="Those in a group, with their sessions.")
@click.option("--code", metavar="CODE", help="Those that watch a code.")
@click.option("--count", "is_count", is_flag=True, help="Only how many there are.")
@reaching
def conns(user: str | None, group: str | None, code: str | None, is_count: bool, is_json: bool, **where: Any) -> None:
    """List connections: all of them, or those of a user, in a group or on a code.

    Exit codes: 0 done; 1 Redis does not answer in time; 2 something is wrong with the call.
    """
    if (user is not None) + (group is not None) + (code is not None) > 1:
        raise SettingsError(["conns: give at most one of --user, --group and --code"])

    async def do(backend: "Backend") -> int:
        if is_count:
            count = await _count(backend, user, group, code)
            say_json({"count": count}) if is_json else say(str(count))
            return 0
        if user is not None or code is not None:
            names = backend.user_conns(user) if user is not None else backend.code_conns(code or "")
            async for conn in names:
                say_json({"conn": conn}) if is_json else say(conn)
            return 0
        async for session in backend.group_sessions(group) if group is not None else backend.sessions():
            if is_json:
                say_json(session)
            else:
                groups = ",".join(session["groups"])
                say(f"{session['conn']}  user {session['user'] or '-'}  groups {groups or '-'}")
        return 0

    run(do, **where)


async def _count(backend: "Backend", user: str | None, group: str | None, code: str | None) -> int:
    if user is not None:
        return await backend.user_count(user)
    if group is not None:
        return await backend.group_count(group)
    if code is not None:
        return await backend.code_count(code)
    return await backend.conn_count()


@click.command()
@reaching
def users(is_json: bool, **where: Any) -> None:
    """List the users who are online, and how many connections each has.

    Exit codes: 0 done; 1 Redis does not answer in time.
    """

    async def do(backend: "Backend") -> int:
        async for user in backend.users():
            count = await backend.user_count(user)
            say_json({"user": user, "conns": count}) if is_json else say(f"{user}  {_conns(count)}")
        return 0

    run(do, **where)


@click.group(invoke_without_command=True)
@reaching
@click.pass_context
def groups(context: click.Context, /, is_json: bool, **where: Any) -> None:
    """List the groups and how many connections are in each; or join, leave, dissolve one.

    Exit codes: 0 done; 1 Redis, or a node, does not answer in time; 2 something is wrong with the call; 3 the
    connection is not there, or nobody was in the group.
    """
    if context.invoked_subcommand is not None:
        return

    async def do(backend: "Backend") -> int:
        async for group in backend.groups():
            count = await backend.group_count(group)
            say_json({"group": group, "conns": count}) if is_json else say(f"{group}  {_conns(count)}")
        return 0

    run(do, **where)


@groups.command()
@click.argument("conn")
@click.argument("group")
@reaching
def join(conn: str, group: str, is_json: bool, **where: Any) -> None:
    """Put a connection into a group."""

    async def do(backend: "Backend") -> int:
        await backend.join_group(conn, group)
        say_json({"conn": conn, "group": group, "member": True}) if is_json else say(f"{conn} is in {group}")
        return 0

    run(do, **where)


@groups.command()
@click.argument("conn")
@click.argument("group")
@reaching
def leave(conn: str, group: str, is_json: bool, **where: Any) -> None:
    """Take a connection out of a group."""

    async def do(backend: "Backend") -> int:
        await backend.leave_group(conn, group)
        say_json({"conn": conn, "group": group, "member": False}) if is_json else say(f"{conn} is not in {group}")
        return 0

    run(do, **where)


@groups.command()
@click.argument("group")
@reaching
def dissolve(group: str, is_json: bool, **where: Any) -> None:
    """Take every connection out of a group."""

    async def do(backend: "Backend") -> int:
        done = await backend.dissolve_group(group)
        if is_json:
            say_json(done)
            return _exit_of(done.count, done.missing)
        return _outcome(f"{group} has lost", done.count, done.nodes, done.missing)

    run(do, **where)


@click.group()
def session() -> None:
    """Look at a connection's session data and user, and change them.

    Exit codes: 0 done; 1 Redis, or the node, does not answer in time; 2 something is wrong with the call; 3 the
    connection is not there.
    """


@session.command("get")
@click.argument("conn")
@reaching
def get_session(conn: str, is_json: bool, **where: Any) -> None:
    """Print the session data of a connection, as JSON."""

    async def do(backend: "Backend") -> int:
        say_json(await backend.get_session(conn))
        return 0

    run(do, **where)


@session.command("set")
@click.argument("conn")
@click.argument("data")
@reaching
def set_session(conn: str, data: str, is_json: bool, **where: Any) -> None:
    """Replace the session data of a connection by a JSON object; print what it is now."""
    said = _object(data)

    async def do(backend: "Backend") -> int:
        say_json(await backend.set_session(conn, said))
        return 0

    run(do, **where)


@session.command("update")
@click.argument("conn")
@click.argument("data")
@reaching
def update_session(conn: str, data: str, is_json: bool, **where: Any) -> None:
    """Merge a JSON object into the session data of a connection, null removes; print what it is now."""
    said = _object(data)

    async def do(backend: "Backend") -> int:
        say_json(await backend.update_session(conn, said))
        return 0

    run(do, **where)


@session.command("bind")
@click.argument("conn")
@click.argument("user")
@click.option("--conn-key", default="", metavar="KEY", help="From the hello of the connection, where it is needed.")
@reaching
def bind(conn: str, user: str, conn_key: str, is_json: bool, **where: Any) -> None:
    """Make a connection a user's."""

    async def do(backend: "Backend") -> int:
        await backend.bind_user(conn, user, conn_key=conn_key)
        say_json({"conn": conn, "user": user}) if is_json else say(f"{conn} is {user}'s")
        return 0

    run(do, **where)


@session.command("unbind")
@click.argument("conn")
@reaching
def unbind(conn: str, is_json: bool, **where: Any) -> None:
    """Take a connection from its user."""

    async def do(backend: "Backend") -> int:
        await backend.unbind_user(conn)
        say_json({"conn": conn, "user": None}) if is_json else say(f"{conn} has no user")
        return 0

    run(do, **where)


def _object(text: str) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        raise SettingsError([f"DATA is no JSON: {e}"]) from None
    if not isinstance(found, dict):
        raise SettingsError(["DATA must be a JSON object"])
    return found


@click.command()
@reaching
def stats(is_json: bool, **where: Any) -> None:
    """Show the nodes that are alive, their connections, and how many codes are watched.

    Exit codes: 0 done; 1 Redis does not answer in time; 3 no node is alive.
    """

    async def do(backend: "Backend") -> int:
        found = await backend.stats()
        if is_json:
            say_json(found)
            return 0 if found.nodes else NOBODY
        for name, node in sorted(found.nodes.items()):
            up_s = max(0, time.time() - node.started / 1000)
            workers = f"{node.workers} worker{'' if node.workers == 1 else 's'}"
            say(f"{name}  {_conns(found.conns.get(name, 0))}  {workers}  {node.version}  up {up_s / 60:.0f} min")
        nodes = f"{len(found.nodes)} node{'' if len(found.nodes) == 1 else 's'}"
        codes = f"{found.codes} code{'' if found.codes == 1 else 's'} watched"
        say(f"{nodes}, {_conns(sum(found.conns.values()))}, {codes}")
        return 0 if found.nodes else NOBODY

    run(do, **where)


@click.command()
@reaching
def events(is_json: bool, **where: Any) -> None:
    """Print who comes and goes as it happens, one JSON object a line. Ctrl-C ends it.

    The servers say it where their setting events is on.
    """

    async def do(backend: "Backend") -> int:
        async with backend.events() as heard:
            async for event in heard:
                say_json(event)
        return 0

    run(do, **where)


COMMANDS = (send, jobs, kick, conns, users, groups, session, stats, events)
