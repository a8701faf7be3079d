"""From what the processes of a run said to its figures: shares, percentiles, doubts, medians. Pure."""

import math
import statistics
from collections import Counter
from typing import Any

__all__ = [
    "PERCENTILES", "Figures", "feed_figures", "median_figures", "nearest_rank", "notes_on", "percentile",
    "shares_of_cores", "waits",
]  # fmt: skip

_NEARLY_ALL = 0.9
_REDIS_LATE_S = 0.1
_AGE_BITS = 4

Figures = dict[str, Any]
"""What a run found, or the median of several. All of it stands in the answer of ``--json``.

``rows_per_s`` delivered, over the time in which they came; ``in_time`` the part that was there when the last tick was
sent; ``p50_ms`` and so on from publishing to the client's ``recv``; ``cpu_us_row`` and ``cpu_us_tick`` CPU time of all
processes of the server; ``kib_per_conn`` what its memory (PSS) grew by for each client until all had subscribed;
``mib_more`` what it (RSS) grew by afterwards, at most; ``subscribes`` what those who ask again and again waited, by how
many asked at a time; ``feed`` how main kept up with a flood; ``gc`` pauses; ``notes`` what makes a figure doubtful.
"""


def shares_of_cores(
    before: dict[str, Any], during: dict[str, Any], counted: list[dict[str, Any]], ended: dict[str, Any]
) -> Figures:
    took: float = max(1e-6, during["time"] - before["time"])
    server = [(cpu - before["server"].get(pid, 0.0)) / took for pid, cpu in during["server"].items()]
    redis = (during["redis"] - before["redis"]) / took
    load = (during["load"] - before["load"]) / took

    def wanted(what: str) -> float:
        return float(during[f"{what}_wanted"] - before[f"{what}_wanted"]) / took

    return {
        "server_cores": sum(server),
        "server_busiest": max(server, default=0.0),
        "redis_share": redis,
        "redis_wanted": wanted("redis"),
        "loader_share": max(one["cpu_share"] for one in counted),
        "loader_wanted": max(wanted("asker"), *(one["wanted_share"] for one in counted)),
        "publisher_share": ended["cpu_share"],
        "publisher_wanted": wanted("publisher"),
        "others_cores": max(0.0, (during["all"] - before["all"]) / took - sum(server) - redis - load),
    }


PERCENTILES = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}


def percentile(ages: "Counter[int]", part: float) -> float | None:
    """Return the age in ms that ``part`` of all rows did not pass; None without rows."""
    left = part * sum(ages.values())
    for step in sorted(ages):
        left -= ages[step]
        if left <= 0:
            return ((step << _AGE_BITS) + (1 << _AGE_BITS >> 1)) / 1000
    return None


def waits(asked: dict[str, Any]) -> dict[str, float]:
    """Return what those who asked so many at a time waited."""
    acks, snapshots = asked["acks"], asked["snapshots"]
    return {
        "count": len(acks),
        "kib": asked["bytes"] / max(1, len(acks)) / 1024,
        **{f"ack_{name}": nearest_rank(acks, part) for name, part in PERCENTILES.items()},
        **{f"snapshot_{name}": nearest_rank(snapshots, part) for name, part in PERCENTILES.items()},
    }


def nearest_rank(values: list[float], part: float) -> float:
    """Return the smallest value that ``part`` of all values do not pass; 0.0 without values."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)] if values else 0.0


def feed_figures(samples: list[dict[str, float]], sent: int, due: int) -> dict[str, float]:
    """Return how main kept up, from what it said before, during and after the ticks.

    ``taken_per_s`` counts from the first tick to the sample in which the last one was there; ``missed`` are ticks that
    Redis was sent and main never saw.
    """
    first, last = samples[0], samples[-1]

    def taken(sample: dict[str, float]) -> float:
        return (
            sample["ticks_accepted_total"] + sample["ticks_refused_total"]
            - first["ticks_accepted_total"] - first["ticks_refused_total"]
        )  # fmt: skip

    done = next(sample for sample in samples if taken(sample) == taken(last))
    return {
        "due": due,
        "sent": sent,
        "taken": taken(last),
        "taken_per_s": taken(last) / max(1e-6, done["time"] - first["time"]),
        "missed": sent - taken(last),
        "refused": last["ticks_refused_total"] - first["ticks_refused_total"],
        "links_cut": last["feed_links_total"] - first["feed_links_total"],
        "rows_merged": last["rows_merged_main_total"] - first["rows_merged_main_total"],
        "most_lag_ms": 1000 * max(sample["feed_lag_seconds"] for sample in samples),
    }


def notes_on(
    figures: Figures, ended: dict[str, Any], taken: dict[str, Any], server_cores: list[int] | None
) -> list[str]:
    """Say what makes the figures doubtful."""
    notes = []
    if figures["loader_wanted"] >= _NEARLY_ALL:
        notes.append(
            f"the load generator is the bottleneck (a load process ran or waited for a core "
            f"{figures['loader_wanted']:.0%} of the time): these figures are about it, not about the server"
        )
    if figures["redis_wanted"] >= _NEARLY_ALL:
        notes.append(f"Redis is the bottleneck (it ran or waited for a core {figures['redis_wanted']:.0%} of the time)")
    if ended["sent"] < 0.98 * ended["due"]:
        why = "Redis took no more" if ended["refused_share"] >= 0.5 else "it had no more of its core"
        notes.append(f"the publisher fell behind, {why}: {ended['sent']:,} of {ended['due']:,} ticks were sent")
    elif figures["publisher_wanted"] >= _NEARLY_ALL:
        notes.append("the publisher was at its end: it can send no more ticks here")
    if taken["seconds"] > _REDIS_LATE_S:
        notes.append(f"Redis had taken the last tick {taken['seconds']:.1f} s after it was sent")
    if figures.get("feed", {}).get("links_cut"):
        feed = figures["feed"]
        notes.append(f"the feed link was lost {feed['links_cut']:,.0f} times; {feed['missed']:,.0f} ticks went with it")
    if figures["server_busiest"] >= _NEARLY_ALL or (
        server_cores and figures["server_cores"] >= _NEARLY_ALL * len(server_cores)
    ):
        notes.append(f"the server used {figures['server_cores']:.2f} cores: it can take no more here")
    if figures["closed"]:
        notes.append(f"{figures['closed']:,} connections were closed by the server")
    if figures["others_cores"] >= 0.3:
        notes.append(f"other programs used {figures['others_cores']:.1f} cores meanwhile")
    return notes


def median_figures(runs: list[Figures]) -> Figures:
    """Return the median of every figure, and all notes."""
    found: Figures = {"runs": len(runs)}
    for key, value in runs[0].items():
        if key == "notes":
            found[key] = list(dict.fromkeys(note for run in runs for note in run[key]))
        elif isinstance(value, dict):
            found[key] = {
                name: one for name, one in median_figures([run[key] for run in runs]).items() if name != "runs"
            }
        elif isinstance(value, (int, float)):
            found[key] = statistics.median(run[key] for run in runs if run[key] is not None)
        else:
            found[key] = value
    return found
