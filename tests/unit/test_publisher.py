"""Ticks get into a real Redis once, in order and in one piece, whatever happens to the link and to Redis."""

import asyncio
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from quotepush import Backend, BlockingPublisher, Publisher
from quotepush.errors import BackendUnavailable, RedisUnavailable, SettingsError
from quotepush.store.address import shown_address
from tests.support.door import door_to
from tests.support.redis_server import RedisServer
from tests.support.store import heard, hearing, logged, prices, row, running
from tests.support.waiting import wait_until


async def test_scripts_that_redis_forgot_are_told_again(store: RedisServer) -> None:
    async with Publisher(store.url) as publisher, store.client() as client:
        for n in range(3):
            await publisher.publish([{"code": "A", "last": n}])
            await client.script_flush()

    assert await prices(store) == [0, 1, 2]


async def test_calls_at_the_same_time_keep_their_order(store: RedisServer) -> None:
    async with Publisher(store.url) as publisher:
        seqs = await asyncio.gather(*(publisher.publish([{"code": "A", "last": n}]) for n in range(200)))

    assert seqs == [[n + 1] for n in range(200)]
    assert await prices(store) == list(range(200))


async def test_ticks_may_be_changed_while_they_wait(redis_server: RedisServer) -> None:
    tick = {"code": "A", "last": 1}
    async with Publisher(redis_server.url) as publisher:
        redis_server.pause()
        waiting = [asyncio.create_task(publisher.publish([tick])) for _ in range(2)]
        await asyncio.sleep(0)
        tick["last"] = 9
        redis_server.resume()
        await asyncio.gather(*waiting)

    assert await prices(redis_server) == [1, 1]
    assert tick == {"code": "A", "last": 9}


@pytest.mark.parametrize("kind", [Publisher, BlockingPublisher])
@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("http://127.0.0.1", {}),
        ("redis://:hunt/er2@127.0.0.1:1", {}),
        ("", {}),
        ("redis://127.0.0.1/0?hunter=2", {}),
        ("redis://127.0.0.1", {"copies": "quote.A"}),
        ("redis://127.0.0.1", {"copies": "*.{code}"}),
        ("redis://127.0.0.1", {"log_batches": 0}),
    ],
)
def test_wrong_arguments_are_wrong_settings(kind: Any, url: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as error:
        kind(url, **options)
    assert "hunt" not in str(error.value)


def test_address_is_shown_without_user_password_and_options(tmp_path: Path):
    assert shown_address("redis://me:secret@example.org:7000/3?password=secret") == "example.org:7000"
    assert shown_address("rediss://:secret@example.org") == "example.org:6379"
    assert shown_address(f"unix://:secret@{tmp_path}/s?db=1") == f"unix:{tmp_path}/s"


# --- what happens to the link and to Redis ----------------------------------------------------------------------------


async def test_batch_whose_answer_was_lost_is_in_redis_once(store: RedisServer) -> None:
    links: list[str] = []
    async with door_to(store) as door, Publisher(door.url, on_link=links.append) as publisher:
        await publisher.publish([{"code": "A", "last": 0}])
        epoch = publisher.epoch
        door.swallows = 3

        assert await publisher.publish([{"code": c, "last": 1} for c in "ABA"]) == [2, 1, 3]

        assert door.swallows == 0
        assert await publisher.publish([{"code": "A", "last": 2}]) == [4]
        assert publisher.epoch == epoch
    assert await prices(store) == [0, 1, 1, 2]
    assert [bool(reason) for reason in links] == [True, False]


async def test_answer_of_the_very_first_batch_may_be_lost(store: RedisServer) -> None:
    async with door_to(store) as door, Publisher(door.url) as publisher:
        await publisher.connect()
        door.swallows = 2  # that there is no such script, and the answer itself

        assert await publisher.publish([{"code": "A", "last": 0}]) == [1]

    assert await prices(store) == [0]


async def test_batch_that_redis_reads_twice_is_taken_once(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quotepush.publisher._TIMEOUT_S", 0.5)
    links: list[str] = []
    async with Publisher(redis_server.url, on_link=links.append) as own:
        await own.publish([{"code": "A", "last": 0}])
        redis_server.pause()  # it accepts and reads nothing: attempts lie in its sockets
        waiting = asyncio.create_task(own.publish([{"code": "A", "last": 1}]))
        await wait_until(lambda: links)
        await asyncio.sleep(0.8)  # any number of attempts will do
        redis_server.resume()

        assert await waiting == [2]
        assert await own.publish([{"code": "A", "last": 2}]) == [3]
    assert await prices(redis_server) == [0, 1, 2]
    assert (links[0], links[-1]) == ("no answer within 0.5 s", "")


async def test_number_is_the_first_one_s_when_somebody_else_published_behind_a_lost_answer(store: RedisServer) -> None:
    links: list[str] = []
    async with (
        door_to(store) as door,
        Publisher(door.url, on_link=links.append) as unlucky,
        Publisher(store.url) as other,
    ):
        await unlucky.publish([{"code": "A", "last": 0}])
        door.swallows = 1
        waiting = asyncio.create_task(unlucky.publish([{"code": "A", "last": 1}]))
        await wait_until(lambda: links)
        seqs = await other.publish([{"code": "A", "last": 2}])

        assert await waiting + seqs == [2, 3]

        assert await unlucky.publish([{"code": "A", "last": 3}]) == [4]
    assert await prices(store) == [0, 1, 2, 3]


@pytest.mark.fault
async def test_redis_that_keeps_everything_is_killed_again_and_again_and_has_every_tick_once(tmp_path: Path) -> None:
    with running(RedisServer(tmp_path / "redis", aof=True)) as server:
        stop = asyncio.Event()
        seqs: dict[int, list[int]] = {}

        async def publish(who: int) -> None:
            async with Publisher(server.url) as own:
                seqs[who] = []
                while not stop.is_set():
                    seqs[who] += await own.publish([{"code": f"C{who}", "last": len(seqs[who])}, {"code": "BOTH"}])

        async with asyncio.TaskGroup() as group:
            for who in range(2):
                group.create_task(publish(who))
            for _ in range(5):
                published = sum(map(len, seqs.values()))
                await wait_until(lambda before=published: sum(map(len, seqs.values())) > before + 50, 30)
                server.kill()
                await asyncio.to_thread(server.start)
            stop.set()

        for who in range(2):
            assert seqs[who][::2] == list(range(1, len(seqs[who]) // 2 + 1))
            assert await prices(server, f"C{who}") == list(range(0, len(seqs[who]), 2))
        batches = await logged(server)
        assert {batch["epoch"] for batch in batches} == {batches[0]["epoch"]}
        numbers = [seq for batch in batches for seq, code, _ in batch["ticks"] if code == "BOTH"]
        assert numbers == list(range(1, len(numbers) + 1))
        assert sorted(seqs[0][1::2] + seqs[1][1::2]) == numbers


@pytest.mark.fault
async def test_redis_that_comes_back_empty_begins_a_new_epoch(store: RedisServer) -> None:
    links: list[str] = []
    async with Publisher(store.url, on_link=links.append) as publisher:
        assert await publisher.publish([{"code": "A", "last": 0}]) == [1]
        epoch = publisher.epoch
        store.kill()
        waiting = [asyncio.create_task(publisher.publish([{"code": "A", "last": n}])) for n in range(1, 4)]
        await wait_until(lambda: links)
        assert not any(task.done() for task in waiting)
        await asyncio.to_thread(store.start)

        assert await asyncio.gather(*waiting) == [[1], [2], [3]]

        assert publisher.epoch != epoch
    assert await prices(store) == [1, 2, 3]
    assert {batch["epoch"] for batch in await logged(store)} == {publisher.epoch}
    assert [bool(reason) for reason in links] == [True, False]


async def test_emptied_redis_begins_a_new_epoch(store: RedisServer) -> None:
    async with Publisher(store.url) as publisher, store.client() as client:
        await publisher.publish([{"code": "A", "last": 0}])
        epoch = publisher.epoch
        await client.flushall()

        assert await publisher.publish([{"code": "A", "last": 1}]) == [1]
        assert publisher.epoch != epoch


@pytest.mark.parametrize("lost", ["qp:epoch", "qp:seq"])
@pytest.mark.parametrize("is_new", [False, True])
async def test_a_key_that_is_lost_alone_begins_a_new_epoch(store: RedisServer, lost: str, is_new: bool) -> None:
    async with Publisher(store.url) as first, Publisher(store.url) as second, store.client() as client:
        for n in range(3):
            await first.publish([{"code": "A", "last": n}])
        await client.delete(lost)

        (seq,) = await (second if is_new else first).publish([{"code": "A", "last": 3}])

        assert seq == (4 if lost == "qp:epoch" else 1)
        *before, batch = await logged(store)
        assert batch["epoch"] == (second if is_new else first).epoch
        assert len(before) == (3 if lost == "qp:epoch" else 0)  # numbers that begin anew need a new log
        assert batch["epoch"] not in {one["epoch"] for one in before}


@pytest.mark.fault
async def test_redis_whose_data_went_back_begins_a_new_epoch_and_never_returns_to_one(tmp_path: Path) -> None:
    directory, kept = tmp_path / "redis", tmp_path / "kept"
    with running(RedisServer(directory, aof=True)) as server:

        async def go_back() -> None:
            server.kill()
            shutil.rmtree(directory / "appendonlydir")
            shutil.copytree(kept / "appendonlydir", directory / "appendonlydir")
            await asyncio.to_thread(server.start)

        async with Publisher(server.url) as publisher:
            for n in range(3):
                await publisher.publish([{"code": "A", "last": n}])
            shutil.copytree(directory, kept)
            epochs = [publisher.epoch]
            await publisher.publish([{"code": "A", "last": 3}])

            # Once: what was published since is lost, and its number is used again, in another epoch.
            await go_back()
            assert await publisher.publish([{"code": "A", "last": 4}]) == [4]
            epochs.append(publisher.epoch)

            # Twice, so that Redis has the first epoch again, which this publisher has left.
            await go_back()
            assert await publisher.publish([{"code": "A", "last": 5}]) == [4]
            epochs.append(publisher.epoch)
            assert await publisher.publish([{"code": "A", "last": 6}]) == [5]

        assert len(set(epochs)) == 3
        assert publisher.epoch == epochs[2]
        published = [(batch["epoch"], batch["ticks"][0][2]["last"]) for batch in await logged(server)]
        assert published == [(epochs[0], n) for n in range(3)] + [(epochs[2], n) for n in (5, 6)]


@pytest.mark.fault
async def test_tick_of_a_batch_that_redis_took_and_lost_again_before_it_answered_is_published_anew(
    tmp_path: Path,
) -> None:
    directory, kept = tmp_path / "redis", tmp_path / "kept"
    links: list[str] = []
    with running(RedisServer(directory, aof=True)) as server:
        async with door_to(server) as door, Publisher(door.url, on_link=links.append) as publisher:
            await publisher.publish([{"code": "A", "last": 0}])
            shutil.copytree(directory, kept)
            door.swallows = 10**6
            waiting = asyncio.create_task(publisher.publish([{"code": "A", "last": 1}]))
            await wait_until(lambda: links)
            server.kill()
            shutil.rmtree(directory / "appendonlydir")
            shutil.copytree(kept / "appendonlydir", directory / "appendonlydir")
            await asyncio.to_thread(server.start)
            door.swallows = 0

            assert await waiting == [2]
        assert await prices(server) == [0, 1]


@pytest.mark.fault
async def test_going_back_behind_a_batch_that_was_answered_only_the_second_time_is_noticed(tmp_path: Path) -> None:
    directory, kept = tmp_path / "redis", tmp_path / "kept"
    with running(RedisServer(directory, aof=True)) as server:
        async with door_to(server) as door, Publisher(door.url) as publisher:
            await publisher.publish([{"code": "A", "last": 0}])
            epoch = publisher.epoch
            shutil.copytree(directory, kept)
            door.swallows = 1
            assert await publisher.publish([{"code": "A", "last": 1}]) == [2]
            server.kill()
            shutil.rmtree(directory / "appendonlydir")
            shutil.copytree(kept / "appendonlydir", directory / "appendonlydir")
            await asyncio.to_thread(server.start)

            assert await publisher.publish([{"code": "A", "last": 2}]) == [2]
            assert publisher.epoch != epoch


async def make_read_only(client: Redis) -> None:
    await client.replicaof("127.0.0.1", "1")


async def make_writable(client: Redis) -> None:
    await client.replicaof("NO", "ONE")


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [
        (make_read_only, make_writable, "takes no writes"),
        (lambda c: c.config_set("maxmemory", 1), lambda c: c.config_set("maxmemory", 0), "memory"),
        (
            lambda c: c.config_set("min-replicas-to-write", 1),
            lambda c: c.config_set("min-replicas-to-write", 0),
            "NOREPLICAS",
        ),
    ],
    ids=["READONLY", "OOM", "NOREPLICAS"],
)
async def test_state_that_passes_is_waited_out(store: RedisServer, begin: Any, end: Any, words: str) -> None:
    links: list[str] = []
    async with Publisher(store.url, on_link=links.append) as publisher, store.client() as client:
        await publisher.publish([{"code": "A", "last": 0}])
        await begin(client)
        waiting = [asyncio.create_task(publisher.publish([{"code": "A", "last": n}])) for n in (1, 2)]
        await wait_until(lambda: links)
        assert await prices(store) == [0]
        await end(client)

        assert await asyncio.gather(*waiting) == [[2], [3]]
    assert await prices(store) == [0, 1, 2]
    assert words in links[0]
    assert links[1:] == [""]


async def test_script_that_holds_redis_up_is_waited_out(store: RedisServer) -> None:
    links: list[str] = []
    async with Publisher(store.url, on_link=links.append) as publisher, store.client() as client:
        await publisher.publish([{"code": "A", "last": 0}])
        await client.config_set("lua-time-limit", 10)
        async with store.client(socket_timeout=None) as other:
            endless = asyncio.create_task(other.eval("while true do end", 0))

            async def is_busy() -> bool:
                try:
                    return not await client.ping()
                except ResponseError as e:
                    return str(e).startswith("BUSY")

            await wait_until(is_busy)
            waiting = asyncio.create_task(publisher.publish([{"code": "A", "last": 1}]))
            await wait_until(lambda: links)
            await client.script_kill()
            await asyncio.gather(endless, return_exceptions=True)

        assert await waiting == [2]
    assert links[0].startswith("BUSY")


@pytest.mark.fault
async def test_redis_that_loads_its_data_is_waited_for(tmp_path: Path) -> None:
    slowly = ("--key-load-delay", "2000", "--loading-process-events-interval-bytes", "1024")
    links: list[str] = []
    with running(RedisServer(tmp_path / "redis")) as server:
        async with Publisher(server.url, on_link=links.append) as publisher:
            async with server.client() as client:
                await client.mset({f"key:{n}": "x" * 100 for n in range(500)})
                await publisher.publish([{"code": "A", "last": 0}])
                await client.save()
            server.kill()
            server.options = slowly
            start = asyncio.create_task(asyncio.to_thread(server.start))
            waiting = asyncio.create_task(publisher.publish([{"code": "A", "last": 1}]))
            await start

            assert await waiting == [2]
        assert await prices(server) == [0, 1]


@pytest.mark.parametrize(
    ("error", "is_passing"),
    [
        ("LOADING Redis is loading the dataset in memory", True),
        ("BUSY Redis is busy running a script.", True),
        ("READONLY You can't write against a read only replica.", True),
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", True),
        ("OOM command not allowed when used memory > 'maxmemory'.", True),
        ("MISCONF Redis is configured to save RDB snapshots", True),
        ("ERR Error running script (call to f_00): @user_script:9: @user_script: 9: -READONLY You can't", True),
        ("ERR max number of clients reached", True),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", False),
        ("NOAUTH Authentication required.", False),
        ("WRONGPASS invalid username-password pair or user is disabled.", False),
        ("NOPERM this user has no permissions", False),
        ("ERR unknown command 'EVALSHA'", False),
        ("ERR the name BUSY stands in an error", False),
    ],
)
async def test_error_is_waited_out_or_raised(error: str, is_passing: bool) -> None:
    links: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await reader.read(65_536):
            writer.write(f"-{error}\r\n".encode() if b"EVALSHA" in request else b"+OK\r\n" * request.count(b"SETINFO"))
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}/0"
    async with listening, Publisher(url, on_link=links.append) as publisher:
        publishing = asyncio.create_task(publisher.publish([{"code": "A", "last": 1}]))
        await wait_until(lambda: links or publishing.done())
        assert publishing.done() != is_passing
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError if is_passing else RedisUnavailable):
            await publishing
    assert bool(links) == is_passing


@pytest.mark.parametrize("key", ["qp:epoch", "qp:seq", "qp:log"])
async def test_key_of_another_kind_is_an_operator_s_error_and_changes_nothing(store: RedisServer, key: str) -> None:
    async with store.client() as client:
        await client.sadd(key, "x")  # type: ignore[misc]
        async with Publisher(store.url) as publisher:
            with pytest.raises(RedisUnavailable, match="WRONGTYPE"):
                await publisher.publish([{"code": "A", "last": 1}])

            assert await client.keys() == [key]
            await client.delete(key)
            assert await publisher.publish([{"code": "A", "last": 1}]) == [1]


@pytest.mark.parametrize("lacks", ["-publish", "-hset", "-xadd", "resetchannels", "-evalsha", "-@all"])
async def test_missing_permission_is_an_operator_s_error_and_changes_nothing(store: RedisServer, lacks: str) -> None:
    async with store.client() as client:
        await client.execute_command("ACL", "SETUSER", "feed", "on", ">hunter2", "~*", "&*", "+@all", lacks)
        async with Publisher(f"redis://feed:hunter2@127.0.0.1:{store.port}/0") as publisher:
            with pytest.raises(RedisUnavailable, match=r"(?i)permission|may not|no such user") as error:
                await publisher.publish([{"code": "A", "last": 1}])

        assert await client.keys() == []
        assert "hunter2" not in str(error.value)


async def test_rights_that_the_documents_name_are_enough(store: RedisServer) -> None:
    document = Path(__file__).parents[2].joinpath("docs", "protocol.md").read_text(encoding="utf-8")
    keys, channels, commands = re.findall(r"`(~qp:\S+)`, `(&qp:\S+)` and `(\+[^`]+)`", document)[0]
    async with store.client() as client:
        await client.execute_command(
            "ACL", "SETUSER", "feed", "on", ">hunter2", "resetchannels", keys, channels, *commands.split()
        )
        url = f"redis://feed:hunter2@127.0.0.1:{store.port}/0"
        async with Publisher(url) as publisher, Publisher(url, copies="quote.{code}") as with_copies:
            await publisher.connect()
            assert await publisher.publish([{"code": "A", "last": 1, "bid": None, "reset": True}]) == [1]
            await client.flushall()
            assert await publisher.publish([{"code": "A", "last": 1, "bid": None, "reset": True}]) == [1]
            with pytest.raises(RedisUnavailable, match="may not PUBLISH quote"):
                await with_copies.publish([{"code": "A", "last": 1}])


async def test_wrong_and_missing_passwords_are_operator_s_errors(store: RedisServer) -> None:
    async with store.client() as client:
        await client.config_set("requirepass", "hunter2")
    for user in ("", ":wrong@", "me:hunter2@"):
        url = f"redis://{user}127.0.0.1:{store.port}/0"
        async with Publisher(url) as publisher:
            with pytest.raises(RedisUnavailable) as error:
                await publisher.publish([{"code": "A", "last": 1}])
            with pytest.raises(RedisUnavailable):
                await publisher.connect()
        assert "hunter2" not in str(error.value)
        with BlockingPublisher(url) as blocking:
            with pytest.raises(RedisUnavailable):
                blocking.publish([{"code": "A", "last": 1}])
            with pytest.raises(RedisUnavailable):
                blocking.connect()
    async with Publisher(f"redis://:hunter2@127.0.0.1:{store.port}/0") as publisher:
        assert await publisher.publish([{"code": "A", "last": 1}]) == [1]


async def test_whom_redis_refuses_is_told_what_helps(redis_server: RedisServer) -> None:
    async with redis_server.client() as client:
        await client.execute_command("ACL", "SETUSER", "poor", "on", ">secret", "~*", "&*", "+ping", "+client")
        await client.config_set("requirepass", "hunter2")
    for user, help_for in (
        ("poor:secret@", "docs/operations.md has the rights that its user needs"),
        ("poor:wrong@", "its address has room for user and password"),
        ("", "its address has room for user and password"),
    ):
        async with Publisher(f"redis://{user}127.0.0.1:{redis_server.port}") as publisher:
            with pytest.raises(RedisUnavailable, match=help_for):
                await publisher.publish([{"code": "A", "last": 1}])
        async with Backend(f"redis://{user}127.0.0.1:{redis_server.port}") as backend:
            with pytest.raises(BackendUnavailable, match=help_for):
                await backend.conn_count()
    redis_server.kill()
    async with Publisher(redis_server.url) as publisher:
        with pytest.raises(RedisUnavailable, match="start it or set --redis"):
            await publisher.connect()


async def test_server_that_is_no_redis_is_an_operator_s_error() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await reader.read()
        writer.close()

    listening = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with listening, Publisher(f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}") as publisher:
        with pytest.raises(RedisUnavailable):
            await publisher.publish([{"code": "A", "last": 1}])


async def test_publisher_gives_up_when_it_was_told_to(redis_server: RedisServer) -> None:
    async with Publisher(redis_server.url, give_up_s=1.5) as publisher:
        publisher._give_up_s = 60.0  # what is to succeed may take its time on a busy machine
        await publisher.publish([{"code": "A", "last": 0}])
        publisher._give_up_s = 1.5
        redis_server.pause()
        with pytest.raises(RedisUnavailable, match=r"no answer within 1\.5 s"):
            await publisher.publish([{"code": "A", "last": 1}])
        redis_server.kill()
        with pytest.raises(RedisUnavailable):
            await publisher.publish([{"code": "A", "last": 2}])
        await asyncio.to_thread(redis_server.start)

        publisher._give_up_s = 60.0
        assert await publisher.publish([{"code": "A", "last": 3}]) == [1]


async def test_connect_tells_at_once_whether_redis_is_there(redis_server: RedisServer) -> None:
    async with Publisher(redis_server.url) as publisher:
        await publisher.connect()
        redis_server.kill()
        with pytest.raises(RedisUnavailable):
            await publisher.connect()


async def test_publisher_goes_on_after_a_cancelled_publish(store: RedisServer) -> None:
    async with Publisher(store.url) as publisher:
        await publisher.publish([{"code": "A", "last": 0}])
        for n in range(1, 20):
            store.pause()
            publishing = asyncio.create_task(publisher.publish([{"code": "CANCELLED", "last": n}]))
            queued = asyncio.create_task(publisher.publish([{"code": "CANCELLED", "last": n}]))
            for _ in range(n % 5):
                await asyncio.sleep(0)
            queued.cancel()
            publishing.cancel()
            await asyncio.wait([publishing, queued])
            assert publishing.cancelled() and queued.cancelled()
            store.resume()

            assert await publisher.publish([{"code": "A", "last": n}]) == [n + 1]
    assert await prices(store) == list(range(20))
    cancelled = await prices(store, "CANCELLED")
    assert cancelled == sorted(set(cancelled))  # each of them there or not, none twice, none late


async def test_publish_that_waits_for_redis_can_be_cancelled(redis_server: RedisServer) -> None:
    links: list[str] = []
    async with Publisher(redis_server.url, on_link=links.append) as publisher:
        redis_server.kill()
        waiting = asyncio.create_task(publisher.publish([{"code": "A", "last": 1}]))
        await wait_until(lambda: links)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.to_thread(redis_server.start)

        assert await publisher.publish([{"code": "A", "last": 2}]) == [1]
    assert [bool(reason) for reason in links] == [True, False]


# --- the blocking twin ------------------------------------------------------------------------------------------------


async def test_blocking_publisher_writes_what_the_other_writes(store: RedisServer) -> None:
    ticks = [{"code": "sh600519", "last": 1.5, "name": "茅台"}, {"code": "A", "tags": []}, {"code": "A", "last": None}]
    with BlockingPublisher(store.url, copies="quote.{code}") as blocking:
        async with Publisher(store.url) as other, hearing(store, "quote.A", "qp:feed") as pubsub:
            blocking.connect()
            assert blocking.publish([]) == []
            assert blocking.publish(ticks) == [1, 1, 2]
            assert await other.publish(ticks) == [2, 3, 4]
            assert [(await heard(pubsub))[0] for _ in range(4)] == ["quote.A", "quote.A", "qp:feed", "qp:feed"]
            assert blocking.epoch == other.epoch

    first, second = await logged(store)
    assert [tick[1:] for tick in first["ticks"]] == [tick[1:] for tick in second["ticks"]]
    assert await row(store, "600519.SH") == {"last": "1.5", "name": '"茅台"'}


async def test_blocking_publisher_publishes_once_behind_lost_answers(store: RedisServer) -> None:
    links: list[str] = []
    async with door_to(store) as door:
        with BlockingPublisher(door.url, on_link=links.append) as blocking:
            for n in range(3):
                assert await asyncio.to_thread(blocking.publish, [{"code": "A", "last": n}]) == [n + 1]
                door.swallows = 2
        door.swallows = 0
    assert await prices(store) == [0, 1, 2]
    assert [bool(reason) for reason in links] == [True, False] * 2


@pytest.mark.fault
@pytest.mark.parametrize("is_kept", [True, False])
def test_blocking_publisher_waits_for_a_redis_that_was_killed(tmp_path: Path, is_kept: bool) -> None:
    away = threading.Event()
    with (
        running(RedisServer(tmp_path / "redis", aof=is_kept)) as server,
        BlockingPublisher(server.url, on_link=lambda reason: away.set()) as blocking,
    ):
        assert blocking.publish([{"code": "A", "last": 0}]) == [1]
        epoch = blocking.epoch
        server.kill()
        starter = threading.Thread(target=lambda: away.wait(20) and server.start())
        starter.start()

        assert blocking.publish([{"code": "A", "last": 1}]) == [2 if is_kept else 1]

        starter.join()
        assert (blocking.epoch == epoch) == is_kept
        assert asyncio.run(prices(server)) == ([0, 1] if is_kept else [1])


def test_blocking_publisher_gives_up_when_it_was_told_to(redis_server: RedisServer) -> None:
    with BlockingPublisher(redis_server.url, give_up_s=1.5) as blocking:
        blocking._give_up_s = 60.0  # what is to succeed may take its time on a busy machine
        blocking.publish([{"code": "A", "last": 0}])
        blocking._give_up_s = 1.5
        redis_server.pause()
        with pytest.raises(RedisUnavailable):
            blocking.publish([{"code": "A", "last": 1}])
        redis_server.kill()
        with pytest.raises(RedisUnavailable, match="refused"):
            blocking.publish([{"code": "A", "last": 1}])
        with pytest.raises(RedisUnavailable):
            blocking.connect()
        redis_server.start()

        blocking._give_up_s = 60.0
        assert blocking.publish([{"code": "A", "last": 2}]) == [1]
