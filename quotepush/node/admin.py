"""The private listener: is this node alive, is it of use, what has it counted.

``/healthz`` says that main's loop turns; ``/readyz`` that clients get fresh quotes here (503 with
the reasons when they do not); ``/metrics`` is Prometheus' text. None of them asks for a token; the
API beside them (:mod:`quotepush.node.api`) does.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson
from aiohttp import web

from quotepush.metrics import Sample, exposition

__all__ = ["make_admin_app"]


def make_admin_app(
    readiness: Callable[[], tuple[list[str], Mapping[str, Any]]],
    samples: Callable[[], Mapping[str, Iterable[Sample]]],
    client_max_size: int = 1 << 16,
) -> web.Application:
    """Return the application of the private listener.

    Args:
        readiness: reasons why this node is not ready (none: it is), and facts to show.
        samples: all numbers, by metric.
        client_max_size: of a body, in bytes.
    """

    async def healthz(request: web.Request) -> web.Response:
        return _json(200, {"status": "alive"})

    async def readyz(request: web.Request) -> web.Response:
        reasons, facts = readiness()
        return _json(503 if reasons else 200, {"ready": not reasons, "reasons": reasons, **facts})

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=exposition(samples()), headers={"Content-Type": "text/plain; version=0.0.4"})

    app = web.Application(client_max_size=client_max_size)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


def _json(status: int, body: Mapping[str, Any]) -> web.Response:
    return web.Response(
        status=status, body=orjson.dumps(body), content_type="application/json", headers={"Cache-Control": "no-store"}
    )
