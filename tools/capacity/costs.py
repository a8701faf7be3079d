"""What each step costs: every constant of the simulation, with where it comes from.

Law: a number stands here and nowhere else, with its unit and its source. A source that begins with "assumption" is one
that nobody has measured; whoever knows better says so on the command line.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["Costs"]

# As docs/scaling.md links to them.
_STEPS = "[where the time goes](performance.md#where-the-time-goes): "
_RESULTS = "[results](performance.md#results): "
_SIZING = "[sizing a machine](performance.md#sizing-a-machine): "
_MESSAGES = "[messages of backends](performance.md#messages-of-backends): "
_FAILED = "[what did not work](performance.md#what-did-not-work): "
_REDIS = "[what one Redis carries](#what-one-redis-carries): "
_FITTED = "fitted to [these](#how-far-to-trust-it): "
_SETTING = "[setting](settings.md) "
_PROTOCOL = "[protocol](protocol.md): "


def _cost(value: float, unit: str, meaning: str, source: str) -> Any:
    return dataclasses.field(default=value, metadata={"unit": unit, "meaning": meaning, "source": source})


@dataclass(frozen=True)
class Costs:
    """Each field's metadata has ``unit``, ``meaning`` and ``source``."""

    # main
    read_us: float = _cost(0.426, "µs", "a message of the feed is read", _STEPS + "asyncio stream and hiredis.Reader")
    small_tick_us: float = _cost(1.14, "µs", "a tick of 136 bytes that nobody watches", _STEPS + "board")
    small_row_us: float = _cost(2.12, "µs", "a tick of 136 bytes that becomes a row", _STEPS + "board")
    large_tick_us: float = _cost(5.78, "µs", "a tick of 693 bytes that nobody watches", _STEPS + "board")
    large_row_us: float = _cost(9.34, "µs", "a tick of 693 bytes that becomes a row", _STEPS + "board")
    bus_out_us: float = _cost(0.024, "µs", "a row is packed for a worker", _STEPS + "bus")
    relay_us: float = _cost(0.2, "µs", "the rest of a tick's way in main", _FITTED + "hose, flood")
    wake_us: float = _cost(10.0, "µs", "main wakes and reads", _FITTED + "watch, market at 100 ticks/s")
    rest_ms: float = _cost(1.0, "ms", "main rests between two reads", _FAILED + "a rest of 1 ms")
    idle_cores: float = _cost(0.03, "cores", "a server without ticks", _FITTED + "market at 100 ticks/s")
    # workers
    bus_in_us: float = _cost(0.092, "µs", "a row is unpacked in a worker", _STEPS + "bus")
    lane_us: float = _cost(
        0.3, "µs", "its news, its encoding and its frame are looked at, once for all", _FITTED + "hose"
    )
    row_us: float = _cost(0.06, "µs", "a row goes to an outbox and into a message", _STEPS + "20 of a kind")
    write_us: float = _cost(4.06, "µs", "a write of 150 bytes", _STEPS + "transport.write")
    write_kb_us: float = _cost(0.057, "µs", "each further 1,000 bytes of it", _STEPS + "transport.write")
    tls_write_us: float = _cost(0.8, "µs", "TLS, on top of a write", _RESULTS + "real with and without --tls")
    flush_us: float = _cost(40.0, "µs", "a flush, without its writes", _FITTED + "watch")
    rest_factor: float = _cost(3.0, "", "a flush that took t rests this often t", _STEPS + "its third point")
    rest_most_ms: float = _cost(5.0, "ms", "but no longer than this", _SETTING + "`max_flush_delay_ms`")
    connect_us: float = _cost(126.0, "µs", "a handshake", _RESULTS + "+sub/s of watch and market")
    subscribe_us: float = _cost(2.05, "µs", "each code that it subscribes", _RESULTS + "+sub/s of watch and market")
    request_us: float = _cost(50.0, "µs", "a request on an open connection, without its codes", "assumption")
    tls_connect_us: float = _cost(449.0, "µs", "TLS, on top of a handshake", _RESULTS + "+sub/s of real with --tls")
    send_all_us: float = _cost(
        30.0, "µs", "send_to_all, for each connection of a worker", _MESSAGES + "on a busy machine, so rather less"
    )
    # memory of a machine
    first_mib: float = _cost(75.0, "MiB", "main and one worker", _SIZING + "3")
    worker_mib: float = _cost(35.0, "MiB", "each further worker", _SIZING + "3")
    connection_kib: float = _cost(
        4.8, "KiB", "a connection without codes", _RESULTS + "KiB/conn of index, watch, market"
    )
    subscription_kib: float = _cost(0.2, "KiB", "each code of it", _RESULTS + "KiB/conn of index, watch, market")
    code_kib: float = _cost(1.4, "KiB", "a code that a worker holds", _RESULTS + "KiB/conn of hose")
    tls_kib: float = _cost(20.0, "KiB", "TLS, on top of a connection", _RESULTS + "TLS")
    ring_mib: float = _cost(64.0, "MiB", "recent rows in main, at most", _SETTING + "`ring_bytes`")
    board_kib: float = _cost(2.0, "KiB", "a code on the board of main", "assumption")
    kernel_kib: float = _cost(4.0, "KiB", "the kernel's part of a quiet connection", "assumption")
    slow_kib: float = _cost(256.0, "KiB", "what waits for a slow client, at most", _SETTING + "`merge_above_bytes`")
    slow_share: float = _cost(0.005, "", "part of the clients that are so slow at a time", "assumption")
    # network
    envelope_bytes: float = _cost(45.0, "bytes", "a message around its rows", _PROTOCOL + "`tick`, and a frame's head")
    packet_bytes: float = _cost(66.0, "bytes", "Ethernet, IP and TCP around a write", "their headers, with timestamps")
    heartbeat_bytes: float = _cost(90.0, "bytes", "a heartbeat", _PROTOCOL + "`heartbeat`")
    heartbeat_s: float = _cost(5.0, "s", "between two heartbeats", _SETTING + "`heartbeat_ms`")
    resp_bytes: float = _cost(70.0, "bytes", "pattern, channel and RESP around a tick", "assumption")
    # Redis
    publish_us: float = _cost(0.7, "µs", "a plain PUBLISH", _REDIS + "136 bytes, no subscriber")
    deliver_us: float = _cost(0.14, "µs", "to each subscriber", _REDIS + "136 to 13,600 bytes")
    deliver_byte_us: float = _cost(0.00025, "µs", "each byte of it", _REDIS + "136 to 13,600 bytes")
    batch_us: float = _cost(28.0, "µs", "a batch of a Publisher", _REDIS + "batches of 1 to 1,000")
    batch_tick_us: float = _cost(5.7, "µs", "each tick of it", _REDIS + "batches of 1 to 1,000")
    command_us: float = _cost(
        1.35, "µs", "a command of the registry, in a pipeline", _REDIS + "connections come and go"
    )
    member_us: float = _cost(
        0.28, "µs", "each member that it adds, removes or reads", _REDIS + "connections come and go"
    )
    turn_us: float = _cost(13.0, "µs", "a pipeline that comes in and is answered", _REDIS + "one connection at a time")
    registry_kib: float = _cost(0.28, "KiB", "a connection in the registry", _REDIS + "memory")
    registry_code_kib: float = _cost(0.124, "KiB", "each code of it", _REDIS + "memory")
    registry_user_kib: float = _cost(0.94, "KiB", "its user, with session data", _MESSAGES + "in Redis")
    member_bytes: float = _cost(40.0, "bytes", "a member on its way to or from Redis", "assumption")
    record_bytes: float = _cost(280.0, "bytes", "the record of a node", _PROTOCOL + "a field of `qp:nodes`")

    @classmethod
    def assumptions(cls) -> list[str]:
        """The names of those that nobody has measured."""
        return [f.name for f in dataclasses.fields(cls) if f.metadata["source"].startswith("assumption")]

    def of_tick(self, size: float, *, is_row: bool) -> float:
        """Microseconds of the board for a tick of ``size`` bytes, between and beyond the two that were measured."""
        small, large = (self.small_row_us, self.large_row_us) if is_row else (self.small_tick_us, self.large_tick_us)
        return max(small / 2, small + (size - 136) * (large - small) / (693 - 136))
