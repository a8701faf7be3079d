"""Questions that are answered once: the newest rows, codes to choose from, what has moved most.

Law: each answer is main's, asked for over the bus and waited for only so long; it says nothing of codes that who asks
may not have.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from aiohttp import web

from quotepush.entitlement import Entitlement
from quotepush.errors import PeerError
from quotepush.push.desk import Answer, Desk
from quotepush.push.gate import Gate, answer, refuse
from quotepush.push.questions import subscription_of
from quotepush.push.results import understand
from quotepush.push.stream import MAX_STREAM_CODES
from quotepush.push.subscriptions import Channel
from quotepush.wire.formats import JSON, View

__all__ = ["Queries"]

_PATIENCE_S = 5.0
_RETRY_AFTER_S = 5
_MOST_FOUND = 50
_MOST_LETTERS = 64

_T = TypeVar("_T")


class Queries:
    """The handlers of ``/quotes`` and ``/codes``."""

    def __init__(self, gate: Gate, desk: Desk) -> None:
        self._gate = gate
        self._desk = desk

    async def quotes(self, request: web.Request) -> web.StreamResponse:
        """Answer with the newest rows of some codes."""
        return await self._answer(request, self._newest_rows)

    async def codes(self, request: web.Request) -> web.StreamResponse:
        """Answer with the codes that somebody may look for, or with those that have moved most."""
        return await self._answer(request, self._found_codes)

    async def _answer(
        self, request: web.Request, find: Callable[[web.Request, Entitlement], Any]
    ) -> web.StreamResponse:
        request = self._gate.seen(request)
        return self._gate.note(request, await self._found(request, find), is_connection=False)

    async def _found(self, request: web.Request, find: Callable[[web.Request, Entitlement], Any]) -> web.StreamResponse:
        identity = await self._gate.let_in(request, is_connection=False)
        if isinstance(identity, web.Response):
            return identity
        try:
            return answer(request, await find(request, self._desk.entitlement_of(identity)))
        except PeerError as e:
            return refuse(request, 400, e.error, e.message)
        except TimeoutError:
            return refuse(
                request, 503, "overloaded", "the server has no time for this now", retry_after_s=_RETRY_AFTER_S
            )

    async def _newest_rows(self, request: web.Request, entitlement: Entitlement) -> bytes:
        desk = self._desk.of(entitlement.delay_s)
        wanted = subscription_of(request, desk)
        view = View.of(wanted.fields)
        most = min(MAX_STREAM_CODES, desk.limits.under(entitlement).codes)
        results = understand(wanted.codes, (), most, entitlement.codes)
        found = Answer({}, {})
        if results.codes:
            codes = list(results.codes)
            found = await _in_time(lambda then: desk.read(codes, view.has_book, then))
        results.refuse(found.refused)
        rows = []
        for code in results.codes:
            channel = Channel(code, *found.rows.get(code, (0, None, None, "")))
            text = channel.text(view, JSON.objects)
            rows.append(text if channel.epoch in ("", desk.epoch) else JSON.objects.with_epoch(text, channel.epoch))
        said = {"time": desk.clock_ms(), "epoch": desk.epoch, "rejected": results.as_said()["rejected"]}
        return b'%b,"quotes":[%b]}' % (orjson.dumps(said)[:-1], b",".join(rows))

    async def _found_codes(self, request: web.Request, entitlement: Entitlement) -> bytes:
        text, movers = request.query.get("q"), request.query.get("movers")
        if (text is None) == (movers is None):
            raise PeerError("bad_request", "ask for ?q=… or for ?movers=10")
        if text is not None:
            text = text.strip()
            if not 0 < len(text) <= _MOST_LETTERS:
                raise PeerError("bad_request", f"q has 1 to {_MOST_LETTERS} letters")
            limit = _number("limit", request.query.get("limit", "20"))
        else:
            limit = _number("movers", movers or "")

        def ask(then: Callable[[bytes | None], None]) -> None:
            self._desk.of(entitlement.delay_s).find(text, limit, entitlement.codes, then)

        found = await _in_time(ask)
        if found is None:
            raise TimeoutError
        return found


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= _MOST_FOUND and len(text) < 9):
        raise PeerError("bad_request", f"{name} must be a whole number from 1 to {_MOST_FOUND}")
    return int(text)


async def _in_time(ask: Callable[[Callable[[_T], None]], None]) -> _T:
    """Return what main says.

    Raises:
        TimeoutError: it has said nothing in time.
    """
    future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

    def then(found: _T) -> None:
        if not future.done():
            future.set_result(found)

    async with asyncio.timeout(_PATIENCE_S):
        ask(then)
        return await future
