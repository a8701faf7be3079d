"""What a deployment is asked to do, and the machines that it has; and four of them, from one machine to a thousand."""

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["SCENARIOS", "Workload"]


def _asked(default: Any, unit: str, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"unit": unit, "meaning": meaning})


@dataclass(frozen=True)
class Workload:
    """Each field is a flag of ``tools/scaling.py``; its metadata has ``unit`` and ``meaning``."""

    viewers: int = _asked(5_000, "", "Connections at the busiest time, of all machines.")
    each: float = _asked(20, "codes", "What one of them watches.")
    codes: int = _asked(5_000, "", "Codes of the feed.")
    watch_zipf: float = _asked(1.0, "", "How uneven the interest in codes is, as Zipf's exponent; 0: all alike.")
    tick_zipf: float = _asked(0.5, "", "How unevenly they tick; what many watch ticks often.")
    ticks_per_s: float = _asked(5_000, "1/s", "Ticks of all codes, in the busiest minute.")
    tick_bytes: float = _asked(200, "bytes", "A tick as it is published.")
    row_bytes: float = _asked(340, "bytes", "A row on the wire; three fields as arrays: 58.")
    max_rate: float = _asked(0.0, "1/s", "Most rows a second and code for a client; 0: every row.")
    batch: float = _asked(0.0, "ticks", "Ticks in a batch of a Publisher; 0: plain PUBLISH, tick by tick.")
    demand: bool = _asked(False, "", "The feed publishes only codes that somebody watches.")
    connects_per_s: float = _asked(10, "1/s", "Connections that come, and as many that go, of all machines.")
    changes_per_s: float = _asked(20, "1/s", "Requests with which a client takes one code and drops another.")
    sends_per_s: float = _asked(10, "1/s", "Messages of backends to users.")
    sends_to_all_per_h: float = _asked(4, "1/h", "Messages of backends to everybody.")
    users: float = _asked(1.0, "", "Part of the viewers who have a user (a token, or bound).")
    tls: bool = _asked(False, "", "TLS ends in the server.")
    machines: int = _asked(0, "", "How many there are; 0: as many as it takes.")
    spare: int = _asked(0, "", "Machines more than it takes, so that so many may be lost.")
    cores: int = _asked(8, "", "Cores of a machine, with a worker each.")
    memory_gib: float = _asked(16, "GiB", "Memory of a machine.")
    nic_gbit: float = _asked(10, "Gbit/s", "Network card of a machine, and of Redis.")
    connections_each: int = _asked(100_000, "", "Most connections that you want on a machine, whatever it could.")
    return_s: float = _asked(30, "s", "When a machine is lost its clients are back on the others after so long.")
    headroom: float = _asked(0.5, "", "Part of a core and of a card that may be in use in the busiest minute.")
    memory_headroom: float = _asked(0.75, "", "Part of the memory that may be.")
    redis_gib: float = _asked(16, "GiB", "Memory of a Redis.")
    registry_check_s: float = _asked(5.0, "s", "The servers' setting.")
    registry_interval_s: float = _asked(0.1, "s", "The servers' setting.")
    registry_ttl_s: float = _asked(7_200, "s", "The servers' setting.")
    lease_s: float = _asked(10, "s", "The servers' setting.")
    clusters: int = _asked(1, "", "Clusters with a registry of their own, by region; each has the whole feed.")


SCENARIOS: dict[str, tuple[str, Workload]] = {
    "one": ("one machine: a broker's own app", Workload()),
    "three": (
        "three machines: a portal",
        Workload(
            viewers=50_000, codes=10_000, ticks_per_s=20_000, batch=50, row_bytes=170, max_rate=4, tls=True,
            connects_per_s=100, changes_per_s=200, sends_per_s=100, spare=1, cores=16,
        ),
    ),
    "thirty": (
        "thirty machines: a national app",
        Workload(
            viewers=1_300_000, codes=10_000, ticks_per_s=30_000, batch=100, row_bytes=100, max_rate=2, tls=True,
            connects_per_s=2_000, changes_per_s=5_000, sends_per_s=1_000, spare=1, cores=16,
        ),
    ),
    "thousand": (
        "a thousand machines: several countries",
        Workload(
            viewers=48_000_000, codes=50_000, ticks_per_s=50_000, batch=200, row_bytes=100, max_rate=2, tls=True,
            connects_per_s=60_000, changes_per_s=200_000, sends_per_s=10_000, spare=1, cores=16,
            clusters=40,
        ),
    ),
}  # fmt: skip
