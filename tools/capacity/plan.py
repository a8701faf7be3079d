"""How many machines it takes, and what is first to end.

Law: a plan never needs more of anything than the workload allows, or it says of what.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from capacity.costs import Costs
from capacity.machine import MachineLoad, load_of
from capacity.popularity import Market
from capacity.stores import FeedStore, RegistryStore, feed_store, registry_store
from capacity.workload import Workload

__all__ = ["Limit", "Plan", "plan"]

_MOST_MACHINES = 1_000_000


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that ends.

    Attributes:
        name: what.
        used: of what may be in use; above 1 it is too much.
        remedy: what helps.
    """

    name: str
    used: float
    remedy: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What it takes.

    Attributes:
        machines: of all clusters, spare ones included.
        needed: without the spare ones.
        each: what one of ``needed`` machines has to do, as when the spare ones are lost.
        feed: of one cluster.
        registry: of one cluster.
        storm_per_s: connections that come to a machine when another one is lost.
        limits: the fullest first.
    """

    work: Workload
    machines: int
    needed: int
    each: MachineLoad
    feed: FeedStore
    registry: RegistryStore
    storm_per_s: float
    limits: tuple[Limit, ...]


def plan(work: Workload, costs: Costs) -> Plan:
    """Find the fewest machines that carry the workload, or look at as many as it names."""
    # Machines and viewers of one cluster from here on.
    viewers = work.viewers / work.clusters
    market = Market(work.codes, work.each, work.watch_zipf, work.tick_zipf, work.ticks_per_s)
    ticks = market.wanted(viewers) if work.demand else work.ticks_per_s

    def load(machines: int) -> MachineLoad:
        come = work.connects_per_s / work.clusters / machines
        return load_of(work, costs, market, viewers / machines, come, ticks)

    def fits(machines: int) -> bool:
        return all(
            limit.used <= 1 for limit in _of_machine(work, costs, load(machines), machines) if limit.name != _MAIN
        )

    if work.machines:
        total = math.ceil(work.machines / work.clusters)
        needed = max(1, total - work.spare)
    else:
        needed = _fewest(fits)
        total = needed + work.spare
    each = load(needed)
    feed = feed_store(work, costs, ticks, total)
    registry = registry_store(work, costs, market, viewers, total)
    limits = [*_of_machine(work, costs, each, needed), *_of_redis(work, feed, registry)]
    return Plan(
        work=work,
        machines=total * work.clusters,
        needed=needed * work.clusters,
        each=each,
        feed=feed,
        registry=registry,
        storm_per_s=_storm(work, each, needed),
        limits=tuple(sorted(limits, key=lambda limit: -limit.used)),
    )


def _fewest(fits: Callable[[int], bool]) -> int:
    most = 1
    while not fits(most) and most < _MOST_MACHINES:
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle, most)
    return most


_MAIN = "main's core"


def _storm(work: Workload, each: MachineLoad, machines: int) -> float:
    """Connections that come to one machine each second when another is lost, or when the only one comes back."""
    return each.viewers / max(1, machines - 1) / work.return_s


def _of_machine(work: Workload, costs: Costs, each: MachineLoad, machines: int) -> list[Limit]:
    handshake_us = costs.connect_us + work.each * costs.subscribe_us + (costs.tls_connect_us if work.tls else 0.0)
    storm = _storm(work, each, machines) * handshake_us / 1e6
    room = work.cores * work.headroom
    return [
        Limit(
            _MAIN, each.main_cores / work.headroom, "feeds by market, or a feed that follows demand; no machine helps"
        ),
        Limit("cores", each.cores / room, "max_rate; more cores or machines"),
        Limit("cores when clients come back", storm / room, "more machines; clients that wait longer"),
        Limit("memory", each.memory_mib / (work.memory_gib * 1024 * work.memory_headroom), "more memory or machines"),
        Limit(
            "network out", each.out_mbit / (work.nic_gbit * 1000 * work.headroom), "views, rows, MessagePack; machines"
        ),
        Limit(
            "network in",
            each.in_mbit / (work.nic_gbit * 1000 * work.headroom),
            "smaller ticks; a feed of what is wanted",
        ),
        Limit("connections", each.viewers / work.connections_each, "more machines"),
    ]


def _busiest_master(registry: RegistryStore) -> float:
    return registry.one_key_cores + max(0.0, registry.cores - registry.one_key_cores) / registry.shards


def _of_redis(work: Workload, feed: FeedStore, registry: RegistryStore) -> list[Limit]:
    most_mbit = work.nic_gbit * 1000 * work.headroom
    return [
        Limit("core of the feed's Redis", feed.cores / work.headroom, "replicas; batches; feeds by market"),
        Limit("network of the feed's Redis", feed.out_mbit / most_mbit, "replicas; smaller ticks; demand"),
        Limit(
            "core of the registry's Redis", _busiest_master(registry) / work.headroom,
            "a longer registry_check_s; Redis Cluster; several clusters",
        ),
        Limit(
            "memory of the registry's Redis",
            registry.memory_mib / registry.shards / (work.redis_gib * 1024 * work.memory_headroom),
            "Redis Cluster; several clusters",
        ),
        Limit(
            "network of the registry's Redis", registry.mbit / registry.shards / most_mbit,
            "a longer registry_check_s; several clusters",
        ),
    ]  # fmt: skip
