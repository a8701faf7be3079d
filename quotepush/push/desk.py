"""What a session knows of its surroundings: the link it speaks through, and the desk where it asks.

Invariant: nothing else of the process is within a session's reach, no socket, no loop and no clock; and an answer of
main comes in the stream of ticks, so that between the rows in it and the next tick nothing is missing.
"""

import base64
import hashlib
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from quotepush.auth import Identity, Verifier
from quotepush.entitlement import UNLIMITED, Codes, Entitlement
from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import Lane, Subscriptions
from quotepush.quote.delay import suffix_of
from quotepush.wire.messages import Request

if TYPE_CHECKING:
    from quotepush.push.session import Session

__all__ = ["Answer", "DelayedDesk", "Delivered", "Desk", "Gone", "Limits", "Link"]

_T = TypeVar("_T")
Then = Callable[["Answer"], None]


class Link(Protocol):
    """The socket as a session sees it."""

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket at once."""

    def close(self, code: int, reason: str) -> None:
        """Say goodbye and close; nothing is written afterwards."""

    def hold_requests(self, hold: bool) -> None:
        """Stop, or go on, reading from the client."""


class Gone:
    """The link of a session that is over."""

    def write(self, data: bytes) -> None: ...

    def close(self, code: int, reason: str) -> None: ...

    def hold_requests(self, hold: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may do.

    Attributes:
        replay_bytes: of missed rows that wait for it; what it has missed beyond that it gets as a snapshot.
        max_rate: most rows a second and code; None: every row.
        delay_s: how old its quotes are; 0: live.
    """

    codes: int
    codes_per_request: int
    requests_per_s: float
    message_bytes: int
    replay_bytes: int = 1 << 20
    max_rate: float | None = None
    delay_s: int = 0

    def under(self, entitlement: Entitlement) -> "Limits":
        """Return what remains of them for somebody who may have no more than ``entitlement``."""
        if entitlement.max_codes is None and entitlement.max_rate is None and not entitlement.delay_s:
            return self
        codes = self.codes if entitlement.max_codes is None else min(self.codes, entitlement.max_codes)
        max_rate = entitlement.capped(self.max_rate)
        return replace(self, codes=codes, max_rate=max_rate, delay_s=entitlement.delay_s)

    def as_said(self) -> Mapping[str, Any]:
        """Return them as ``hello`` says them."""
        rate = self.requests_per_s
        return {
            "codes": self.codes,
            "codes_per_request": self.codes_per_request,
            "requests_per_s": int(rate) if rate == int(rate) else rate,
            "message_bytes": self.message_bytes,
            "max_rate": self.max_rate,
            **({"delay_s": self.delay_s} if self.delay_s else {}),
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What main says to a question about codes.

    Attributes:
        rows: per code its seq, its newest row as JSON text (None: no tick yet), its book, if that was asked for, and
            the epoch in which it counts.
        refused: per code the error word, e.g. ``unknown_code``.
        missed: of codes that were asked since when: the rows behind that (seq and JSON text, oldest first), as far as
            main still has them all.
        stale: those of the codes that are stale.
        behind: of codes that were asked with a position: the seq of the row before (None: it cannot be told), and the
            rows since then (seq, JSON text, ordinal), as far as main still has them all.
    """

    rows: Mapping[str, tuple[int, bytes | None, bytes | None, str]]
    refused: Mapping[str, str]
    missed: Mapping[str, Sequence[tuple[int, bytes]]] = field(default_factory=dict)
    stale: Collection[str] = ()
    behind: Mapping[str, tuple[int | None, Sequence[tuple[int, bytes, int]]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Delivered:
    """What has become of a client's message.

    Attributes:
        count: connections that took it.
        kept: users for whom it waits.
        error: why it was not sent; empty: it was.
        is_retryable: the same can succeed soon.
    """

    count: int = 0
    kept: int = 0
    error: str = ""
    message: str = ""
    is_retryable: bool = False


def _nobody(*_: object) -> None:
    raise AssertionError("no hub yet")


def _at_once(then: Callable[[], None]) -> None:
    then()


@dataclass(slots=True)
class Desk:
    """What a worker offers its sessions: the index, main behind it, the registry, the clock.

    Attributes:
        watch: ask main for these codes (with their books?), what was missed of them since when (an epoch and a seq, or
            a position: ``@`` and the life of main, and an ordinal), and their later ticks; answers
            through the callback, in the stream of ticks, so that nothing falls between the answer and the next tick.
        look: the same without their later ticks.
        read: the same with their books, if wanted.
        find: ask main which codes begin so or have such names (None: which have moved most), how many at most, and
            of which codes only (callback, and with which delay): answers with JSON text, or with None when too many
            ask.
        deliver: queue a lane's newest row for one of its newcomers; set by the worker that has the hub.
        replay: begin to send an outbox what it replays; set by the worker too.
        extra_fields: what views may name besides the fields of the protocol.
        verifier: checks tokens; None: this server takes none, and everybody may do everything.
        anonymous: what somebody without a token may have where tokens are taken; None: nothing.
        renew_keys: ask main for keys of tokens that may be newer; calls back when they are here, or there are none.
        auth_timeout_ms: how long a session may be without a token, where it needs one.
        unwatch: nobody here watches these codes any more.
        subscribed: a session's codes have changed (for the registry).
        clock_ms: epoch milliseconds.
        life: of main, in which positions count.
        send: hand a client's message to the cluster; calls back with how many took it, or why it was not sent.
        message_bytes: of the data of a client's message.
        sends_per_s: messages that a client may send.
        identified: a session has shown a token, and before that another one, or none; set by the worker.
        secret: of this worker, from which the keys of its connections are made.
        delayed: the desks of those who are shown everything later, by their delay; see :meth:`of`.
    """

    subscriptions: Subscriptions
    limits: Limits
    server: str
    epoch: str
    heartbeat_ms: int
    watch: Callable[[Sequence[str], bool, Mapping[str, tuple[str, int]], Callable[[Answer], None]], None]
    look: Callable[[Sequence[str], Callable[[Answer], None]], None]
    unwatch: Callable[[Iterable[str]], None]
    subscribed: Callable[[str], None]
    clock_ms: Callable[[], int]
    extra_fields: frozenset[str] = frozenset()
    read: Callable[[Sequence[str], bool, Callable[[Answer], None]], None] = _nobody
    find: Callable[..., None] = _nobody
    deliver: Callable[[Lane, Outbox, int], None] = _nobody
    replay: Callable[[Outbox], None] = _nobody
    verifier: Verifier | None = None
    anonymous: Entitlement | None = None
    renew_keys: Callable[[Callable[[], None]], None] = _at_once
    auth_timeout_ms: int = 10_000
    life: str = ""
    delayed: "dict[int, DelayedDesk]" = field(default_factory=dict)
    send: "Callable[[Session, Request, Callable[[Delivered], None]], None]" = _nobody
    message_bytes: int = 16_384
    sends_per_s: float = 5.0
    identified: "Callable[[Session, Identity | None], None]" = lambda session, before: None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def conn_key(self, fd: str) -> str:
        """Return the key of a connection: whoever knows it has it from the connection's own ``hello``."""
        digest = hashlib.blake2b(fd.encode(), key=self.secret, digest_size=16).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    def is_key_of(self, fd: str, key: str) -> bool:
        """Say whether ``key`` is that of ``fd``."""
        return secrets.compare_digest(self.conn_key(fd).encode(), key.encode("utf-8", "replace"))

    @property
    def needs_identity(self) -> bool:
        """Whether who has brought no token may do nothing."""
        return self.verifier is not None and self.anonymous is None

    def identify(self, token: str) -> Identity | None:
        """Return whom ``token`` names; None: this server takes no tokens.

        Raises:
            PeerError: ``auth_failed``, with the close code.
            UnknownKey: one of these: it may be another one after :attr:`renew_keys`.
        """
        return None if self.verifier is None else self.verifier.verify(token, self.clock_ms())

    def entitlement_of(self, identity: Identity | None) -> Entitlement:
        """Return what somebody may have who has proved to be ``identity`` (None: who has brought no token)."""
        if identity is not None:
            return identity.entitlement
        return UNLIMITED if self.anonymous is None else self.anonymous

    def of(self, delay_s: int) -> "Desk":
        """Return the desk of those whose quotes are so old; 0: this one."""
        if not delay_s:
            return self
        desk = self.delayed.get(delay_s)
        if desk is None:
            desk = self.delayed[delay_s] = DelayedDesk(self, delay_s)
        return desk  # type: ignore[return-value]  # it is one in all that a session asks of it


class DelayedDesk:
    """The desk of those who are shown everything later; all else is as at the desk behind it.

    Law: no row that is asked for here, or sent to somebody who sits here, is younger than the delay; for main knows it
    by another name, in another epoch.
    """

    def __init__(self, behind: Desk, delay_s: int) -> None:
        self._behind = behind
        self._delay_s = delay_s
        self._suffix = suffix_of(delay_s)
        self.subscriptions = behind.subscriptions.delayed(self._suffix)

    @property
    def epoch(self) -> str:
        return self._behind.epoch + self._suffix

    def watch(self, codes: Sequence[str], books: bool, since: Mapping[str, tuple[str, int]], then: Then) -> None:
        self._behind.watch(self._names(codes), books, self._named(since), self._answering(then))

    def look(self, codes: Sequence[str], then: Then) -> None:
        self._behind.look(self._names(codes), self._answering(then))

    def read(self, codes: Sequence[str], books: bool, then: Then) -> None:
        self._behind.read(self._names(codes), books, self._answering(then))

    def find(self, text: str | None, limit: int, codes: Codes, then: Callable[[bytes | None], None]) -> None:
        self._behind.find(text, limit, codes, then, self._delay_s)

    def _names(self, codes: Iterable[str]) -> list[str]:
        return [code + self._suffix for code in codes]

    def _named(self, facts: Mapping[str, _T]) -> dict[str, _T]:
        return {code + self._suffix: fact for code, fact in facts.items()}

    def _answering(self, then: Then) -> Then:
        def of_codes(facts: Mapping[str, _T]) -> dict[str, _T]:
            return {name.removesuffix(self._suffix): fact for name, fact in facts.items()}

        return lambda answer: then(
            Answer(
                of_codes(answer.rows),
                of_codes(answer.refused),
                of_codes(answer.missed),
                {name.removesuffix(self._suffix) for name in answer.stale},
                of_codes(answer.behind),
            )
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)
