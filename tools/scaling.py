#!/usr/bin/env python3
"""How many machines, cores, memory, network and Redis a number of viewers takes: the simulation of docs/scaling.md.

python tools/scaling.py --scenario three
python tools/scaling.py --viewers 200000 --each 30 --codes 10000 --ticks-per-s 20000 --max-rate 4
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from capacity.costs import Costs
from capacity.document import refreshed
from capacity.plan import plan
from capacity.report import as_json, as_text, comparison_table, costs_table
from capacity.workload import SCENARIOS, Workload

__all__ = ["main"]

_EXPLANATIONS = {"costs": costs_table, "check": comparison_table}


def _with_workload(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command a flag for each field of a workload."""
    for field in reversed(dataclasses.fields(Workload)):
        about = field.metadata
        unit = f" [{about['unit']}]" if about["unit"] else ""
        flag = "--" + field.name.replace("_", "-")
        text = f"{about['meaning']}{unit} [default: {field.default}]"
        if field.type is bool or field.type == "bool":
            command = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=text)(command)
        else:
            kind = int if isinstance(field.default, int) and field.type in (int, "int") else float
            command = click.option(flag, field.name, type=kind, metavar="N", help=text)(command)
    return command


def _costs(changes: tuple[str, ...]) -> Costs:
    names = {field.name for field in dataclasses.fields(Costs)}
    changed: dict[str, float] = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names:
            raise click.BadParameter(f"no constant {name!r}; --explain costs lists them", param_hint="--cost")
        try:
            changed[name] = float(value)
        except ValueError:
            raise click.BadParameter(f"{change!r} has no number", param_hint="--cost") from None
    return dataclasses.replace(Costs(), **changed)


@click.command(context_settings={"max_content_width": 110})
@click.option("--scenario", type=click.Choice(list(SCENARIOS)), help="Begin with one of the document's.")
@click.option("--cost", "changes", metavar="NAME=VALUE", multiple=True, help="Another value of a constant; repeated.")
@click.option(
    "--explain", type=click.Choice(list(_EXPLANATIONS)), help="The constants, or them beside what was measured."
)
@click.option("--refresh", metavar="FILE", help="Put into a document what its commands print now; nothing else.")
@click.option("--json", "is_json", is_flag=True, help="All figures as JSON.")
@_with_workload
def main(refresh: str | None, **options: Any) -> None:
    """Say what it takes to serve so many viewers, and what is first to end."""
    if refresh is None:
        click.echo(_answer(**options), nl=False)
        return
    document = Path(refresh)
    text = document.read_text(encoding="utf-8")
    document.write_text(refreshed(text, printed), encoding="utf-8")


def printed(arguments: Sequence[str]) -> str:
    """What the program prints for these arguments."""
    options = main.make_context("scaling.py", list(arguments)).params
    options.pop("refresh")
    return _answer(**options)


def _answer(scenario: str | None, changes: tuple[str, ...], explain: str | None, is_json: bool, **asked: Any) -> str:
    costs = _costs(changes)
    if explain is not None:
        return _EXPLANATIONS[explain](costs)
    title, work = SCENARIOS[scenario] if scenario is not None else ("", Workload())
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if value < 0 or (value == 0 and name in _ABOVE_ZERO):
            raise click.BadParameter("it is too small", param_hint="--" + name.replace("_", "-"))
    found = plan(dataclasses.replace(work, **given), costs)
    return as_json(found) + "\n" if is_json else as_text(found, title if not given else "")


_ABOVE_ZERO = (
    "viewers", "each", "codes", "ticks_per_s", "tick_bytes", "row_bytes", "cores", "memory_gib", "nic_gbit",
    "connections_each", "return_s", "headroom", "memory_headroom", "redis_gib", "registry_check_s",
    "registry_interval_s", "registry_ttl_s", "lease_s", "clusters",
)  # fmt: skip


if __name__ == "__main__":
    main()
