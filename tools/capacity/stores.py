"""The two Redis: that of the feed, which every machine hears, and that of the registry, which every worker writes.

Redis carries out commands on one core, so what is in use of it is a part of a core. Classic pub/sub in Redis Cluster is
passed on to every node, so more shards do not help a feed: replicas do, each of which speaks to a part of the machines.
"""

import math
from dataclasses import dataclass

from capacity.costs import Costs
from capacity.popularity import Market
from capacity.workload import Workload

__all__ = [
    "Commands",
    "FeedStore",
    "RegistryStore",
    "commands_of_batch",
    "commands_of_changes",
    "compared_in_round",
    "feed_store",
    "registry_store",
]

_SLICE_COMMANDS = 200  # quotepush/cluster/sets.py
_SLICE_MEMBERS = 2_000
_CHECKED = 500  # quotepush/cluster/registry.py: CHECKED_PER_ROUND
_SMALL_SET = 100  # quotepush/cluster/comparing.py, and the next ones
_CHECKED_MEMBERS = 20_000
_SWEPT_MEMBERS = 5_000
_PAGE = 1_000


@dataclass(frozen=True, slots=True)
class FeedStore:
    """The Redis of the feed.

    Attributes:
        messages: that it takes a second; ``bytes_each`` long.
        deliveries: that one without replicas would make, to all machines.
        alone_cores, alone_mbit: what it would take of it, without replicas.
        replicas: that speak to the machines instead; 0: it does so itself. ``math.inf``: no number is enough.
        cores, out_mbit: of the busiest Redis, with them.
    """

    messages: float
    bytes_each: float
    deliveries: float
    alone_cores: float
    alone_mbit: float
    replicas: float
    cores: float
    out_mbit: float


@dataclass(frozen=True, slots=True)
class RegistryStore:
    """The Redis of the registry.

    Attributes:
        come_and_go: commands a second for connections that come and go, and for codes that they change.
        compare: commands a second of workers that compare it with what is true; they read ``compared_members``.
        renew: commands a second of nodes that renew their records.
        send: commands a second for messages.
        cores: of Redis, in all; the parts of it in the same order.
        mbit: to and from it.
        memory_mib: what it holds.
        largest_set: members of the set of the code that most watch; it stands on one shard.
        one_key_cores: of what every flush of every worker writes, the set of all codes: no shard helps there.
        shards: masters that it takes. ``math.inf``: no number is enough.
    """

    come_and_go: float
    compare: float
    compared_members: float
    renew: float
    send: float
    cores: float
    cores_of: tuple[float, float, float, float]
    mbit: float
    memory_mib: float
    largest_set: float
    one_key_cores: float
    shards: float


def feed_store(work: Workload, costs: Costs, ticks_per_s: float, machines: int) -> FeedStore:
    """What the feed takes, heard by so many machines."""
    batch = work.batch or 1.0
    messages = ticks_per_s / batch
    size = batch * work.tick_bytes + costs.resp_bytes
    publish_us = costs.publish_us + costs.deliver_byte_us * size
    if work.batch:
        publish_us = costs.batch_us + batch * costs.batch_tick_us
    publish = messages * publish_us / 1e6
    deliver = messages * (costs.deliver_us + costs.deliver_byte_us * size) / 1e6
    mbit = messages * size * 8 / 1e6
    alone_cores, alone_mbit = publish + machines * deliver, machines * mbit
    most_mbit = work.nic_gbit * 1000 * work.headroom
    replicas: float = 0
    cores, out = alone_cores, alone_mbit
    if alone_cores > work.headroom or alone_mbit > most_mbit:
        room = work.headroom - publish
        if room < deliver or most_mbit < mbit:
            replicas, cores, out = math.inf, publish, mbit
        else:
            served = math.floor(min(room / deliver, most_mbit / mbit))
            replicas = max(2, math.ceil(machines / served))
            cores = publish + max(math.ceil(machines / replicas), replicas) * deliver
            out = max(math.ceil(machines / replicas), replicas) * mbit
    return FeedStore(messages, size, messages * machines, alone_cores, alone_mbit, replicas, cores, out)


def registry_store(work: Workload, costs: Costs, market: Market, viewers: float, machines: int) -> RegistryStore:
    """What the registry of one cluster takes.

    Args:
        viewers: of this cluster.
        machines: of this cluster.
    """
    workers = machines * work.cores
    come = work.connects_per_s / work.clusters
    change = work.changes_per_s / work.clusters
    writes = _come_and_go(work, market, come / workers, change / workers)
    compare = _compare(work, market, viewers, workers)
    renew = _leases(work, machines)
    sends, to_all = work.sends_per_s / work.clusters, work.sends_to_all_per_h / 3600
    send = Commands(
        sends * 3 + to_all * (2 + machines), sends + to_all * 2 * machines, sends * 3 + to_all * (2 + machines)
    )
    parts = [writes.times(workers), compare.times(workers), renew, send]
    cores_of = tuple(part.cores(costs) for part in parts)
    kib = viewers * (costs.registry_kib + work.each * costs.registry_code_kib + work.users * costs.registry_user_kib)
    members = sum(part.members for part in parts) - renew.members
    bytes_each = members * costs.member_bytes + renew.members * costs.record_bytes
    bytes_each += sum(part.commands for part in parts) * costs.member_bytes
    memory = kib / 1024
    cores = sum(cores_of)
    mbit = bytes_each * 8 / 1e6
    one_key = _one_key_cores(work, costs, market, come, workers)
    shards: float = math.inf
    if one_key < work.headroom:
        shards = max(1, math.ceil((cores - one_key) / (work.headroom - one_key)) if cores > work.headroom else 1)
    shards = max(
        shards,
        math.ceil(memory / (work.redis_gib * 1024 * work.memory_headroom)),
        math.ceil(mbit / (work.nic_gbit * 1000 * work.headroom)),
    )
    return RegistryStore(
        come_and_go=parts[0].commands,
        compare=parts[1].commands,
        compared_members=parts[1].members,
        renew=renew.commands,
        send=send.commands,
        cores=cores,
        cores_of=(cores_of[0], cores_of[1], cores_of[2], cores_of[3]),
        mbit=mbit,
        memory_mib=memory,
        largest_set=market.most_watched(viewers),
        one_key_cores=one_key,
        shards=shards,
    )


@dataclass(frozen=True, slots=True)
class Commands:
    """A second of them: commands, members that they carry, pipelines that they come in."""

    commands: float
    members: float
    turns: float

    def times(self, factor: float) -> "Commands":
        return Commands(self.commands * factor, self.members * factor, self.turns * factor)

    def cores(self, costs: Costs) -> float:
        return (self.commands * costs.command_us + self.members * costs.member_us + self.turns * costs.turn_us) / 1e6


def commands_of_batch(work: Workload, market: Market, come: float) -> tuple[Commands, Commands]:
    """What a worker says to Redis when so many connections have come since it last did, and when they have gone.

    One command per code for all of them, one per connection, and a few for the worker's own sets
    (``RegistryMirror._write``); the same for their users. The sets of codes are taken to have others left in them;
    those of users are asked, twice, whether they have.
    """
    codes = market.demand(come)
    members = come * work.each
    slices = (2 * come + 2 * codes) // _SLICE_COMMANDS
    coming = Commands(4 + 2 * come + codes, come + 2 * members + codes, 5 + slices)
    going = Commands(1 + come + codes, come + members, 3 + slices)
    users = come * work.users
    if users:
        coming = Commands(
            coming.commands + 4 + 5 * users, coming.members + 5 * users, coming.turns + 5 + 5 * users // _SLICE_COMMANDS
        )
        going = Commands(
            going.commands + 2 + 5 * users, going.members + 4 * users, going.turns + 5 + 5 * users // _SLICE_COMMANDS
        )
    return coming, going


def commands_of_changes(work: Workload, market: Market, changes: float) -> Commands:
    """What a worker says to Redis when so many connections have each taken a code and dropped another."""
    codes = market.demand(changes / work.each)
    return Commands(2 + 2 * changes + 2 * codes, 4 * changes + codes, 6 + (2 * changes + 2 * codes) // _SLICE_COMMANDS)


def _come_and_go(work: Workload, market: Market, come_per_s: float, changes_per_s: float) -> Commands:
    """One worker, of which so many connections come and go a second, and so many change a code."""
    # Rarely, one by one; often, all of an interval at once.
    come = max(1.0, come_per_s * work.registry_interval_s)
    changed = max(1.0, changes_per_s * work.registry_interval_s)
    changes = commands_of_changes(work, market, changed).times(changes_per_s / changed)
    coming, going = commands_of_batch(work, market, come)
    often = come_per_s / come
    return Commands(
        (coming.commands + going.commands) * often + changes.commands,
        (coming.members + going.members) * often + changes.members,
        (coming.turns + going.turns) * often + changes.turns,
    )


def _leases(work: Workload, machines: int) -> Commands:
    """Three times a lease a node renews its record (``Presence``), four times it reads all of them (``Cleaner``)."""
    renewals, looks = 3 * machines / work.lease_s, 4 * machines / work.lease_s
    return Commands(4 * renewals + 2 * looks, looks * machines, 4 * renewals + 2 * looks)


def _one_key_cores(work: Workload, costs: Costs, market: Market, come_per_s: float, workers: int) -> float:
    """What the set of all codes takes: each batch of connections that come writes to it twice, one after the other."""
    batch = max(1.0, come_per_s / workers * work.registry_interval_s)
    each_us = 2 * costs.command_us + market.demand(batch) * costs.member_us + 2 * costs.turn_us
    return come_per_s / batch * each_us / 1e6


def compared_in_round(work: Workload, market: Market, viewers: float, clients: float) -> Commands:
    """One round of one worker that compares a part of the sets with what is true (``RegistryMirror._check``)."""
    share = work.registry_check_s * 4 / work.registry_ttl_s
    fds = min(clients, max(_CHECKED, clients * share))
    audiences = list(market.audiences(viewers, clients))
    codes = sum(some.codes for some in audiences)
    if not codes:
        return Commands(8, 0, 6)
    renewed = min(codes, max(_CHECKED, codes * share))
    small = [some for some in audiences if some.watchers <= _SMALL_SET]
    large = [some for some in audiences if some.watchers > _SMALL_SET]
    # Small sets are read; large ones are asked for our own, as long as a round has members left.
    cost = sum(some.codes * some.watchers for some in small) + sum(some.codes * some.own for some in large)
    compared = min(1.0, renewed / codes, _CHECKED_MEMBERS / cost)
    asks = compared * sum(some.codes * math.ceil(some.own / _SLICE_MEMBERS) for some in large)
    reads = compared * sum(some.codes for some in small)
    # A part of the large ones is gone through, and then read as if they were small.
    weight = sum(some.codes * some.watchers for some in large)
    swept = min(compared, _SWEPT_MEMBERS / weight) if weight else 0.0
    pages = swept * sum(some.codes * math.ceil(some.watchers / _PAGE) for some in large)
    again = swept * sum(some.codes for some in large)
    members = fds * work.each + renewed + compared * cost + swept * weight + again * _SMALL_SET
    commands = 8 + 2 * fds + renewed + reads + asks + pages + again
    turns = 6 + (commands - pages) / _SLICE_COMMANDS + compared * cost / _SLICE_MEMBERS + pages
    return Commands(commands, members, turns)


def _compare(work: Workload, market: Market, viewers: float, workers: int) -> Commands:
    """One worker; the mirror of its users does the same, and their sets are small."""
    clients = viewers / workers
    one = compared_in_round(work, market, viewers, clients)
    users = min(clients * work.users, _CHECKED)
    mirror = 8 if users else 0
    return Commands(one.commands + mirror + 6 * users, one.members + 5 * users, one.turns + mirror).times(
        1 / work.registry_check_s
    )
