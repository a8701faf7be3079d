"""A network that lets HTTP through to a server, streams too, and no WebSocket."""

import asyncio
import contextlib
from types import TracebackType

from aiohttp import ClientError, ClientSession, ClientTimeout, ClientWebSocketResponse, web

__all__ = ["BlockedNetwork"]

_NO_TIMEOUT = ClientTimeout(total=None)


class BlockedNetwork:
    """An HTTP server in front of a quotepush server.

    Attributes:
        is_blocked: WebSockets are refused.
        sockets_refused: how often one was.
        streams: the query of each stream that was asked for, with ``Last-Event-ID`` where there was one.
    """

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._open: set[ClientWebSocketResponse] = set()
        self._streaming: set[asyncio.Task[object]] = set()
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
        for streaming in self._streaming:
            streaming.cancel()
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
        """Pass the server's stream on, byte by byte."""
        query = dict(request.query)
        headers = {}
        if "Last-Event-ID" in request.headers:
            query["Last-Event-ID"] = headers["Last-Event-ID"] = request.headers["Last-Event-ID"]
        self.streams.append(query)
        async with self._http.get(self._server_url + request.path_qs, headers=headers, timeout=_NO_TIMEOUT) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            passing = asyncio.current_task()
            assert passing is not None
            self._streaming.add(passing)
            with contextlib.suppress(ConnectionError, ClientError, asyncio.CancelledError):
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            self._streaming.discard(passing)
        return response
