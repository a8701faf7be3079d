"""A real HTTP server of key sets that answers as a test says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

__all__ = ["KeySite", "key_site"]


class KeySite:
    """What it answers, and how often it was asked; ``may_answer`` holds answers back."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.status = 200
        self.headers: dict[str, str] = {}
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.asked += 1
        await self.may_answer.wait()
        return web.Response(status=self.status, text=self.text, headers=self.headers)


@asynccontextmanager
async def key_site(text: str) -> AsyncIterator[KeySite]:
    """Serve ``text`` on a free port."""
    found = KeySite(text)
    app = web.Application()
    app.router.add_get("/{path:.*}", found.handle)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/keys?secret=s3cret"
    try:
        yield found
    finally:
        found.may_answer.set()
        await runner.cleanup()
