"""A network that lets HTTP through to a server and no WebSocket, and a stream for those behind it.

The stream says in Server-Sent Events what a WebSocket of the server says; its own number of each event is the
position from which ``Last-Event-ID`` resumes.
"""

import asyncio
import contextlib
import json
from types import TracebackType
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, web

__all__ = ["BlockedNetwork"]

_MOST_CODES = 300


class BlockedNetwork:
    """An HTTP server in front of a quotepush server.

    Attributes:
        is_blocked: WebSockets are refused.
        sockets_refused: how often one was.
        streams: the query of each stream that was asked for, with ``Last-Event-ID`` where there was one.
    """

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._positions: list[dict[str, Any]] = []
        self._open: set[ClientWebSocketResponse] = set()
        self.is_blocked = True
        self.sockets_refused = 0
        self.streams: list[dict[str, str]] = []
        self.url = ""

    async def __aenter__(self) -> "BlockedNetwork":
        self._http = ClientSession()
        app = web.Application()
        app.router.add_get("/ws", self._websocket)
        app.router.add_get("/stream", self._stream)
        app.router.add_get("/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cut()
        await self._runner.cleanup()
        await self._http.close()

    async def cut(self) -> None:
        """End every stream and every WebSocket."""
        await asyncio.gather(*(ws.close() for ws in list(self._open)))

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        async with self._http.get(
            self._server_url + request.path_qs, headers={"Accept-Encoding": "identity"}
        ) as answer:
            return web.Response(
                status=answer.status, body=await answer.read(), headers={"Content-Type": answer.headers["Content-Type"]}
            )

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade") is None:
            return await self._pass_on(request)
        if self.is_blocked:
            self.sockets_refused += 1
            return web.Response(status=502, text="what is an upgrade?")
        here = web.WebSocketResponse(protocols=["quotes.v1.json"])
        await here.prepare(request)
        async with self._http.ws_connect(
            self._server_url + "/ws", protocols=["quotes.v1.json"], max_msg_size=0
        ) as there:
            self._open.add(there)

            async def up() -> None:
                async for message in here:
                    await there.send_str(message.data)
                await there.close()

            task = asyncio.create_task(up())
            async for message in there:
                with contextlib.suppress(ConnectionError):
                    await here.send_str(message.data)
            self._open.discard(there)
            await here.close()
            await task
        return here

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        if "Last-Event-ID" in request.headers:
            query["Last-Event-ID"] = request.headers["Last-Event-ID"]
        self.streams.append(query)
        position = query.get("Last-Event-ID") or query.get("last_event_id")
        codes = query["codes"].split(",")
        assert len(codes) <= _MOST_CODES
        places: dict[str, Any] = dict(self._positions[int(position)]) if position else {}
        params = {"token": query["token"]} if "token" in query else {}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        await response.write(b"retry: 100\n\n")
        async with self._http.ws_connect(self._server_url + "/ws", params=params, max_msg_size=0) as ws:
            self._open.add(ws)
            with contextlib.suppress(ConnectionError):
                async for message in ws:
                    if message.type is not WSMsgType.TEXT:
                        break
                    said = json.loads(message.data)
                    if said["type"] == "hello":
                        epoch = said["epoch"]
                        await ws.send_json(_subscribe(query, codes, {c: p for c, p in places.items() if c in codes}))
                    if said["type"] in ("snapshot", "tick"):
                        for row in said["data"]:
                            known = places.get(row["code"], {}).get("epoch", epoch)
                            of = row.get("epoch", epoch) if said["type"] == "snapshot" else known
                            places[row["code"]] = {"epoch": of, "seq": row["seq"]}
                    self._positions.append(dict(places))
                    number = len(self._positions) - 1
                    await response.write(f"event: {said['type']}\nid: {number}\ndata: {message.data}\n\n".encode())
            self._open.discard(ws)
        return response


def _subscribe(query: dict[str, str], codes: list[str], since: dict[str, Any]) -> dict[str, Any]:
    request: dict[str, Any] = {"action": "subscribe", "codes": codes}
    if since:
        request["since"] = since
    if "fields" in query:
        request["fields"] = query["fields"].split(",")
    if "max_rate" in query:
        request["max_rate"] = float(query["max_rate"])
    return request
