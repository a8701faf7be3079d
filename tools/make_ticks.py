#!/usr/bin/env python3
"""Write the small recording that tests replay: US and A-share quotes and trades as an unconsolidated feed sends them.

One line is one trade, one bid or one ask, as on the wire of an exchange; an empty cell is an unchanged field. The
ticks come from the simulator, so the file is ours, and the same version of this program writes the same lines.
"""

import gzip
import io
from pathlib import Path

import click

from quotepush.feed.replay import Tick
from quotepush.feed.simulate import Market

COLUMNS = ("ts", "code", "last", "last_size", "bid", "bid_size", "ask", "ask_size", "volume")
CODES = ("AAPL", "MSFT", "NVDA", "SPY", "AMZN", "600519.SH", "000001.SZ")
STARTED_AT_MS = 1_767_623_400_000  # 2026-01-05 14:30 UTC, a Monday
_SEED = 7
_MARKET_CODES = 40  # a market of well-known codes, of which only CODES are kept
_EVENTS = (("last", "last_size", "volume"), ("bid", "bid_size"), ("ask", "ask_size"))


def csv_lines(count: int) -> list[str]:
    """Return a header and ``count`` lines."""
    market = Market(_MARKET_CODES, _SEED)
    rows: dict[str, Tick] = {code: {} for code in CODES}
    lines = [",".join(COLUMNS)]
    now_ms = STARTED_AT_MS
    step = 0
    while len(lines) <= count:
        step += 1
        now_ms += 3 + step * 7 % 31
        for code, tick in market.ticks(now_ms, 3):
            row = rows.get(code)
            if row is None:
                continue
            changed = {name for name, value in tick.items() if value != row.get(name)}
            row.update(tick)
            for event in _EVENTS:
                if changed.intersection(event):
                    cells = {"ts": now_ms, "code": code} | {name: row[name] for name in event}
                    lines.append(",".join(str(cells.get(column, "")) for column in COLUMNS))
    return lines[: count + 1]


def compressed(lines: list[str]) -> bytes:
    """Return the lines as a gzip file that holds no time and no name."""
    target = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=target, compresslevel=9, mtime=0) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return target.getvalue()


@click.command()
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path), default="tests/data/us-ticks-small.csv.gz")
@click.option("--lines", "count", metavar="N", type=click.IntRange(1, 1_000_000), default=4000, show_default=True)
def main(target: Path, count: int) -> None:
    """Write TARGET (default: tests/data/us-ticks-small.csv.gz)."""
    target.write_bytes(compressed(csv_lines(count)))
    click.echo(f"{target}: {count:,} ticks, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
