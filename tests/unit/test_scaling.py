"""The simulation of docs/scaling.md: its closed forms against dice, its Redis commands against the server's own."""

import dataclasses
import heapq
import json
import math
import random
import re
import shlex
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from redis.asyncio import Redis

from quotepush.cluster.registry import RegistryMirror, registry_client
from quotepush.cluster.sessions import SessionMirror
from tests.support.examples import blocks_of
from tests.support.redis_server import RedisServer
from tests.unit.test_comparing import Counting

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # the package of the simulation stands beside its program

import scaling  # noqa: E402
from capacity.costs import Costs  # noqa: E402
from capacity.document import refreshed  # noqa: E402
from capacity.machine import flush_of  # noqa: E402
from capacity.measured import compared  # noqa: E402
from capacity.plan import Plan, plan  # noqa: E402
from capacity.popularity import Market, chances_of, limited  # noqa: E402
from capacity.stores import commands_of_batch, commands_of_changes, compared_in_round, feed_store  # noqa: E402
from capacity.workload import SCENARIOS, Workload  # noqa: E402

PERFORMANCE = TOOLS.parent / "docs" / "performance.md"
SCALING = TOOLS.parent / "docs" / "scaling.md"
COSTS = Costs()


def drawn(dice: random.Random, weights: list[float], count: int) -> list[int]:
    """``count`` different items, one after the other, each by its weight among those that are left."""
    return heapq.nsmallest(count, range(len(weights)), key=lambda i: dice.expovariate(weights[i]))


def lot(viewers: int, codes: int, each: int, zipf: float, seed: int = 7) -> list[list[int]]:
    """What each of so many viewers watches."""
    dice = random.Random(seed)
    weights = [(i + 1) ** -zipf for i in range(codes)]
    return [drawn(dice, weights, each) for _ in range(viewers)]


# --- who watches what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipf", [0.0, 0.7, 1.0, 1.3])
def test_chance_of_a_code_is_how_often_viewers_draw_it(zipf: float) -> None:
    viewers, codes, each = 3_000, 100, 10
    seen = Counter(code for some in lot(viewers, codes, each, zipf) for code in some)
    chances = chances_of([(1, (i + 1) ** -zipf) for i in range(codes)], each)
    assert sum(chances) == pytest.approx(each)
    for code, chance in enumerate(chances):
        assert seen[code] / viewers == pytest.approx(chance, abs=0.03), code


@pytest.mark.parametrize(("viewers", "zipf"), [(10, 1.0), (100, 1.0), (1_000, 1.0), (100, 0.0), (100, 1.5)])
def test_demand_is_how_many_different_codes_so_many_viewers_draw(viewers: int, zipf: float) -> None:
    codes, each, groups = 500, 10, 12
    drawn_by = [len({c for some in lot(viewers, codes, each, zipf, seed) for c in some}) for seed in range(groups)]
    market = Market(codes, each, zipf, 0.0, 0.0)
    assert sum(drawn_by) / groups == pytest.approx(market.demand(viewers), rel=0.04)


def test_rows_are_ticks_times_watchers() -> None:
    viewers, codes, each, ticks_per_s = 2_000, 300, 10, 900.0
    rates = [(i + 1) ** -0.8 for i in range(codes)]
    rates = [rate / sum(rates) * ticks_per_s for rate in rates]
    rows = sum(rates[code] for some in lot(viewers, codes, each, 1.0) for code in some)
    market = Market(codes, each, 1.0, 0.8, ticks_per_s)
    assert rows / viewers == pytest.approx(market.rows_per_viewer(), rel=0.03)
    assert market.wanted(1e9) == pytest.approx(ticks_per_s)


def test_a_market_of_many_codes_is_summed_up_as_if_each_stood_alone() -> None:
    codes, each = 20_000, 20
    alone = chances_of([(1, 1 / (i + 1)) for i in range(codes)], each)
    market = Market(codes, each, 1.0, 0.0, 1.0)
    assert len(market.codes) < 1_000
    assert market.demand(500) == pytest.approx(sum(1 - (1 - chance) ** 500 for chance in alone), rel=0.005)


def test_audiences_are_who_watches_what_somebody_watches() -> None:
    viewers, among, codes, each = 2_000, 50, 500, 10
    watched = lot(viewers, codes, each, 1.0)
    seen = Counter(code for some in watched for code in some)
    held = {code for some in watched[:among] for code in some}
    found = list(Market(codes, each, 1.0, 0.0, 1.0).audiences(viewers, among))
    assert sum(some.codes for some in found) == pytest.approx(len(held), rel=0.08)
    assert sum(some.codes * some.own for some in found) == pytest.approx(among * each)
    members = sum(seen[code] for code in held)
    assert sum(some.codes * some.watchers for some in found) == pytest.approx(members, rel=0.05)


@pytest.mark.parametrize(("rate", "max_rate"), [(0.5, 2.0), (2.0, 2.0), (20.0, 2.0), (3.0, 10.0)])
def test_max_rate_lets_through_what_a_run_of_ticks_says(rate: float, max_rate: float) -> None:
    dice = random.Random(3)
    now, free_at, rows, held = 0.0, 0.0, 0, False
    while now < 20_000 / rate:
        now += dice.expovariate(rate)
        if held and now >= free_at:  # the newest row that waited went out when its time had come
            rows, free_at, held = rows + 1, free_at + 1 / max_rate, False
        if now >= free_at:
            rows, free_at = rows + 1, now + 1 / max_rate
        else:
            held = True
    assert rows / now == pytest.approx(limited(rate, max_rate), rel=0.03)
    assert limited(rate, 0) == rate


# --- a worker ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clients", "rows_each"), [(500, 50.0), (500, 400.0), (5_000, 10.0), (1_000, 3_000.0)])
def test_flushes_settle_where_a_run_of_them_does(clients: int, rows_each: float) -> None:
    frames, size = 1_000.0, 170.0
    dice = random.Random(5)
    now, flushes, writes, busy = 0.0, 0, 0, 0.0
    period = 1 / frames
    while flushes < 300:
        waiting = 0
        for _ in range(clients):
            waiting += dice.random() >= math.exp(-rows_each * period)
        rows = clients * rows_each * period
        took = COSTS.flush_us + waiting * (COSTS.write_us + COSTS.write_kb_us * size * rows / max(1, waiting) / 1000)
        took = (took + rows * COSTS.row_us) / 1e6
        period = max(1 / frames, took + min(0.005, 3 * took))
        now, flushes, writes, busy = now + period, flushes + 1, writes + waiting, busy + took
    found = flush_of(COSTS, clients, rows_each, frames, size, tls=False)
    assert found.cores == pytest.approx(busy / now, rel=0.05)
    assert found.writes / found.period_s == pytest.approx(writes / now, rel=0.05)


def test_simulation_is_near_what_was_measured() -> None:
    found = {load.load: load.ratio for load in compared(COSTS)}
    alone = [ratio for name, ratio in found.items() if "workers" not in name]
    assert all(0.7 < ratio < 1.5 for ratio in alone), found
    assert math.exp(sum(map(math.log, alone)) / len(alone)) == pytest.approx(1, abs=0.1)
    assert all(0.7 < ratio < 1.8 for ratio in found.values()), found


# --- Redis ------------------------------------------------------------------------------------------------------------


async def commands(server: RedisServer) -> int:
    """How many commands Redis has carried out since its figures were last reset, but for asking that."""
    async with server.client() as redis:
        stats = await redis.info("commandstats")
        await redis.config_resetstat()
    ours = ("info", "config", "client", "hello", "ping", "select")
    return sum(one["calls"] for name, one in stats.items() if not re.match(f"cmdstat_({'|'.join(ours)})", name))


@pytest.fixture
async def registry(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = registry_client(redis_server.url)
    yield client
    await client.aclose()


async def test_registry_takes_the_commands_that_the_simulation_says(redis_server: RedisServer, registry: Redis) -> None:
    come, codes, each = 200, 300, 10
    work = Workload(codes=codes, each=each, watch_zipf=1.0, users=0)
    market = Market(codes, each, 1.0, 0.0, 1.0)
    mirror = RegistryMirror(registry, prefix="qp:", node="n1", life="0.1")
    await mirror._begin()
    watched = [[f"C{code}" for code in some] for some in lot(come, codes, each, 1.0)]
    for fd, some in enumerate(watched, 1):
        mirror.open(f"n1.0.{fd}", some)
    await commands(redis_server)
    await mirror._flush()
    coming, going = commands_of_batch(work, market, come)
    # A worker that has held no code yet renews the set of each, once.
    assert await commands(redis_server) == pytest.approx(coming.commands + market.demand(come), rel=0.06)
    await mirror._check()
    assert await commands(redis_server) == pytest.approx(compared_in_round(work, market, come, come).commands, rel=0.06)
    for fd in range(1, come + 1):
        mirror.close(f"n1.0.{fd}")
    await mirror._flush()
    # The last connections leave: the set of each code is asked twice whether somebody is left.
    assert await commands(redis_server) == pytest.approx(going.commands + 2 * market.demand(come), rel=0.06)


async def test_comparing_large_sets_takes_what_the_simulation_says(redis_server: RedisServer, registry: Redis) -> None:
    clients, codes, each, watchers, rounds = 100, 250, 10, 2_000, 6
    counting = Counting(registry)
    mirror = RegistryMirror(counting, prefix="qp:", node="n1", life="0.1")  # type: ignore[arg-type]
    await mirror._begin()
    for fd, some in enumerate(lot(clients, codes, each, 0.0), 1):
        mirror.open(f"n1.0.{fd}", [f"C{code}" for code in some])
    await mirror._flush()
    others = [f"n2.0.{n}" for n in range(watchers)]
    for code in range(codes):
        await registry.sadd(f"qp:code:C{code}", *others)
    for _ in range(3):  # in the first ones it learns that they are large
        await mirror._check()
    await commands(redis_server)
    counting.members = 0
    for _ in range(rounds):
        await mirror._check()
    market, work = Market(codes, each, 0.0, 0.0, 1.0), Workload(codes=codes, each=each, users=0)
    said = compared_in_round(work, market, watchers * codes / each, clients)
    assert counting.members / rounds == pytest.approx(said.members, rel=0.15)
    assert await commands(redis_server) / rounds == pytest.approx(said.commands, rel=0.15)
    # A hundred times as many others, and it takes no more.
    crowd = compared_in_round(work, market, 100 * watchers * codes / each, clients)
    assert crowd.members <= said.members * 1.01 and crowd.commands <= said.commands * 1.01


async def test_changed_codes_take_the_commands_that_the_simulation_says(
    redis_server: RedisServer, registry: Redis
) -> None:
    clients, codes, each = 300, 300, 10
    mirror = RegistryMirror(registry, prefix="qp:", node="n1", life="0.1")
    await mirror._begin()
    # One more watches every code, so that none is without anybody afterwards.
    mirror.open("n1.0.1000", [f"C{code}" for code in range(codes)])
    watched = [{f"C{code}" for code in some[1:]} for some in lot(clients, codes, each + 1, 1.0)]
    for fd, held in enumerate(watched, 1):
        mirror.open(f"n1.0.{fd}", held)
    await mirror._flush()
    for fd, (held, some) in enumerate(zip(watched, lot(clients, codes, each + 1, 1.0), strict=True), 1):
        held.remove(f"C{some[-1]}")
        held.add(f"C{some[0]}")
        mirror.touch(f"n1.0.{fd}")
    await commands(redis_server)
    await mirror._flush()
    market = Market(codes, each, 1.0, 0.0, 1.0)
    said = commands_of_changes(Workload(codes=codes, each=each), market, clients).commands
    assert await commands(redis_server) == pytest.approx(said, rel=0.15)


async def test_users_take_the_commands_that_the_simulation_says(redis_server: RedisServer, registry: Redis) -> None:
    come = 100
    market = Market(100, 10, 1.0, 0.0, 1.0)
    without = commands_of_batch(Workload(users=0), market, come)
    with_users = commands_of_batch(Workload(users=1), market, come)
    mirror = SessionMirror(registry, prefix="qp:", node="n1", life="0.1", describe=lambda fd: b"{}")
    await mirror._begin()
    for fd in range(1, come + 1):
        mirror.open(f"n1.0.{fd}", [f"u:{fd}"])
    await commands(redis_server)
    await mirror._flush()
    assert await commands(redis_server) == pytest.approx(with_users[0].commands - without[0].commands, rel=0.06)
    for fd in range(1, come + 1):
        mirror.close(f"n1.0.{fd}")
    await mirror._flush()
    assert await commands(redis_server) == pytest.approx(with_users[1].commands - without[1].commands, rel=0.06)


def test_replicas_come_when_one_redis_cannot_speak_to_all_machines() -> None:
    work = Workload(tick_bytes=200, batch=100)
    few, many = feed_store(work, COSTS, 50_000, 3), feed_store(work, COSTS, 50_000, 500)
    assert few.replicas == 0 and few.cores == few.alone_cores
    assert many.replicas > 1 and many.alone_cores > work.headroom
    assert many.cores <= work.headroom and many.out_mbit <= work.nic_gbit * 1000 * work.headroom
    assert feed_store(work, COSTS, 1_000_000, 3).replicas == math.inf  # publishing alone is too much


# --- plans ------------------------------------------------------------------------------------------------------------


def used(found: Plan) -> dict[str, float]:
    return {limit.name: limit.used for limit in found.limits}


@pytest.mark.parametrize("name", SCENARIOS)
def test_plan_needs_nothing_that_is_not_there(name: str) -> None:
    found = plan(SCENARIOS[name][1], COSTS)
    assert all(limit.used <= 1 for limit in found.limits), found.limits
    assert [limit.used for limit in found.limits] == sorted(used(found).values(), reverse=True)
    if found.needed > found.work.clusters:
        fewer = dataclasses.replace(found.work, machines=found.machines - found.work.clusters)
        assert max(used(plan(fewer, COSTS)).values()) > 1


def test_scenarios_are_of_the_size_that_they_are_called() -> None:
    machines = {name: plan(work, COSTS).machines for name, (_, work) in SCENARIOS.items()}
    assert machines["one"] == 1 and machines["three"] == 3
    assert 25 <= machines["thirty"] <= 35 and 900 <= machines["thousand"] <= 1_100


def test_more_viewers_never_take_less() -> None:
    before = plan(Workload(viewers=1_000), COSTS)
    for viewers in (5_000, 20_000, 100_000, 500_000):
        found = plan(Workload(viewers=viewers), COSTS)
        assert found.machines >= before.machines
        assert found.registry.cores > before.registry.cores and found.registry.memory_mib > before.registry.memory_mib
        before = found


def test_a_feed_that_main_cannot_take_is_said_and_not_answered_with_machines() -> None:
    market = Workload(ticks_per_s=400_000, max_rate=1)
    found, more = plan(market, COSTS), plan(dataclasses.replace(market, machines=1_000), COSTS)
    assert found.machines < 10
    assert used(found)["main's core"] > 1 and used(more)["main's core"] > 1


def test_demand_spares_ticks_that_nobody_watches() -> None:
    small = Workload(viewers=50, codes=50_000, ticks_per_s=50_000)
    assert plan(dataclasses.replace(small, demand=True), COSTS).feed.messages < plan(small, COSTS).feed.messages / 5


def test_spare_machines_are_more_than_it_takes() -> None:
    work = Workload(viewers=100_000)
    without, with_one = plan(work, COSTS), plan(dataclasses.replace(work, spare=1), COSTS)
    assert (with_one.machines, with_one.needed) == (without.machines + 1, without.machines)
    assert with_one.each == without.each


# --- constants --------------------------------------------------------------------------------------------------------


def test_each_constant_has_a_source_and_the_steps_are_those_of_the_document() -> None:
    document = PERFORMANCE.read_text(encoding="utf-8")
    steps = 0
    for field in dataclasses.fields(Costs):
        assert field.metadata["source"] and field.metadata["meaning"], field.name
        if "#where-the-time-goes" in field.metadata["source"] and field.name not in ("row_us", "write_kb_us"):
            steps += 1
            assert f"{field.default:g}" in document or field.name == "rest_factor", field.name
    assert steps >= 8
    assert "board_kib" in Costs.assumptions()


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_outputs_in_the_document_are_what_is_printed() -> None:
    text = SCALING.read_text(encoding="utf-8")
    asked: list[str] = []

    def printed(arguments: Sequence[str]) -> str:
        asked.append(" ".join(arguments))
        return scaling.printed(arguments)

    assert refreshed(text, printed) == text, "run: python tools/scaling.py --refresh docs/scaling.md"
    assert set(asked) >= {f"--scenario {name}" for name in SCENARIOS} | {"--explain check", "--explain costs"}


def test_the_price_of_comparing_is_what_the_document_says() -> None:
    work = SCENARIOS["thirty"][1]
    price, seldom = (
        plan(dataclasses.replace(work, registry_check_s=each_s), COSTS).registry.cores_of[1] for each_s in (5, 60)
    )
    said = f"take {price:.1f} cores of Redis, and {seldom:.1f} with 60 s"
    assert said in " ".join(SCALING.read_text(encoding="utf-8").split())


def test_every_command_in_the_document_runs() -> None:
    lines = [line for block in blocks_of(SCALING) if block.language == "sh" for line in block.text.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        assert line.startswith("python tools/scaling.py "), line
        assert run(*shlex.split(line)[2:]).exit_code == 0, line


def test_refreshing_changes_outputs_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "some.md"
    around = "before\n\n```sh\npython tools/scaling.py --scenario one\n```\n\n```text\n{}```\n\n| a | table |\n"
    document.write_text(around.format("old\n"), encoding="utf-8")
    assert run("--refresh", str(document)).output == ""
    assert document.read_text(encoding="utf-8") == around.format(run("--scenario", "one").output)


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(scaling.main, arguments)


def test_json_has_every_figure() -> None:
    found = json.loads(run("--viewers", "20000", "--max-rate", "3", "--json").output)
    assert found["work"]["viewers"] == 20_000 and found["work"]["max_rate"] == 3
    assert found["each"]["rows"] > 0 and found["registry"]["memory_mib"] > 0
    assert {limit["name"] for limit in found["limits"]} >= {"main's core", "network of the feed's Redis"}


def test_a_scenario_can_be_changed_and_a_constant_too() -> None:
    plain, faster = run("--scenario", "three", "--json"), run("--scenario", "three", "--cost", "write_us=1", "--json")
    fewer = run("--scenario", "three", "--viewers", "5000", "--json")
    cores = [json.loads(result.output)["each"]["worker_cores"] for result in (plain, faster, fewer)]
    assert cores[1] < cores[0] and cores[2] < cores[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cost", "no_such=1"),
        ("--cost", "write_us=much"),
        ("--viewers", "0"),
        ("--ticks-per-s", "-1"),
        ("--cores", "x"),
    ],
)
def test_a_wrong_number_is_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Error" in result.output and "Traceback" not in result.output
