"""The command line: ``quotepush serve | demo | check | watch | publish``, and what backends call (``commanding``).

Flags, the environment and the file are described in docs/settings.md. A fault of the user's
gets one line that says what to do, never a traceback.
"""

import asyncio
import dataclasses
import gc
import sys
from collections.abc import Callable
from typing import Any

import click

from quotepush import __version__
from quotepush import settings as settings_module
from quotepush.commanding import COMMANDS
from quotepush.errors import OperatorError, SettingsError
from quotepush.settings import Settings, flag_type
from quotepush.store.address import without_password

__all__ = ["main"]

# Flags with another name than their setting.
_FLAG_NAMES = {"feed_redis": ("--redis", "--feed-redis")}
_HOME_FLAGS = ("host", "port", "workers", "feed_redis", "node", "lock_file", "admin_host", "admin_port")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="quotepush")
def cli() -> None:
    """Self-hosted stock-quote push server: ticks from Redis to everybody who watches the code."""


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --config and one flag per setting; the best known ones first."""
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    order = [*_HOME_FLAGS, *(name for name in fields if name not in _HOME_FLAGS)]
    for name in reversed(order):
        metadata = fields[name].metadata
        flags = _FLAG_NAMES.get(name, ("--" + name.replace("_", "-"),))
        unit = f" [{metadata['unit']}]" if metadata["unit"] else ""
        metavar = "YES/NO" if flag_type(name) is bool else name.rpartition("_")[2].upper()
        command = click.option(*flags, name, metavar=metavar, help=metadata["doc"] + unit)(command)
    return click.option("--config", metavar="FILE", envvar="QUOTEPUSH_CONFIG", help="TOML file with settings.")(command)


@cli.command()
@_with_settings
def serve(config: str | None, **flags: Any) -> None:
    """Run the server in the foreground.

    Prints one line beginning with "quotepush ready" when every worker accepts connections. Exit codes: 1 try
    again (Redis, port), 2 a setting is wrong, 3 another one is running already.
    """
    gc.disable()  # while we start; see quotepush.node.collector
    from quotepush.node.main import serve as run_server

    run_server(settings_module.load(config, flags=flags), lambda line: print(line, flush=True))


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the page.")
@click.option("--port", default=8008, show_default=True, help="Port of the page.")
@click.option("--codes", default=3000, show_default=True, help="How many codes tick.")
@click.option("--rate", default=1000.0, show_default=True, metavar="TICKS_PER_S", help="Ticks a second, on average.")
@click.option("--seed", default=1, show_default=True, help="The same seed makes the same market.")
def demo(host: str, port: int, codes: int, rate: float, seed: int) -> None:
    """Show it all: a private Redis, the server, a simulated market and the ticker page. Ctrl-C ends it."""
    from quotepush.demo import DemoOptions, run_demo

    run_demo(DemoOptions(host, port, codes, rate, seed), lambda line: print(line, flush=True))


@cli.command()
@_with_settings
def check(config: str | None, **flags: Any) -> None:
    """Name every fault of a configuration at once; start nothing."""
    settings = settings_module.load(config, flags=flags)
    click.echo(f"the configuration is right: node {settings.node}, {settings.worker_count} workers, ", nl=False)
    click.echo(f"Redis at {without_password(settings.feed_redis)}, ", nl=False)
    if not settings.has_tokens:
        click.echo("no tokens: everybody may subscribe")
    else:
        click.echo("clients may come without a token" if settings.anonymous else "every client needs a token")


@cli.command()
@click.argument("codes", metavar="CODE...", nargs=-1, required=True)
@click.option("--url", default="http://127.0.0.1:8008", show_default=True, help="Address of the server.")
@click.option("--fields", metavar="NAME,...", help="Only these fields of a row, e.g. last,change_pct,bids.")
@click.option(
    "--max-rate", type=click.FloatRange(min=0, min_open=True), metavar="N", help="Most rows a second and code."
)
@click.option(
    "--token",
    metavar="TOKEN",
    envvar="QUOTEPUSH_TOKEN",
    show_envvar=True,
    help="For a server that wants one. On the command line every user of this machine can read it.",
)
@click.option(
    "--token-file", metavar="FILE", help="Its text is the token, read again before it expires. Wins over --token."
)
@click.option("--up", type=click.Choice(["red", "green"]), default="red", show_default=True, help="Rising prices.")
@click.option("--json", "is_json", is_flag=True, help="One JSON row a line, also on a terminal.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), metavar="N", help="End after N seconds.")
def watch(codes: tuple[str, ...], fields: str | None, **options: Any) -> None:
    """Show live quotes as a table, or as one JSON row a line when standard output is no terminal.

    Every row is shown, also those that were missed while the connection was lost; what cannot be had any more is
    counted under "gaps", or said on standard error. Ctrl-C ends it.

    Exit codes: 0 it was ended: by Ctrl-C, SIGTERM, --seconds or a closed pipe; 1 there was no connection within
    --seconds; 2 the server refuses us or all the codes, or an option is wrong.
    """
    from quotepush.watching import WatchOptions, run

    view = None if fields is None else tuple(name.strip() for name in fields.split(",") if name.strip())
    if view == ():
        raise SettingsError(["--fields: name at least one, such as last"])
    sys.exit(run(codes, WatchOptions(fields=view, **options)))


@cli.command()
@click.argument("code", required=False)
@click.argument("fields", metavar="[FIELD=VALUE]...", nargs=-1)
@click.option("--json", "text", metavar="TICK", help='Instead: {"code":…,"last":…}, or - for one per line of stdin.')
@click.option("--redis", "url", metavar="URL", help="Redis that the server listens to  [default: as for serve]")
@click.option("--prefix", help="The server's redis_prefix  [default: as for serve]")
@click.option("--plain", is_flag=True, help="Plain PUBLISH on a channel: no log, nothing is caught up.")
@click.option("--channel", metavar="TEMPLATE", help="With --plain: where ticks go  [default: quote.{code}]")
def publish(
    code: str | None,
    fields: tuple[str, ...],
    text: str | None,
    url: str | None,
    prefix: str | None,
    plain: bool,
    channel: str | None,
) -> None:
    """Publish ticks by hand, and say which seq each has; with --plain, how many subscribers it had.

    An empty VALUE clears the field. Exit codes: 1 no Redis, 2 something in a tick is wrong.
    """
    from quotepush.publishing import run

    if channel is not None and not plain:
        raise SettingsError(["--channel belongs to --plain"])
    flags = {name: value for name, value in (("feed_redis", url), ("redis_prefix", prefix)) if value is not None}
    found = settings_module.load(flags=flags)
    if plain and channel is None:
        channel = "quote.{code}"
    sys.exit(run(code, fields, text, found.feed_redis, found.redis_prefix, channel))


@cli.group()
def token() -> None:
    """Make and check tokens, and make keys for them."""


_TOKEN_CLAIMS = (
    ("--sub", "USER", str, "The user."),
    ("--codes", "PATTERN,...", str, "Codes that he may see, e.g. *.SH,AAPL; all without it."),
    ("--max-rate", "N", float, "Most rows a second and code."),
    ("--max-codes", "N", int, "Most codes on one connection."),
    ("--max-conns", "N", int, "Most connections."),
    ("--conns-win", "WHICH", str, "Which connections stay when there are more: newest or oldest."),
    ("--delay-s", "SECONDS", int, "How old his quotes are."),
    ("--groups", "NAME,...", str, "Groups that he is in."),
    ("--aud", "NAME", str, "For whom the token is."),
    ("--iss", "NAME", str, "Who has made it."),
)


def _with_claims(command: Callable[..., None]) -> Callable[..., None]:
    for flag, metavar, kind, text in reversed(_TOKEN_CLAIMS):
        command = click.option(flag, metavar=metavar, type=kind, help=text)(command)
    return command


_config = click.option("--config", metavar="FILE", envvar="QUOTEPUSH_CONFIG", help="TOML file with settings.")


@token.command("make")
@_with_claims
@click.option("--claim", "others", metavar="NAME=JSON", multiple=True, help="Any other claim, such as may_send={...}.")
@click.option("--ttl", default="1h", show_default=True, metavar="TIME", help="How long it lasts: 90s, 30m, 7d, never.")
@click.option("--key-file", metavar="FILE", help="Secret, or private key as PEM  [default: the server's own secret]")
@click.option("--kid", metavar="NAME", help="How the key is called in a JWKS.")
@_config
def make_token(
    others: tuple[str, ...], ttl: str, key_file: str | None, kid: str | None, config: str | None, **claims: Any
) -> None:
    """Print a token.

    Without --key-file it is signed with the secret of the configuration (token_key, token_key_file).
    """
    from quotepush import tokens

    found = settings_module.load(config)
    click.echo(tokens.make(tokens.claims_of(claims, others, ttl, found), key_file, kid, found))


@token.command("check")
@click.argument("text", metavar="[TOKEN]", required=False, envvar="QUOTEPUSH_TOKEN")
@click.option("--token-key-file", metavar="FILE,...", help="Keys, instead of those of the configuration.")
@_config
def check_token(text: str | None, token_key_file: str | None, config: str | None) -> None:
    """Say what a server would say to a token, and what is in it, as JSON.

    The token comes from standard input with "-" or without TOKEN, or from QUOTEPUSH_TOKEN: every user of this
    machine can read a command line. Exit codes: 0 it would be taken, 1 it would be refused, 2 a setting is wrong.
    """
    import orjson

    from quotepush import tokens

    found = settings_module.load(config, flags={"token_key_file": token_key_file})
    is_taken, said = tokens.check(tokens.read_token(text), found)
    click.echo(orjson.dumps(said, option=orjson.OPT_INDENT_2).decode())
    sys.exit(0 if is_taken else 1)


@token.command("keygen")
@click.option(
    "--alg",
    type=click.Choice(["EdDSA", "ES256", "RS256", "HS256"]),
    default="EdDSA",
    show_default=True,
    help="HS256 is one secret for both sides; of the others the server has the public half only.",
)
@click.option("--out", default="token.key", show_default=True, metavar="FILE", help="The public half goes to FILE.pub.")
def keygen(alg: str, out: str) -> None:
    """Make a key for tokens; no file is overwritten."""
    from quotepush import tokens

    files = tokens.keygen(alg, out)
    click.echo(f"sign with {files[0]}; the server's token_key_file is {files[-1]}")


@cli.command()
@click.option("--format", "form", type=click.Choice(["toml", "markdown"]), default="toml", show_default=True)
def settings(form: str) -> None:
    """Print every setting with its default: an example file, or the table of the docs."""
    click.echo(settings_module.example_toml() if form == "toml" else settings_module.markdown(), nl=False)


for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Run the command line; the process's entry point."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(2)
    except SettingsError as e:
        for fault in e.faults:
            print(f"quotepush: {fault}", file=sys.stderr)
        sys.exit(e.exit_code)
    except OperatorError as e:
        print(f"quotepush: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
