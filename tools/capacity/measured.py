"""The simulation beside what was measured: the loads of docs/performance.md, on one core."""

from dataclasses import dataclass

from capacity.costs import Costs
from capacity.machine import load_of
from capacity.popularity import Market
from capacity.workload import Workload

__all__ = ["MEASURED", "Compared", "compared"]


@dataclass(frozen=True, slots=True)
class Compared:
    """A load, and the cores that the server used: ``measured``, and as ``simulated``."""

    load: str
    measured: float
    simulated: float

    @property
    def ratio(self) -> float:
        """Above 1: the simulation is too cautious."""
        return self.simulated / self.measured


@dataclass(frozen=True, slots=True)
class _Load:
    clients: int
    each: int
    codes: int
    ticks_per_s: float
    cores: float
    tick_bytes: float = 136
    row_bytes: float = 177
    tick_zipf: float = 0.0
    workers: int = 1


# Cores: µs/row × rows/s, or µs/tick × ticks/s, of the tables there.
MEASURED = {
    "watch": _Load(500, 10, 100, 500, 0.178),
    "busy": _Load(500, 10, 100, 4_000, 0.334),
    "index": _Load(2_000, 1, 1, 100, 0.734),
    "market": _Load(1_000, 50, 1_000, 8_000, 0.415),
    "market, Zipf 1": _Load(1_000, 50, 1_000, 8_000, 0.571, tick_zipf=1.0),
    "market, 100 ticks/s": _Load(1_000, 50, 1_000, 100, 0.065),
    "market, 1,600 ticks/s": _Load(1_000, 50, 1_000, 1_600, 0.306),
    "market, 20,000 ticks/s": _Load(1_000, 50, 1_000, 20_000, 0.419),
    "market, 61,287 ticks/s": _Load(1_000, 50, 1_000, 61_287, 0.849),
    "hose": _Load(20, 50, 5_000, 50_000, 0.188),
    "flood": _Load(20, 50, 5_000, 194_189, 0.610, tick_bytes=188),
    "real": _Load(500, 20, 1_000, 10_000, 0.403, tick_bytes=693, row_bytes=480),
    "10,000 clients": _Load(10_000, 10, 1_000, 1_000, 0.388),
    "busy, 2 workers": _Load(500, 10, 100, 4_000, 0.575, workers=2),
    "busy, 4 workers": _Load(500, 10, 100, 4_000, 0.607, workers=4),
    "market, 2 workers": _Load(1_000, 50, 1_000, 8_000, 0.516, workers=2),
    "market, 4 workers": _Load(1_000, 50, 1_000, 8_000, 0.635, workers=4),
}


def compared(costs: Costs) -> list[Compared]:
    """What was measured and what the simulation says, load by load."""
    found = []
    for name, load in MEASURED.items():
        work = Workload(
            viewers=load.clients, each=load.each, codes=load.codes, cores=load.workers, tick_bytes=load.tick_bytes,
            row_bytes=load.row_bytes, ticks_per_s=load.ticks_per_s,
        )  # fmt: skip
        market = Market(load.codes, load.each, 0.0, load.tick_zipf, load.ticks_per_s)
        each = load_of(work, costs, market, load.clients, 0.0, load.ticks_per_s)
        found.append(Compared(name, load.cores, each.cores))
    return found
