"""The blocking twin: threads share it, and a process that forked is told."""

import asyncio
import multiprocessing
import threading

import pytest

from quotepush import Backend, BlockingBackend
from quotepush.errors import BackendUnavailable, SettingsError
from tests.support.redis_server import RedisServer
from tests.support.stand_in_node import stand_in
from tests.support.waiting import wait_until


def test_every_call_of_the_library_has_its_twin() -> None:
    def calls(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert calls(BlockingBackend) == calls(Backend) - {"aclose"} | {"close"}


async def test_closing_ends_the_thread_and_the_calls_of_others(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node:
        await node.connect(1, user="ann")
        node.answer = lambda command: None
        backend = BlockingBackend(redis_server.url, timeout_s=60)
        call = asyncio.create_task(asyncio.to_thread(backend.send_to_user, "ann", 1))
        await wait_until(lambda: node.heard)
        await asyncio.to_thread(backend.close)
        await asyncio.to_thread(backend.close)
        with pytest.raises(BackendUnavailable):
            await call
        with pytest.raises(BackendUnavailable, match="is closed"):
            backend.connect()
        assert not [thread for thread in threading.enumerate() if thread.name == "quotepush backend"]


async def test_listings_are_iterated_gathered_and_paged(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node, redis_server.client() as redis:
        await redis.sadd("qp:user:ann", *(node.fd(n) for n in range(2_000)))
        await redis.sadd("qp:user:ann", "gone.0.1")
        await redis.hset("qp:nodes", "gone", '{"renewed":1,"started":1}')

        def read() -> None:
            with BlockingBackend(redis_server.url, timeout_s=30) as backend:
                assert len(list(backend.user_conns("ann"))) == 2_000
                assert len(set(backend.user_conns("ann").all())) == backend.user_count("ann") == 2_000
                page = backend.user_conns("ann").page("", 10)
                assert 0 < len(page.items) < 100 and page.cursor

        await asyncio.to_thread(read)


def _call_in_child(backend: BlockingBackend, answers: "multiprocessing.Queue[str]") -> None:
    try:
        backend.connect()
    except RuntimeError as e:
        answers.put(str(e))


def test_after_a_fork_each_process_needs_its_own(redis_server: RedisServer) -> None:
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    backend = BlockingBackend(redis_server.url)  # no thread yet: none is forked
    child = fork.Process(target=_call_in_child, args=(backend, answers))
    child.start()
    assert "after the fork" in answers.get(timeout=30)
    child.join(30)
    with backend:
        backend.connect()


def test_an_address_that_is_none_is_said_at_once() -> None:
    with pytest.raises(SettingsError):
        BlockingBackend("http://x")
