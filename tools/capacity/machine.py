"""One machine: what its main process and its workers have to do.

Law: everything here is of one machine, and per second unless its name says otherwise.
"""

import math
from dataclasses import dataclass

from capacity.costs import Costs
from capacity.popularity import Market
from capacity.workload import Workload

__all__ = ["Flush", "MachineLoad", "flush_of", "load_of"]


@dataclass(frozen=True, slots=True)
class Flush:
    """What a worker does again and again: everything that has come is written out, one write per client.

    Attributes:
        period_s: from the beginning of one to the next.
        work_s: CPU time of one.
        writes: sockets that are written to.
    """

    period_s: float
    work_s: float
    writes: float

    @property
    def cores(self) -> float:
        """Part of a core that flushes take."""
        return self.work_s / self.period_s


@dataclass(frozen=True, slots=True)
class MachineLoad:
    """The busiest minute of one machine.

    Attributes:
        viewers: its connections.
        demand: codes that they watch.
        ticks: that main takes in; ``wanted_ticks`` of them are of codes that are watched here.
        rows: that go out, in ``writes``.
        main_cores, worker_cores, handshake_cores: CPU seconds a second.
        flush_ms: from one flush of a worker to the next.
        memory_mib: of all processes and the kernel's sockets.
        out_mbit, in_mbit: to clients; from Redis.
        send_to_all_s: until everybody here has it.
    """

    viewers: float
    demand: float
    ticks: float
    wanted_ticks: float
    rows: float
    writes: float
    main_cores: float
    worker_cores: float
    handshake_cores: float
    flush_ms: float
    memory_mib: float
    out_mbit: float
    in_mbit: float
    send_to_all_s: float

    @property
    def cores(self) -> float:
        """All of it."""
        return self.main_cores + self.worker_cores + self.handshake_cores


def flush_of(costs: Costs, clients: float, rows_each: float, frames: float, row_bytes: float, *, tls: bool) -> Flush:
    """What the flushes of a worker settle at.

    After a flush that took ``t`` the next one waits ``3 t``, at most 5 ms; so the busier a worker is the more rows
    share a write. A client is written to when at least one row has come for it: with ``1 - exp(-rows in the period)``.

    Args:
        clients: of this worker.
        rows_each: rows a second of one of them.
        frames: how often main has something for this worker.
    """
    if not frames or not clients:
        return Flush(1.0, 0.0, 0.0)
    period = 1 / frames
    work = writes = 0.0
    for _ in range(400):
        rows = clients * rows_each * period
        writes = -clients * math.expm1(-rows_each * period)
        size = row_bytes * rows / writes if writes else row_bytes
        write_us = costs.write_us + costs.write_kb_us * size / 1000 + (costs.tls_write_us if tls else 0.0)
        work = (costs.flush_us + writes * write_us + rows * costs.row_us) / 1e6
        if work > 10:
            return Flush(10.0, math.inf, writes)
        rested = work + min(costs.rest_most_ms / 1000, costs.rest_factor * work)
        period += (max(1 / frames, rested) - period) / 2
    return Flush(period, work, writes)


def load_of(
    work: Workload, costs: Costs, market: Market, viewers: float, connects_per_s: float, ticks_per_s: float
) -> MachineLoad:
    """What a machine with so many viewers has to do.

    Args:
        connects_per_s: of this machine.
        ticks_per_s: that are published.
    """
    workers = work.cores
    clients = viewers / workers
    each = market.rows_per_viewer(work.max_rate)
    wanted, wanted_by_worker = market.wanted(viewers), market.wanted(clients)
    most_reads = 1000 / costs.rest_ms
    reads = min(ticks_per_s, most_reads)
    flush = flush_of(costs, clients, each, min(wanted_by_worker, most_reads), work.row_bytes, tls=work.tls)
    main_us = (
        (ticks_per_s - wanted) * costs.of_tick(work.tick_bytes, is_row=False)
        + wanted * costs.of_tick(work.tick_bytes, is_row=True)
        + ticks_per_s * (costs.read_us + costs.relay_us)
        + workers * wanted_by_worker * costs.bus_out_us
        + reads * costs.wake_us
    )
    heartbeats = viewers / costs.heartbeat_s
    worker_us = workers * wanted_by_worker * (costs.bus_in_us + costs.lane_us) + heartbeats * (
        costs.write_us + (costs.tls_write_us if work.tls else 0.0)
    )
    handshake_us = costs.connect_us + work.each * costs.subscribe_us + (costs.tls_connect_us if work.tls else 0.0)
    changes = work.changes_per_s * viewers / work.viewers
    worker_us += changes * (costs.request_us + costs.subscribe_us)
    rows, writes = viewers * each, workers * flush.writes / flush.period_s
    kib = viewers * (
        costs.connection_kib + work.each * costs.subscription_kib + costs.kernel_kib
        + (costs.tls_kib if work.tls else 0.0) + costs.slow_share * costs.slow_kib
    )  # fmt: skip
    kib += workers * market.demand(clients) * costs.code_kib + work.codes * costs.board_kib
    out_bytes = rows * work.row_bytes + writes * (costs.envelope_bytes + costs.packet_bytes)
    out_bytes += heartbeats * (costs.heartbeat_bytes + costs.packet_bytes)
    return MachineLoad(
        viewers=viewers,
        demand=market.demand(viewers),
        ticks=ticks_per_s,
        wanted_ticks=wanted,
        rows=rows,
        writes=writes,
        main_cores=main_us / 1e6 + costs.idle_cores,
        worker_cores=worker_us / 1e6 + workers * flush.cores,
        handshake_cores=connects_per_s * handshake_us / 1e6,
        flush_ms=flush.period_s * 1000,
        memory_mib=costs.first_mib + (workers - 1) * costs.worker_mib + costs.ring_mib + kib / 1024,
        out_mbit=out_bytes * 8 / 1e6,
        in_mbit=ticks_per_s * (work.tick_bytes + costs.resp_bytes) * 8 / 1e6,
        send_to_all_s=clients * costs.send_all_us / 1e6,
    )
