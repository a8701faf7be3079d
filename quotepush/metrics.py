"""The vocabulary of what is counted: name, kind and meaning of every metric, in one place.

Main gathers plain numbers (its own and its workers'); :func:`exposition` turns them into
Prometheus' text. A number whose name is not declared here is a bug and raises.
"""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["METRICS", "Sample", "exposition"]

# (value, labels)
Sample = tuple[float, Mapping[str, str]]

# name: (kind, meaning, labels)
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ticks_accepted": ("counter", "Ticks that were merged into the board.", ()),
    "ticks_refused": ("counter", "Ticks that were refused, by reason.", ("reason",)),
    "ticks_ignored": ("counter", "Messages on channels that yield no code.", ()),
    "tick_copies": ("counter", "Plain copies of ticks that come through the publishers' log.", ()),
    "log_catch_ups": ("counter", "How many times missed batches were read from the log.", ()),
    "log_gap_rows": ("counter", "Rows that were read anew because the log was too short.", ()),
    "tick_bugs": ("counter", "Ticks that were lost to a bug of the server.", ()),
    "board_codes": ("gauge", "Codes on the board.", ()),
    "feed_up": ("gauge", "1 while the feed link answers.", ()),
    "feed_links": ("counter", "How many times the feed link was made.", ()),
    "feed_age_seconds": ("gauge", "Time since the newest tick arrived.", ()),
    "feed_lag_seconds": ("gauge", "How far main is behind Redis.", ()),
    "rows_merged_main": ("counter", "Rows that main merged because it, or a worker, lagged.", ()),
    "codes_watched": ("gauge", "Codes that somebody here watches.", ()),
    "codes_stale": ("gauge", "Watched codes without a tick for too long.", ()),
    "delay_bytes": ("gauge", "What waits to be shown as delayed quotes.", ()),
    "delay_interval_seconds": ("gauge", "For how long one row of a delayed quote stands.", ()),
    "workers_ready": ("gauge", "Workers that accept connections.", ()),
    "worker_restarts": ("counter", "Workers that ended and were replaced.", ("worker",)),
    "connections": ("gauge", "Open connections.", ("worker",)),
    "connections_opened": ("counter", "Connections that were opened.", ("worker",)),
    "connections_closed": ("counter", "Connections that have ended, by reason.", ("worker", "reason")),
    "connections_refused": ("counter", "Connections that were refused before the upgrade.", ("worker", "reason")),
    "questions_refused": ("counter", "Questions over HTTP that were refused.", ("worker", "reason")),
    "client_addresses": ("gauge", "Addresses that have a connection, where they are counted.", ()),
    "subscriptions": ("gauge", "Subscriptions of all connections.", ("worker",)),
    "rows_in": ("counter", "Rows that a worker was sent.", ("worker",)),
    "rows_out": ("counter", "Rows that were handed to sockets.", ("worker",)),
    "rows_merged": ("counter", "Rows that were merged for slow sessions.", ("worker",)),
    "writes": ("counter", "Writes of rows to sockets.", ("worker",)),
    "places_spare": ("gauge", "Connections that a worker may take without asking main.", ("worker",)),
    "members": ("gauge", "Connections with a user, a group or session data.", ("worker",)),
    "users": ("gauge", "Users with a connection to this worker.", ("worker",)),
    "messages_sent": ("counter", "Messages of backends and clients that were handed to sockets.", ("worker",)),
    "messages_undelivered": ("counter", "Messages that a connection was too slow for.", ("worker",)),
    "messages_kept": ("counter", "Messages that were put away for users who were not there any more.", ()),
    "messages_collected": ("counter", "Messages that waited for a user and were delivered.", ()),
    "client_messages": ("counter", "Messages of clients that were sent on.", ()),
    "client_messages_refused": ("counter", "Messages of clients that were not, though they were allowed to send.", ()),
    "connections_replaced": ("counter", "Connections that were closed because their user had too many.", ()),
    "commands": ("counter", "Commands of the cluster that were carried out.", ()),
    "commands_refused": ("counter", "Messages that were no command, or too many of them.", ()),
    "commands_up": ("gauge", "1 while commands of the cluster are heard.", ()),
    "lease_held": ("gauge", "1 while no other node can take this one for dead.", ()),
    "nodes_cleared": ("counter", "Dead nodes that this one has cleared up after.", ()),
    "node_connections_cleared": ("counter", "Connections of dead nodes that were removed from the registry.", ()),
    "jobs_fired": ("counter", "Messages that this node has sent at their time.", ()),
    "jobs_failed": ("counter", "Attempts to do so that failed, and messages that were dropped.", ()),
    "jobs_waiting": ("gauge", "Messages of the cluster that wait for their time.", ()),
    "events_told": ("counter", "Events that Redis has taken.", ()),
    "events_dropped": ("counter", "Events that it has not.", ()),
    "demand_told": ("counter", "Codes that were told to be wanted, or wanted no more.", ()),
    "demand_pending": ("gauge", "Codes of which that is still to be told, or to be looked at again.", ()),
    "registry_pending": ("gauge", "Connections whose sets in Redis are not written yet.", ("worker",)),
    "registry_lag_seconds": ("gauge", "Age of the oldest change that is not written yet.", ("worker",)),
    "registry_repairs": ("counter", "Differences between the sets and the truth that were repaired.", ("worker",)),
}


class _Gathered(Collector):
    def __init__(self, samples: Mapping[str, Iterable[Sample]]) -> None:
        self._samples = samples

    def collect(self) -> Iterable[Metric]:
        for name, found in self._samples.items():
            kind, meaning, labels = METRICS[name]
            family_of = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            family = family_of(f"quotepush_{name}", meaning, labels=labels)
            for value, by_label in found:
                family.add_metric([by_label[label] for label in labels], value)
            yield family


def exposition(samples: Mapping[str, Iterable[Sample]]) -> bytes:
    """Return Prometheus' text for these numbers, by metric name without ``quotepush_``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Gathered(samples))
    return generate_latest(registry)
