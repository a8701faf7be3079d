"""The worker process: wires sessions to main (over the bus) and to the registry (in Redis).

Started by main as a Python of its own; nothing secret stands in its arguments.

Start: 1 bus, 2 settings from main, 3 registry mirror, 4 HTTP on the inherited socket, 5 ready.
Stop, when main says so: 1 no new connection, 2 sessions are closed, 3 the registry is cleared,
4 the bus is closed. When main is gone: at once, the next main clears the registry.
"""

import argparse
import asyncio
import base64
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import uvloop
from aiohttp import web
from setproctitle import setproctitle

from quotepush.auth import Verifier
from quotepush.cluster.announcer import event_text
from quotepush.cluster.commands import Command, Sender, To, encode, parse_command
from quotepush.cluster.registry import RegistryMirror, registry_client
from quotepush.entitlement import Codes
from quotepush.node import bus
from quotepush.node.accept import Acceptor
from quotepush.node.carrying import carry_out, reply_of
from quotepush.node.collector import quiet_collector
from quotepush.node.logs import set_up_logging
from quotepush.node.memberships import Memberships
from quotepush.node.places import Places, PlacesByAddress
from quotepush.push.addresses import counted_by
from quotepush.push.desk import Answer, Delivered, Desk, Limits
from quotepush.push.orders import Carrier, Outcome
from quotepush.push.session import Session
from quotepush.push.site import make_app
from quotepush.push.subscriptions import Subscriptions
from quotepush.push.worker import FeedState, Outside, PushWorker, clock_ms
from quotepush.settings import Settings
from quotepush.token_keys import keys_of
from quotepush.wire.messages import Request

__all__ = ["main"]

log = logging.getLogger("quotepush.worker")

_FIGURES_S = 1.0
_SETUP_TIMEOUT_S = 10.0
_UNFIT = 3
_FINISH_TIMEOUT_S = 5.0


class WorkerProcess:
    """One worker, from its first message to its last."""

    def __init__(self, index: int, bus_socket: socket.socket, listening: list[int]) -> None:
        self._index = index
        self._bus_socket = bus_socket
        self._listening = listening  # descriptors of all slots' sockets; ours is at our index
        self._lent: asyncio.Queue[bus.Lend] = asyncio.Queue()
        self._setup: asyncio.Future[bus.Setup] = asyncio.get_running_loop().create_future()
        self._stop: asyncio.Future[bus.Drain | None] = asyncio.get_running_loop().create_future()
        self._questions: dict[int, Callable[[bus.Answered], None]] = {}
        self._searches: dict[int, Callable[[bytes | None], None]] = {}
        self._next_question = 0
        self._keys: list[tuple[str, bool]] | None = None  # newer ones than those of Setup
        self._keys_wanted: list[Callable[[], None]] = []  # who waits for keys that may be newer
        self._worker: PushWorker | None = None
        self._doubt: Callable[[], None] = lambda: None
        self._node = ""
        self._carrier = Carrier(self._carried)
        self._command_ids: dict[int, str] = {}
        self._sends: dict[int, Callable[[Delivered], None]] = {}
        self._unwatched: list[str] = []
        self._listed: dict[str, bool] = {}
        self._feed = FeedState()
        self._places: Places | PlacesByAddress = Places(
            ask=lambda needed, spare: self._bus.send(bus.PlacesWanted(needed, spare)),
            give_back=lambda count: self._bus.send(bus.PlacesBack(count)),
        )
        self._bus = bus.BusEnd(bus.ToWorker, self._receive, self._lost, on_turn=self._turn)

    async def run(self) -> int:
        """Serve until told to stop; return the exit status."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._bus, sock=self._bus_socket)
        first: list[asyncio.Future[Any]] = [self._setup, self._stop]
        await asyncio.wait(first, timeout=_SETUP_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not self._setup.done():
            return 1  # main was gone, or had no time for us, before it could say anything
        setup = self._setup.result()
        if setup.version != bus.BUS_VERSION:
            set_up_logging("info", f"worker {self._index}")
            log.error("main speaks another version of the bus than the files installed now: restart main")
            return _UNFIT
        settings = Settings(**setup.settings)
        set_up_logging(settings.log_level, f"worker {self._index}")
        setproctitle(f"quotepush[{setup.node}]: worker {self._index}")
        if settings.pin_workers:
            _pin(self._index)
        life = f"{self._index}.{setup.start_us}"
        self._bus.send(bus.Hello(life))
        redis = registry_client(settings.registry_url, connect_timeout_s=settings.redis_timeout_s)
        mirror = RegistryMirror(
            redis,
            prefix=settings.redis_prefix,
            node=setup.node,
            life=life,
            interval_s=settings.registry_interval_s,
            ttl_s=settings.registry_ttl_s,
            check_interval_s=settings.registry_check_s,
            on_client_id=lambda client_id: self._tell_client_id(life, client_id),
            told=self._note_listed,
        )
        memberships = Memberships(
            settings,
            setup.node,
            life,
            find=self._session,
            on_client_id=self._tell_client_id,
            on_users=self._tell_users,
            told=self._tell_online if settings.events else None,
        )

        def doubt() -> None:
            mirror.doubt()
            memberships.doubt()

        self._doubt = doubt
        if settings.max_connections_per_ip:
            self._places = PlacesByAddress(
                ask=lambda addresses: self._bus.send(bus.PlacesWanted(0, 0, addresses)),
                give_back=lambda addresses: self._bus.send(bus.PlacesBack(0, addresses)),
            )
        worker = self._worker = self._make_worker(setup, settings, life, mirror, memberships)
        runner = web.AppRunner(
            make_app(settings, worker, self._admit, self._places.leave), access_log=None,
            keepalive_timeout=settings.request_timeout_s, tcp_keepalive=False, handle_signals=False,
        )  # fmt: skip
        await runner.setup()
        assert runner.server is not None
        acceptor = Acceptor(runner.server, tls=_tls(settings), tls_timeout_s=settings.request_timeout_s)
        acceptor.open(self._listening[self._index], settings.backlog)
        quiet_collector()
        tasks = [
            asyncio.create_task(mirror.run(), name="registry"),
            asyncio.create_task(memberships.run(), name="memberships"),
            asyncio.create_task(self._carrier.run(), name="orders"),
            asyncio.create_task(worker.turn_wheel(), name="wheel"),
            asyncio.create_task(self._tell_figures(mirror, memberships, settings.worker_silence_s), name="figures"),
            asyncio.create_task(self._borrow(acceptor, settings.backlog), name="borrow"),
        ]
        self._bus.send(bus.Ready())
        drain = await self._until_stopped(tasks)
        if drain is None:
            return 0  # main is gone; its successor clears the registry
        await acceptor.stop()
        await worker.drain(drain.timeout_s, drain.retry_after_ms)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_FINISH_TIMEOUT_S):
                if not all(await asyncio.gather(mirror.finish(), memberships.finish())):
                    log.warning("registry: not cleared; the next start does it")
        except TimeoutError:
            log.warning("registry: not cleared in time; the next start does it")
        await redis.aclose()
        await runner.cleanup()
        self._bus.close()
        return 0

    async def _borrow(self, acceptor: Acceptor, backlog: int) -> None:
        """Accept at the sockets of empty slots for as long as main says."""
        while True:
            lend = await self._lent.get()
            descriptor = self._listening[lend.slot]
            if lend.is_lent and descriptor not in acceptor:
                acceptor.open(descriptor, backlog)
            elif not lend.is_lent and descriptor in acceptor:
                acceptor.close(descriptor)

    async def _until_stopped(self, tasks: Sequence["asyncio.Task[None]"]) -> bus.Drain | None:
        """Wait for main's word; a task that ends by itself is a bug and ends the worker."""
        waited: list[asyncio.Future[Any]] = [self._stop, *tasks]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
                raise RuntimeError(f"the task {task.get_name()} has ended")
        return self._stop.result()

    def _make_worker(
        self, setup: bus.Setup, settings: Settings, life: str, mirror: RegistryMirror, memberships: Memberships
    ) -> PushWorker:
        desk = Desk(
            subscriptions=Subscriptions(),
            limits=Limits(
                settings.max_codes,
                settings.codes_per_request,
                settings.requests_per_s,
                settings.message_bytes,
                settings.replay_bytes,
            ),
            server=setup.server,
            epoch=setup.epoch,
            heartbeat_ms=settings.heartbeat_ms,
            watch=lambda codes, books, since, then: self._ask(codes, then, watch=True, books=books, since=since),
            look=lambda codes, then: self._ask(codes, then, watch=False, books=False, since={}),
            read=lambda codes, books, then: self._ask(codes, then, watch=False, books=books, since={}),
            find=self._find,
            unwatch=self._unwatch,
            subscribed=mirror.touch,
            extra_fields=frozenset(settings.extra_fields),
            verifier=_verifier(settings, setup.keys if self._keys is None else self._keys),
            anonymous=settings.anonymous_entitlement,
            renew_keys=self._renew_keys,
            auth_timeout_ms=round(settings.auth_timeout_s * 1000),
            clock_ms=clock_ms,
            life=setup.life,
            send=self._client_send,
            message_bytes=settings.client_message_bytes,
            sends_per_s=settings.client_sends_per_s,
        )

        def closed(fd: str, peer: str) -> None:
            mirror.close(fd)
            memberships.close(fd)
            self._places.leave(counted_by(peer))

        outside = Outside(mirror.open, closed, memberships.changed)
        if settings.events:
            outside.came, outside.left = self._tell_came, self._tell_left
        worker = PushWorker(settings, f"{setup.node}.{self._index}.", int(life.partition(".")[2]), desk, outside)
        self._node = setup.node
        self._feed.stale_ms = round(settings.feed_stale_s * 1000)
        worker.feed = self._feed
        return worker

    # To main

    def _ask(
        self,
        codes: Sequence[str],
        then: Callable[[Answer], None],
        *,
        watch: bool,
        books: bool,
        since: Mapping[str, tuple[str, int]],
    ) -> None:
        def answered(message: bus.Answered) -> None:
            worker = self._worker
            if worker is not None:
                worker.hub.ordinal = message.ordinal
            if watch and books and worker is not None:
                for code, seq, row, book, _ in message.rows:
                    if row is not None:
                        # Newer than what we have, when main still holds rows for us; those are without the book.
                        worker.hub.offer(code, seq, row, book)
            rows = {row[0]: row[1:] for row in message.rows}
            then(Answer(rows, message.refused, message.missed, frozenset(message.stale), message.behind))

        self._next_question += 1
        self._questions[self._next_question] = answered
        self._tell_unwatched()
        self._bus.send(bus.Ask(self._next_question, list(codes), watch, books, dict(since)))

    def _find(
        self, text: str | None, limit: int, codes: Codes, then: Callable[[bytes | None], None], delay_s: int = 0
    ) -> None:
        self._next_question += 1
        self._searches[self._next_question] = then
        patterns = None if codes.has_all else codes.patterns
        self._bus.send(bus.Find(self._next_question, text, limit, patterns, delay_s))

    def _renew_keys(self, then: Callable[[], None]) -> None:
        if not self._keys_wanted:
            self._bus.send(bus.KeysWanted())
        self._keys_wanted.append(then)

    def _take_keys(self, message: bus.TokenKeys) -> None:
        if message.keys is not None:
            self._keys = message.keys
            if self._worker is not None and self._worker.desk.verifier is not None:
                self._worker.desk.verifier.renew(keys_of(message.keys))
        if message.is_answer:
            waiting, self._keys_wanted = self._keys_wanted, []
            for then in waiting:
                try:
                    then()
                except Exception:
                    log.exception("a request could not go on with newer keys")

    async def _admit(self, address: str, take: bool) -> str:
        error = await self._places.take(address)
        if not error and not take:
            self._places.leave(address)
        return error

    def _unwatch(self, codes: Iterable[str]) -> None:
        if not self._unwatched:
            asyncio.get_running_loop().call_soon(self._tell_unwatched)
        self._unwatched.extend(codes)

    def _tell_unwatched(self) -> None:
        # Always before the next question, so that main sees both in the order in which they happened.
        if self._unwatched:
            codes, self._unwatched = self._unwatched, []
            self._bus.send(bus.Unwatch(codes))

    def _note_listed(self, code: str, is_listed: bool) -> None:
        if not self._listed:
            asyncio.get_running_loop().call_soon(self._tell_listed)
        self._listed[code] = is_listed

    def _tell_listed(self) -> None:
        listed, self._listed = self._listed, {}
        came = [code for code, is_listed in listed.items() if is_listed]
        self._bus.send(bus.Listed(came, [code for code, is_listed in listed.items() if not is_listed]))

    def _tell_client_id(self, life: str, client_id: int) -> None:
        self._bus.send(bus.RegistryClient(client_id, life))
        self._bus.flush()

    # The cluster's orders, and who comes and goes

    def _take_order(self, message: bus.Order) -> None:
        worker = self._worker
        if worker is None:
            self._carried(message.question, Outcome())
            return
        command = parse_command(message.command)  # main has checked it
        self._command_ids[message.question] = command.id
        self._carrier.take(message.question, len(message.command), lambda: carry_out(worker.orders, command))

    def _carried(self, question: int, outcome: Outcome) -> None:
        reply = reply_of(outcome, self._command_ids.pop(question, ""), self._node)
        self._bus.send(bus.Carried(question, encode(reply)))

    def _session(self, fd: str) -> Session | None:
        link = self._worker.links.get(fd) if self._worker is not None else None
        return None if link is None else link.session

    def _tell_users(self, users: Sequence[str]) -> None:
        limited: dict[str, tuple[str, int, bool]] = {}
        members = self._worker.members if self._worker is not None else None
        for user in users if members is not None else ():
            for session in members.of_user(user) if members is not None else ():
                most = session.entitlement.max_conns
                if most is not None:
                    limited[user] = (user, most, session.entitlement.conns_win == "newest")
        self._bus.send(bus.UsersCame(list(users), list(limited.values())))

    def _client_send(self, session: Session, request: Request, then: Callable[[Delivered], None]) -> None:
        kind, name = request.to
        to = To(users=[name] if kind == "user" else None, group=name if kind == "group" else None, all=kind == "all")
        is_binary = isinstance(request.data, bytes)
        command = Command(
            op="send",
            to=to,
            data=base64.b64encode(request.data).decode() if is_binary else request.data,
            encoding="base64" if is_binary else "",
            sender=Sender(session.fd, None if session.member is None else session.member.user),
        )
        self._next_question += 1
        self._sends[self._next_question] = then
        self._bus.send(bus.ClientSend(self._next_question, encode(command)))

    def _sent(self, message: bus.Sent) -> None:
        then = self._sends.pop(message.question)
        then(Delivered(message.delivered, message.kept, message.error, message.message, message.is_retryable))

    def _tell_came(self, session: Session) -> None:
        user = None if session.member is None else session.member.user
        self._bus.send(bus.Happened([event_text("open", clock_ms(), fd=session.fd, uid=user)]))

    def _tell_left(self, session: Session, user: str | None, by: str, reason: str) -> None:
        self._bus.send(bus.Happened([event_text("close", clock_ms(), fd=session.fd, uid=user, by=by, reason=reason)]))

    def _tell_online(self, tag: str, is_online: bool) -> None:
        if tag.startswith("u:"):
            event = "user_online" if is_online else "user_offline"
            self._bus.send(bus.Happened([event_text(event, clock_ms(), uid=tag[2:])]))

    async def _tell_figures(self, mirror: RegistryMirror, memberships: Memberships, silence_s: float) -> None:
        # They are also the sign of life that main waits for.
        every_s = min(_FIGURES_S, silence_s / 4)
        while True:
            worker = self._worker
            assert worker is not None
            self._bus.send(
                bus.Figures(
                    {
                        "connections": len(worker.links),
                        "connections_opened": worker.opened_total,
                        "connections_closed": worker.closed_total,
                        "connections_refused": worker.refusals.connections,
                        "questions_refused": worker.refusals.questions,
                        "subscriptions": worker.subscriptions.count,
                        "rows_in": worker.hub.rows_in,
                        "rows_out": worker.hub.rows_out,
                        "rows_merged": worker.hub.rows_merged,
                        "writes": worker.hub.writes,
                        "registry_pending": mirror.pending + memberships.pending,
                        "registry_lag_seconds": max(mirror.lag_ms, memberships.lag_ms) / 1000,
                        "registry_repairs": mirror.repairs + memberships.repairs,
                        "members": memberships.count,
                        "users": worker.members.users,
                        "messages_sent": worker.orders.delivered,
                        "messages_undelivered": worker.orders.undelivered,
                        "places_spare": self._places.settle(),
                    }
                )
            )
            await asyncio.sleep(every_s)

    # From main

    def _receive(self, message: Any) -> None:  # hot
        kind = type(message)
        if kind is bus.Rows:
            worker = self._worker
            if worker is not None:
                offer = worker.hub.offer
                for row in message.rows:
                    offer(*row)
                worker.hub.ordinal = message.ordinal
        elif kind is bus.Answered:
            self._questions.pop(message.question)(message)
        elif kind is bus.Found:
            self._searches.pop(message.question)(message.text)
        elif kind is bus.Order:
            self._take_order(message)
        elif kind is bus.Sent:
            self._sent(message)
        elif kind is bus.TokenKeys:
            self._take_keys(message)
        elif kind is bus.PlacesGranted:
            self._places.granted(message.count, message.words)
        elif kind is bus.Freshness:
            if self._worker is not None:
                self._worker.freshness.note(message.stale, message.fresh)
        elif kind is bus.Feed:
            self._feed.state, self._feed.last_tick_ms = message.state, message.last_tick_ms
            if self._worker is not None:
                self._worker.desk.epoch = message.epoch
        elif kind is bus.Setup:
            self._setup.set_result(message)
        elif kind is bus.Doubt:
            self._doubt()
        elif kind is bus.Lend:
            self._lent.put_nowait(message)
        elif kind is bus.Drain and not self._stop.done():
            self._stop.set_result(message)

    def _turn(self) -> None:
        if self._worker is not None:
            self._worker.hub.flush_soon()

    def _lost(self) -> None:
        if not self._stop.done():
            log.warning("main is gone")
            self._stop.set_result(None)

    def ask_to_stop(self) -> None:
        """SIGTERM to this worker alone: leave in order; main starts another."""
        if not self._stop.done():
            self._stop.set_result(bus.Drain(5.0, 500))


def _verifier(settings: Settings, keys: list[tuple[str, bool]]) -> Verifier | None:
    if not settings.has_tokens:
        return None
    return Verifier(
        keys_of(keys),
        settings.token_leeway_s,
        audience=settings.token_audience,
        issuers=settings.token_issuer,
        delays=settings.delays,
    )


def _pin(index: int) -> None:
    """Stay on one core: worker i on the i-th that this process may use, again from the first when there are more."""
    try:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})
    except (AttributeError, OSError) as e:  # not Linux, or forbidden
        log.warning("cannot bind this worker to a core: %s", e)


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    return context


async def _serve(index: int, bus_fd: int, listening: list[int]) -> int:
    process = WorkerProcess(index, socket.socket(fileno=bus_fd), listening)
    loop = asyncio.get_running_loop()
    # Ctrl-C in a terminal reaches the whole group: main decides, not each for himself.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, process.ask_to_stop)
    return await process.run()


def main() -> None:
    """Run one worker; see the module's text."""
    parser = argparse.ArgumentParser(description="A worker of quotepush; started by quotepush serve.")
    for name in ("index", "bus"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--listen", required=True, help="descriptors of the slots' sockets, with commas")
    arguments = parser.parse_args()
    setproctitle(f"quotepush: worker {arguments.index}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(_serve(arguments.index, arguments.bus, [int(fd) for fd in arguments.listen.split(",")]))
    sys.stdout.flush()
    os._exit(status)  # no finalizers: sockets are closed by the kernel, and main waits for our end
