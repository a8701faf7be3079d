"""The commands for backends, as processes: what they print, and their exit codes."""

import asyncio
import json

import pytest

from quotepush.cluster.commands import Reply
from tests.support.command import Outcome, run_quotepush
from tests.support.redis_server import RedisServer
from tests.support.stand_in_node import stand_in


async def test_each_command_says_what_became_of_it(redis_server: RedisServer) -> None:
    few = asyncio.Semaphore(3)

    async def run(*words: str) -> Outcome:
        async with few:
            return await run_quotepush(*words, "--redis", redis_server.url, "--timeout", "20")

    async with stand_in(redis_server) as node:
        fd = await node.connect(1, user="ann", groups=["vip"], codes=["A"])
        lone = await node.connect(2)
        node.answer = lambda command: (
            node.served(command) if "session" not in command.op else Reply(command.id, "n1", 1, [fd], {"x": 1})
        )
        outcomes = dict(
            zip(
                _CALLS,
                await asyncio.gather(*(run(*words.replace("FD", fd).split(" ")) for words in _CALLS)),
                strict=True,
            )
        )
        for words, wanted in _CALLS.items():
            outcome = outcomes[words]
            assert (outcome.status, outcome.stderr) == (0, ""), words
            assert sorted(outcome.stdout.splitlines()) == sorted(
                line.replace("FD", fd).replace("LONE", lone) for line in wanted
            ), words
        said = {(command.op, json.dumps(command.data)) for command in node.heard}
        assert {("send", '{"x": 1}'), ("send", '"hello"'), ("send", '"5"'), ("set_session", '{"y": 2}')} <= said

        outcome = await run("stats")
        assert outcome.stdout.splitlines()[1] == "1 node, 2 connections, 1 code watched"
        assert json.loads((await run("stats", "--json")).stdout)["conns"] == {"n1": 2}
        outcome = await run("send", "--user", "eve", "hello")
        assert (outcome.status, outcome.stdout) == (3, "delivered to 0 connections\n")
        outcome = await run("send", "--user", "eve", "--kept", "hello")
        assert (outcome.status, outcome.stdout) == (0, "delivered to 0 connections; 1 kept for later\n")
        node.answer = lambda command: Reply(command.id, "n1")
        outcome = await run("session", "get", "n1.0.77")
        assert (outcome.status, outcome.stderr) == (3, "quotepush: there is no connection 'n1.0.77'\n")
        node.answer = lambda command: None
        outcome = await run_quotepush(
            "kick", "--user", "ann", "--redis", redis_server.url, "--timeout", "3", "--prefix", "qp:"
        )
        assert (outcome.status, outcome.stdout) == (1, "closed 0 connections\n")
        assert "no answer in time from n1" in outcome.stderr


async def test_jobs_are_made_listed_and_cancelled(redis_server: RedisServer) -> None:
    async def run(*words: str) -> Outcome:
        return await run_quotepush(*words, "--redis", redis_server.url, "--timeout", "20", env={"TZ": "Asia/Shanghai"})

    outcome = await run("jobs")
    assert (outcome.status, outcome.stdout) == (0, "")
    at = "2099-07-25T09:30"
    far = await run("send", "--user", "ann", "--at", f"{at}+08:00", '{"title":"Open","n":1}', "--json")
    job = json.loads(far.stdout)
    assert (far.status, job["to"], job["data"], job["every"]) == (
        0,
        {"users": ["ann"]},
        {"title": "Open", "n": 1},
        None,
    )
    again = await run("send", "--group", "vip", "--every", "30m", "--count", "3", "--until", "2098-01-01", "x" * 99)
    soon = await run("send", "--all", "--at", "+90s", "--kept", "--text", "\x1b[31mhi")
    assert again.status == soon.status == 0

    lines = (await run("jobs")).stdout.splitlines()
    assert lines == [soon.stdout.strip(), again.stdout.strip(), lines[2]], "the next ones first"
    assert lines[2] == f'{job["id"]}  {at.replace("T", " ")}:00+08:00  user ann  {{"title":"Open","n":1}}'
    assert lines[0].endswith("  all  \N{REPLACEMENT CHARACTER}[31mhi")
    assert f"  every 1800 s  3 left  until 2098-01-01 00:00:00+08:00  group vip  {'x' * 59}…" in lines[1]
    listed = [json.loads(line) for line in (await run("jobs", "--json")).stdout.splitlines()]
    assert listed[2] == job and [one["delivery"] for one in listed] == ["kept", "now", "now"]

    outcome = await run("jobs", "cancel", job["id"], "nosuch")
    assert (outcome.status, outcome.stdout) == (0, f"{job['id']} is cancelled\n")
    assert outcome.stderr == "quotepush: there is no job 'nosuch'\n"
    outcome = await run("jobs", "cancel", job["id"], "--json")
    assert (outcome.status, json.loads(outcome.stdout)) == (3, {"job": job["id"], "cancelled": False})
    assert len((await run("jobs")).stdout.splitlines()) == 2


_CALLS = {
    'send --user ann {"x":1}': ["delivered to 2 connections (n1: 2)"],
    "send --conn FD hello": ["delivered to 1 connection (n1: 1)"],
    "send --group vip --text 5": ["delivered to 2 connections (n1: 2)"],
    "send --all --json null": ['{"delivered":2,"nodes":{"n1":2},"missing":[],"kept":0}'],
    "kick --conn FD": ["closed 1 connection (n1: 1)"],
    "kick --user ann --json": ['{"count":2,"nodes":{"n1":2},"missing":[]}'],
    "conns": ["FD  user ann  groups vip", "LONE  user -  groups -"],
    "conns --user ann": ["FD"],
    "conns --code a --count": ["1"],
    "conns --count --json": ['{"count":2}'],
    "conns --group vip --json": ['{"conn":"FD","user":"ann","opened":5,"groups":["vip"],"data":{"n":1}}'],
    "users": ["ann  1 connection"],
    "groups": ["vip  1 connection"],
    "groups --json": ['{"group":"vip","conns":1}'],
    "groups join FD vip": ["FD is in vip"],
    "groups leave FD vip": ["FD is not in vip"],
    "groups dissolve vip": ["vip has lost 2 connections (n1: 2)"],
    "session get FD": ['{"x":1}'],
    'session set FD {"y":2}': ['{"x":1}'],
    'session update FD {"y":null}': ['{"x":1}'],
    "session bind FD ann": ["FD is ann's"],
    "session unbind FD --json": ['{"conn":"FD","user":null}'],
}


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["send", "x"], 2, "give one of --user"),
        (["send", "--user", "a", "--all", "x"], 2, "give one of --user"),
        (["send", "--user", "", "x"], 2, "1 to 128 characters"),
        (["send", "--user", "a", "--base64", "x"], 2, "no base64"),
        (["send", "--all", "x", "--at", "soon"], 2, "--at: 'soon' must be like"),
        (["send", "--all", "x", "--at", "+soon"], 2, "--at: 'soon' must be like"),
        (["send", "--all", "x", "--every", "0"], 2, "at least 1"),
        (["send", "--all", "x", "--count", "2"], 2, "belong to at or every"),
        (["send", "--all", "x", "--every", "5", "--until", "+1h"], 2, "as a date and time"),
        (["jobs", "--redis", "redis://:secret@127.0.0.1:1"], 1, "cannot use Redis"),
        (["kick"], 2, "either --user or --conn"),
        (["kick", "--user", "a", "--code", "1006"], 2, "code must be"),
        (["conns", "--user", "a", "--code", "b"], 2, "at most one"),
        (["session", "set", "n1.0.1", "[]"], 2, "must be a JSON object"),
        (["session", "set", "n1.0.1", "{"], 2, "is no JSON"),
        (["send", "--all", "x", "--redis", "http://x"], 2, "must begin with redis://"),
        (["send", "--all", "x", "--redis", "redis://:secret@127.0.0.1:1"], 1, "cannot use Redis at 127.0.0.1:1"),
        (["stats", "--redis", "redis://:secret@127.0.0.1:1"], 1, "cannot use Redis"),
        (["events", "--redis", "redis://:secret@127.0.0.1:1", "--timeout", "0.2"], 1, "cannot hear events"),
    ],
)
async def test_what_is_wrong_is_said_in_one_line(words: list[str], status: int, said: str) -> None:
    outcome = await run_quotepush(*words)
    assert outcome.status == status
    assert said in outcome.stderr and outcome.stderr.count("\n") == 1
    assert "secret" not in outcome.stderr and outcome.stdout == ""
