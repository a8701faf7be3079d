"""What a plan looks like: for people, and as JSON."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

from capacity.costs import Costs
from capacity.measured import compared
from capacity.plan import Plan
from capacity.stores import FeedStore, RegistryStore

__all__ = ["as_json", "as_text", "comparison_table", "costs_table"]

_LIMITS_SHOWN = 5


def as_json(plan: Plan) -> str:
    """All figures; what no number of machines could do is null."""
    return json.dumps(_plain(dataclasses.asdict(plan)), indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isinf(value) else round(value, 4)
    return value


def as_text(plan: Plan, title: str = "") -> str:
    """A page of it."""
    return "\n".join([*_head(plan, title), *_machines(plan), *_feed(plan), *_registry(plan), *_limits(plan)]) + "\n"


def _line(label: str, value: str, note: str = "") -> str:
    return f"{label:<32}{value:>12}{'   ' + note if note else ''}".rstrip()


def _number(value: float) -> str:
    if math.isinf(value):
        return "too many"
    if value >= 10 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.005 else "0"


def _head(plan: Plan, title: str) -> Iterator[str]:
    work = plan.work
    if title:
        yield title
    rate = f", at most {work.max_rate:g} rows/s and code" if work.max_rate else ""
    yield (
        f"{work.viewers:,} viewers with {work.each:g} of {work.codes:,} codes each{rate}; "
        f"{work.ticks_per_s:,.0f} ticks/s of {work.tick_bytes:g} bytes"
    )
    yield ""


def _machines(plan: Plan) -> Iterator[str]:
    work, each = plan.work, plan.each
    kind = f"of {work.cores} cores, {work.memory_gib:g} GiB, {work.nic_gbit:g} Gbit/s"
    spare = f"; {plan.needed:,} needed" if plan.machines > plan.needed else ""
    clusters = f", in {work.clusters} clusters" if work.clusters > 1 else ""
    yield _line("machines", _number(plan.machines), kind + spare + clusters)
    yield ""
    yield "each machine" + (" when the spare ones are lost" if work.spare else "")
    yield _line("  connections", _number(each.viewers))
    yield _line("  codes watched", _number(each.demand), f"of {work.codes:,}")
    yield _line(
        "  ticks/s in main", _number(each.ticks), f"{_number(each.wanted_ticks)} of codes that are watched here"
    )
    yield _line("  rows/s out", _number(each.rows), f"in {_number(each.writes)} writes/s")
    parts = f"main {each.main_cores:.2f}, workers {each.worker_cores:.2f}, handshakes {each.handshake_cores:.2f}"
    yield _line("  cores in use", f"{each.cores:.2f}", f"of {work.cores}: {parts}")
    yield _line("  ms from flush to flush", f"{each.flush_ms:.1f}", "what a row may wait for company")
    yield _line("  memory, MiB", _number(each.memory_mib))
    yield _line("  network out, Mbit/s", _number(each.out_mbit), f"in {_number(each.in_mbit)}")
    yield _line("  send_to_all, s", f"{each.send_to_all_s:.2f}", "until the last of its connections has it")
    yield ""


def _feed(plan: Plan) -> Iterator[str]:
    feed: FeedStore = plan.feed
    where = " of a cluster" if plan.work.clusters > 1 else ""
    kind = f"batches of {plan.work.batch:g}" if plan.work.batch else "plain PUBLISH"
    yield f"Redis of the feed{where}"
    yield _line("  messages/s in", _number(feed.messages), f"{kind}; {_number(feed.deliveries)} deliveries/s")
    alone = f"of 1; without replicas {feed.alone_cores:.2f}" if feed.replicas else "of 1"
    yield _line("  cores in use", f"{feed.cores:.2f}", alone)
    yield _line("  network out, Mbit/s", _number(feed.out_mbit))
    yield _line("  replicas", _number(feed.replicas), "" if feed.replicas else "it carries this alone")
    yield ""


def _registry(plan: Plan) -> Iterator[str]:
    registry: RegistryStore = plan.registry
    where = " of a cluster" if plan.work.clusters > 1 else ""
    come, compare, renew, send = registry.cores_of
    yield f"Redis of the registry{where}"
    yield _line("  commands/s: come and go", _number(registry.come_and_go), f"{come:.2f} cores")
    yield _line(
        "  comparing", _number(registry.compare),
        f"{compare:.2f} cores; reads {_number(registry.compared_members)} members/s",
    )  # fmt: skip
    yield _line("  leases and messages", _number(registry.renew + registry.send), f"{renew + send:.2f} cores")
    yield _line("  memory, MiB", _number(registry.memory_mib), f"largest set: {_number(registry.largest_set)} members")
    yield _line("  network, Mbit/s", _number(registry.mbit))
    kind = "Redis Cluster" if registry.shards > 1 else "Sentinel keeps it available"
    yield _line("  masters", _number(registry.shards), f"{registry.cores:.2f} cores in all; {kind}")
    yield ""


def _limits(plan: Plan) -> Iterator[str]:
    yield "first to end (of what may be in use)"
    for limit in plan.limits[:_LIMITS_SHOWN]:
        yield _line(f"  {limit.name}", f"{limit.used * 100:,.0f} %", limit.remedy)


def costs_table(costs: Costs) -> str:
    """Every constant, its unit and its source, in Markdown."""
    lines = ["| constant | value | what | source |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(costs):
        about = field.metadata
        value = f"{getattr(costs, field.name):g} {about['unit']}".strip()
        lines.append(f"| `{field.name}` | {value} | {about['meaning']} | {about['source']} |")
    return "\n".join(lines) + "\n"


def comparison_table(costs: Costs) -> str:
    """The simulation beside what was measured, in Markdown."""
    lines = ["| load | cores, measured | cores, simulated | ratio |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {found.load} | {found.measured:.2f} | {found.simulated:.2f} | {found.ratio:.2f} |"
        for found in compared(costs)
    ]
    return "\n".join(lines) + "\n"
