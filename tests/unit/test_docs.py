"""What README.md and docs/ say is true: examples run, tables are complete, links lead somewhere."""

import ast
import asyncio
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import click
import pytest

from quotepush import Backend, settings
from quotepush.cli import cli
from quotepush.metrics import METRICS
from quotepush.quote.code import parse_code
from quotepush.quote.tick import KNOWN_FIELDS
from quotepush.wire.formats import JSON
from quotepush.wire.messages import CLOSE_CODES
from tests.support.examples import ROOT, Block, blocks_of, name_of, running
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until

README = ROOT / "README.md"
CHINESE = ROOT / "README.zh-CN.md"
PROTOCOL = ROOT / "docs" / "protocol.md"
OPERATIONS = ROOT / "docs" / "operations.md"
BACKENDS = ROOT / "docs" / "backends.md"
COMING_FROM = ROOT / "docs" / "coming-from.md"
SCALING = ROOT / "docs" / "scaling.md"
SETTINGS = ROOT / "docs" / "settings.md"
CLIENTS = ROOT / "docs" / "clients.md"
FEEDS = ROOT / "docs" / "feeds.md"
WRITTEN = [README, PROTOCOL, OPERATIONS]  # by hand and about what the code does; settings.md is generated
WORDED = [*WRITTEN, CLIENTS, BACKENDS, FEEDS, COMING_FROM, SCALING]  # their examples have tests of their own
ALL = sorted({README, CHINESE, *(ROOT / "docs").glob("*.md")})

# Words in code spans that belong to other programs.
FOREIGN = {"proxy_read_timeout", "proxy_buffering", "worker_shutdown_timeout", "stream_close_delay"}


# --- reading Markdown -----------------------------------------------------------------------------------------------


@cache
def prose_of(path: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def spans_of(path: Path) -> list[str]:
    prose = prose_of(path)
    if path == COMING_FROM:  # the first cells of its tables have the words of others
        prose = re.sub(r"^\|[^|\n]*\|", "|", prose, flags=re.M)
    return re.findall(r"`([^`\n]+)`", prose)


def sections_of(path: Path) -> Iterator[tuple[str, str]]:
    """Headings and what stands below each up to the next one."""
    parts = re.split(r"^#+ (.+)$", prose_of(path), flags=re.M)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def tables_of(path: Path, heading: str) -> list[list[list[str]]]:
    """The tables of one section: rows of cells, the head of each table first."""
    (text,) = [text for title, text in sections_of(path) if title == heading]
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if not line.startswith("|"):
            if tables[-1]:
                tables.append([])
        elif not set(line) <= set("| -"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [table for table in tables if table]


def words_of(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def first_cells(table: list[list[str]], column: int = 0) -> list[str]:
    """All code spans of one column, without the head."""
    return [word for row in table[1:] for word in words_of(row[column])]


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def json_values(text: str) -> list[Any]:
    """The JSON values of a block, one after the other."""
    decoder = json.JSONDecoder(parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    values = []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


def without_comments(text: str) -> str:
    return re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda m: m[1] or "", text)


# --- reading the code -----------------------------------------------------------------------------------------------


@cache
def trees(folder: str = "") -> tuple[ast.Module, ...]:
    return tuple(
        ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "quotepush" / folder).rglob("*.py"))
    )


def calls(nodes: Iterable[ast.AST], *names: str) -> Iterator[ast.Call]:
    for tree in nodes:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                yield node


def constant(node: ast.AST | None, kind: type) -> Any:
    return node.value if isinstance(node, ast.Constant) and type(node.value) is kind else None


@cache
def words_in_code() -> frozenset[str]:
    """Every name of an argument, a field or an attribute in the package, and every word of its texts but docstrings."""
    words: set[str] = set()
    for tree in trees():
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                if isinstance(node.value, (str, bytes)):
                    text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
                    words |= set(re.findall(r"\w+", text))
            elif isinstance(node, ast.keyword | ast.arg):
                words.add(node.arg or "")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                words.add(node.target.id)
    return frozenset(words)


def metric_names() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name as Prometheus shows it → kind and labels."""
    return {
        f"quotepush_{name}{'_total' if kind == 'counter' else ''}": (kind, labels)
        for name, (kind, _, labels) in METRICS.items()
    }


def tool(name: str) -> click.Command:
    """The command of a program in tools/."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    command = module.main
    assert isinstance(command, click.Command)
    return command


def feed_command() -> click.Command:
    return tool("feed")


def scaling_command() -> click.Command:
    if str(ROOT / "tools") not in sys.path:  # its package stands beside it
        sys.path.insert(0, str(ROOT / "tools"))
    return tool("scaling")


def flags_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


# --- form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_json_example_is_json(path: Path) -> None:
    for block in blocks_of(path):
        if block.language in ("json", "jsonc"):
            text = without_comments(block.text) if block.language == "jsonc" else block.text
            try:
                assert json_values(text), f"{block}: empty"
            except json.JSONDecodeError as e:
                pytest.fail(f"{block}: {e}")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_link_inside_the_project_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name_of(path)} links to {target}, which does not exist"
        if anchor:
            anchors = {anchor_of(heading) for heading, _ in sections_of(found)}
            assert anchor in anchors, f"{name_of(path)} links to {target}, but there is no such heading"


# --- every word is one of the code's --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORDED, ids=name_of)
def test_every_setting_and_word_of_the_wire_exists_in_the_code(path: Path) -> None:
    known = words_in_code() | FOREIGN | metric_names().keys() | set(dir(Backend))
    if path == SCALING:
        scaling_command()
        known |= set(sys.modules["capacity.costs"].Costs.__dataclass_fields__)  # the constants that it names
    for span in spans_of(path):
        span = re.sub(r"<\w+>", "", span)  # a place that the reader fills
        for word in re.findall(r"(?<![\w$./-])[a-z]+(?:_[a-z0-9]+)+(?![\w.])", span):
            assert word in known, f"{name_of(path)} speaks of `{word}`, which is nowhere in the code"


@pytest.mark.parametrize("path", WORDED, ids=name_of)
def test_every_flag_and_variable_exists(path: Path) -> None:
    flags = flags_of(feed_command()).union(*(flags_of(command) for command in cli.commands.values()))
    names = settings.Settings.__dataclass_fields__.keys()
    variables = {settings.ENV_PREFIX + name.upper() for name in names}
    variables |= {f"{settings.ENV_PREFIX}{role}_REDIS_PASSWORD" for role in ("FEED", "REGISTRY")}
    variables |= {str(option.envvar) for command in cli.commands.values() for option in command.params if option.envvar}
    if path == SCALING:
        flags |= flags_of(scaling_command())
    for span in spans_of(path):
        if span.startswith("--"):
            assert span.split()[0] in flags, f"{name_of(path)} speaks of {span}, which no command has"
        if span.startswith(settings.ENV_PREFIX) and span.strip("_…") != settings.ENV_PREFIX.strip("_"):
            assert span in variables, f"{name_of(path)} speaks of {span}, which nothing reads"


@pytest.mark.parametrize("path", WORDED, ids=name_of)
def test_every_default_in_brackets_is_the_default(path: Path) -> None:
    seconds = {"s": 1, "h": 3600, "days": 86_400}
    defaults = settings.Settings.__dataclass_fields__
    for name, number, unit in re.findall(r"`([a-z_]+)`\s\(([\d.,]+) (s|ms|bytes|h|days)\)", prose_of(path)):
        if name in defaults:
            in_ms = 1000 if name.endswith("_ms") and unit in seconds else 1
            said = float(number.replace(",", "")) * seconds.get(unit, 1) * in_ms
            assert said == pytest.approx(defaults[name].default), (
                f"{name_of(path)}: `{name}` ({number} {unit}) is not its default"
            )


def test_the_table_of_metrics_is_complete() -> None:
    (table,) = tables_of(OPERATIONS, "Metrics")
    said = {words_of(row[0])[0]: (row[1], tuple(words_of(row[2]))) for row in table[1:]}
    assert said == metric_names()


def test_the_table_of_tick_fields_is_complete() -> None:
    fields, _ = tables_of(PROTOCOL, "The tick")
    assert sorted(first_cells(fields)) == sorted({*KNOWN_FIELDS, "code", "seq", "prev", "ts"})


def test_the_table_of_refusals_is_complete() -> None:
    _, reasons = tables_of(PROTOCOL, "The tick")
    raised = {constant(call.args[0], str) for call in calls(trees("quote"), "BadTick")}
    assert set(first_cells(reasons)) == raised - {None}


def test_the_table_of_spellings_is_right() -> None:
    (table,) = tables_of(PROTOCOL, "Codes")
    for spellings, canonical in table[1:]:
        for spelling in words_of(spellings):
            assert [parse_code(spelling)] == words_of(canonical)


def test_the_table_of_errors_is_complete() -> None:
    sources = [*trees("wire"), *trees("push"), *trees("node")]
    said = {constant(call.args[0], str) for call in calls(sources, "PeerError", "RequestError") if call.args}
    answers = [word.value for call in calls(sources, "Sent") for word in call.keywords if word.arg == "error"]
    said |= {constant(answer, str) for answer in answers}  # what main says to a client's message
    for node in (node for tree in sources for node in ast.walk(tree)):
        if isinstance(node, ast.Dict):
            keys = [constant(key, str) for key in node.keys]
            said |= {constant(value, str) for key, value in zip(keys, node.values, strict=True) if key == "error"}
        elif isinstance(node, ast.DictComp):  # codes that main refuses
            said.add(constant(node.value, str))
    (table,) = tables_of(PROTOCOL, "Errors")
    assert set(first_cells(table)) == said - {None}


def test_the_table_of_close_codes_is_complete() -> None:
    (table,) = tables_of(PROTOCOL, "Close codes")
    said = {words_of(row[1])[0]: int(row[0]) for row in table[1:] if words_of(row[1])}
    assert said == {**CLOSE_CODES, "protocol_error": 1002}


def test_the_table_of_http_refusals_is_complete() -> None:
    (table,) = tables_of(PROTOCOL, "HTTP")
    made = {
        (constant(call.args[1], int), constant(call.args[2], str))
        for call in calls(trees("push"), "refuse")
        if len(call.args) > 2 and constant(call.args[2], str)  # else the word of a request's error, as in a message
    }
    assert {(int(row[0]), words_of(row[1])[0]) for row in table[1:]} == made


# --- generated files ------------------------------------------------------------------------------------------------


def test_the_table_of_settings_is_the_generated_one() -> None:
    assert SETTINGS.read_text(encoding="utf-8") == settings.markdown(), (
        "run: quotepush settings --format markdown > docs/settings.md"
    )


def test_the_example_file_is_the_generated_one() -> None:
    assert (ROOT / "quotepush.example.toml").read_text(encoding="utf-8") == settings.example_toml(), (
        "run: quotepush settings > quotepush.example.toml"
    )


# --- the conversation of docs/protocol.md ---------------------------------------------------------------------------

_OF_THE_MOMENT = {"time", "ts", "conn", "conn_key", "epoch", "server", "cols"}


def timeless(value: Any) -> Any:
    """``value`` with everything that differs from run to run replaced by its type."""
    if isinstance(value, dict):
        return {k: type(v).__name__ if k in _OF_THE_MOMENT else timeless(v) for k, v in value.items()}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return value


async def next_message(socket: aiohttp.ClientWebSocketResponse) -> Any:
    while True:
        message = json.loads(await socket.receive_str(timeout=10))
        if message["type"] != "heartbeat":
            return message


async def test_the_conversation_happens_as_written(
    quotepush_server: QuotepushServer, redis_server: RedisServer
) -> None:
    blocks = [block for block in blocks_of(PROTOCOL) if "conversation" in block.tags]
    published = 0
    played = 0
    async with (
        redis_server.client() as redis,
        aiohttp.ClientSession() as http,
        http.ws_connect(quotepush_server.ws_url, protocols=[JSON.subprotocol]) as socket,
    ):
        for block in blocks:
            if block.language == "sh":
                program, command, channel, payload = shlex.split(block.text)
                assert (program, command) == ("redis-cli", "PUBLISH"), block
                await redis.publish(channel, payload)
                published += 1

                async def is_taken(count: int = published) -> bool:
                    return await quotepush_server.metric("ticks_accepted") == count

                await wait_until(is_taken, what=f"{block}: the tick is taken")
                continue
            for said in json_values(block.text):
                if "type" in said:
                    heard = await next_message(socket)
                    assert timeless(heard) == timeless(said), block
                    played += 1
                else:
                    await socket.send_str(json.dumps(said))
    assert played > 10


def test_the_chinese_readme_says_what_the_english_one_says() -> None:
    def frame_of(path: Path) -> tuple[list[str], int, list[str], list[str]]:
        """What both have alike: examples, sections, links and words in code spans."""
        links = re.findall(r"\]\(([^)\s]+)\)", prose_of(path).replace("-zh.png)", ".png)"))  # the page in its language
        return (
            [block.text for block in blocks_of(path)],
            len(list(sections_of(path))),
            sorted(link for link in links if not link.startswith(("README", "#"))),
            sorted(set(spans_of(path))),
        )

    assert frame_of(CHINESE) == frame_of(README)


# --- the examples of README.md ----------------------------------------------------------------------------------------


def examples(language: str) -> list[Block]:
    """The clients."""
    return [block for block in blocks_of(README) if block.language == language and "Publisher" not in block.text]


PUBLISHERS = [block for path in (README, PROTOCOL) for block in blocks_of(path) if "Publisher(" in block.text]


async def watch_prices(output: asyncio.StreamReader, redis_server: RedisServer) -> None:
    """A client that prints rows shows one that was there before it, and one that came later."""

    async def until(wanted: str) -> None:
        while True:
            line = (await output.readline()).decode()
            assert line, f"the example ended before it printed {wanted}"
            if line.split() == wanted.split():
                return

    async with asyncio.timeout(30), redis_server.client() as redis:
        await until("AAPL 199.5 0.71")
        await redis.publish("quote.sh600519", '{"last":1688,"prev_close":1675.5}')
        await until("600519.SH 1688 0.75")


async def publish_first_price(server: QuotepushServer, redis_server: RedisServer) -> None:
    async with redis_server.client() as redis:
        await redis.publish("quote.AAPL", '{"last":199.5,"prev_close":198.1}')

    async def is_taken() -> bool:
        return await server.metric("ticks_accepted") == 1

    await wait_until(is_taken)


def for_server(block: Block, server: QuotepushServer) -> str:
    assert "127.0.0.1:8008" in block.text, f"{block} connects somewhere else"
    return block.text.replace("127.0.0.1:8008", f"127.0.0.1:{server.port}")


@pytest.mark.parametrize("example", examples("python"), ids=str)
async def test_the_python_clients_of_the_readme_print_prices(
    example: Block, quotepush_server: QuotepushServer, redis_server: RedisServer, tmp_path: Path
) -> None:
    script = tmp_path / "example.py"
    script.write_text(for_server(example, quotepush_server), encoding="utf-8")
    await publish_first_price(quotepush_server, redis_server)
    async with running(sys.executable, "-u", str(script)) as output:
        await watch_prices(output, redis_server)


@pytest.mark.parametrize("example", PUBLISHERS, ids=str)
async def test_the_publishers_of_the_documents_publish(
    example: Block, redis_server: RedisServer, tmp_path: Path
) -> None:
    assert "redis://127.0.0.1:6379/0" in example.text
    script = tmp_path / "example.py"
    script.write_text(example.text.replace("redis://127.0.0.1:6379/0", redis_server.url), encoding="utf-8")
    async with running(sys.executable, "-u", str(script)) as output:
        assert (await output.read()).split() in ([], [b"[1,", b"1]"])
    async with redis_server.client() as redis:
        assert await redis.hget("qp:row:600519.SH", "last") == "1688.2"
        assert await redis.hget("qp:seq", "AAPL") == "1"


@cache
def flags_for_websocket_in_node() -> tuple[str, ...] | None:
    """What node must be started with to have WebSocket as browsers have it; None: it has not."""
    import subprocess

    node = shutil.which("node")
    for flags in ((), ("--experimental-websocket",)) if node else ():
        found = subprocess.run(
            [node or "", *flags, "-e", "console.log(typeof WebSocket)"], capture_output=True, text=True, check=False
        )
        if found.stdout.strip() == "function":
            return flags
    return None


@pytest.mark.parametrize("example", examples("js"), ids=str)
async def test_the_javascript_client_of_the_readme_prints_prices(
    example: Block, quotepush_server: QuotepushServer, redis_server: RedisServer, tmp_path: Path
) -> None:
    flags = await asyncio.to_thread(flags_for_websocket_in_node)
    if flags is None:
        pytest.skip("no node with WebSocket on PATH: it takes Node 22, or 20.10 with a flag")
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "quotepush").symlink_to(ROOT / "quotepush" / "static")
    script = tmp_path / "example.mjs"
    script.write_text(for_server(example, quotepush_server), encoding="utf-8")
    await publish_first_price(quotepush_server, redis_server)
    async with running("node", *flags, str(script)) as output:
        await watch_prices(output, redis_server)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_of(path: Path) -> list[tuple[Block, str]]:
    lines = [(block, line) for block in blocks_of(path) if block.language == "sh" for line in block.text.splitlines()]
    return [(block, re.sub(r"\s+# .*", "", line)) for block, line in lines if line.strip()]


def check_without_running(command: str) -> bool:
    """Look at a command that a test cannot run; False: it can."""
    words = shlex.split(command)
    if words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), command
        return True
    if words[:2] == ["quotepush", "serve"]:
        cli.commands["serve"].make_context("serve", words[2:]).close()
        return True
    return words[:2] == ["pip", "install"] or words[0] == "systemctl"


def program_of(command: str) -> str:
    return shlex.split(command)[0]


def is_here(program: str) -> bool:
    return program in ("python", "quotepush") or shutil.which(program) is not None


async def shows_a_price(command: str, cwd: Path) -> None:
    """A command that prints rows prints one that was published before it, and ends well with Ctrl-C."""
    process = await asyncio.create_subprocess_shell(f"exec {command}", cwd=cwd, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            while line := await process.stdout.readline():
                if json.loads(line).get("last") in (199.5, 199.7):
                    break
            assert line, f"{command} ended before it showed a price"
            process.send_signal(signal.SIGINT)
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 0, f"{command}\n{errors.decode()}"


@pytest.mark.parametrize("path", [*WRITTEN, FEEDS], ids=name_of)
async def test_the_commands_work_as_written(
    path: Path, start_server: Callable[..., Any], redis_server: RedisServer, tmp_path: Path
) -> None:
    for name in ("tools", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    server = await start_server()
    here = {
        "python ": f"{sys.executable} ",
        "quotepush ": f"{sys.executable} -m quotepush ",
        "redis-cli ": f"redis-cli -p {redis_server.port} ",
        "redis://127.0.0.1:6379": f"redis://127.0.0.1:{redis_server.port}",
        "127.0.0.1:8008": f"127.0.0.1:{server.port}",
        "127.0.0.1:8009": f"127.0.0.1:{server.admin_port}",
    }
    for block, command in commands_of(path):
        if check_without_running(command) or not is_here(program_of(command)):
            continue
        line = re.sub("|".join(map(re.escape, here)), lambda match: here[match[0]], command)
        if command.startswith("quotepush watch"):
            await shows_a_price(f"{line} --url {server.url}", tmp_path)
            continue
        if command.startswith(("quotepush publish", "quotepush send")):
            line += f" --redis {redis_server.url}"
        process = await asyncio.create_subprocess_shell(line, cwd=tmp_path, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
        output, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, f"{block}: {command}\n{errors.decode()}"
        if " PUBLISH " in command:
            assert output == b"1\n", f"{block}: {command} was heard by {output.decode()}"
        if "tools/feed.py" in command:
            assert b" 0 bad lines" in output, f"{block}: {command}\n{output.decode()}"


def test_the_flags_of_the_feed_in_the_readme_exist() -> None:
    flags = flags_of(feed_command())
    lines = [command for _, command in commands_of(README) if "tools/feed.py" in command]
    assert lines
    for line in lines:
        assert {word for word in shlex.split(line) if word.startswith("--")} <= flags


# --- docs/backends.md -------------------------------------------------------------------------------------------------


async def output_of(*command: str, environment: dict[str, str]) -> str:
    """What a program of the reader's prints; it must end well."""
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=environment)
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, f"{command}\n{errors.decode()}"
    return output.decode()


async def test_the_examples_for_backends_work_as_written(
    start_server: Callable[..., Any], redis_server: RedisServer
) -> None:
    token = "the token of a test"[::-1].replace(" ", "-")
    server = await start_server(api_token=token, events=True)
    environment = os.environ | {"QUOTEPUSH_API_TOKEN": token, "QUOTEPUSH_FEED_REDIS": redis_server.url}

    def here(text: str) -> str:
        text = text.replace("redis://127.0.0.1:6379/0", redis_server.url)
        text = re.sub(r"^quotepush ", f"{sys.executable} -m quotepush ", text).replace("127.0.0.1:8008", server.url[7:])
        return text.replace("127.0.0.1:8009", f"127.0.0.1:{server.admin_port}")

    async def run(block: Block) -> str:
        return await output_of(sys.executable, "-u", "-c", here(block.text), environment=environment)

    python = {
        key: block for block in blocks_of(BACKENDS) if block.language == "python" for key in _KEYS if key in block.text
    }
    assert len(python) == len([block for block in blocks_of(BACKENDS) if block.language == "python"]) == len(_KEYS)
    async with aiohttp.ClientSession() as http, http.ws_connect(server.ws_url) as socket:
        hello = await next_message(socket)
        program = "-u", "-c", here(python["events()"].text)
        async with running(sys.executable, *program) as events, redis_server.client() as redis:

            async def are_heard() -> bool:
                ((_, hearers),) = await redis.pubsub_numsub("qp:events")
                return hearers > 0

            await wait_until(are_heard, 30)
            # One after the other: the second binds the connection that the others speak of.
            assert await run(python[_KEYS[0]]) == "1 connections took it\n"
            assert await run(python[_KEYS[1]]) == "1 connections took it\n"
            assert [(await next_message(socket))["from"] for _ in range(2)] == ["all", "user"]
            assert await run(python["entitle_user"]) == "1 connections may see Shanghai now\n"
            assert (await next_message(socket))["state"] == "limits"
            assert await run(python[".page("]) == f"{hello['conn']}\n1 1 True\n"
            opening, pause = (await run(python["cancel_job"])).splitlines()[:2]
            at_ms = int(datetime(2099, 7, 27, 1, 25, tzinfo=UTC).timestamp()) * 1000
            assert opening == f"{at_ms} {{'title': 'Markets open in five minutes'}}"
            assert pause == f"{at_ms + 3_600_000} Take a break"
            async with running(sys.executable, "-u", "-c", here(python["ALERTS"].text)) as alerts:

                async def are_watched() -> bool:
                    return await redis.scard("qp:code:600519.SH") == 1

                await wait_until(are_watched, 30)
                for last, user in ((1699, ""), (1749, "ann"), (1751, "bob")):
                    await redis.publish("quote.sh600519", json.dumps({"last": last}))
                    if user:
                        assert await asyncio.wait_for(alerts.readline(), 30) == f"told {user}\n".encode()
            news = (await next_message(socket))["data"]
            assert news == {"title": "600519.SH is at 1749", "text": "You asked for 1700.0", "code": "600519.SH"}
            while "user_online" not in (line := (await asyncio.wait_for(events.readline(), 30)).decode()):
                assert line
        for block, command in commands_of(BACKENDS):
            if command.startswith("export") or check_without_running(command) or not is_here(program_of(command)):
                continue
            output = await output_of("sh", "-c", here(command), environment=environment)
            if "/send" in command:
                assert json.loads(output)["delivered"] == 1, block
                assert (await next_message(socket))["data"] == {"title": "Order filled"}
            elif command.startswith("curl"):
                assert "error" not in json.loads(output), block
        if shutil.which("php"):
            (block,) = (block for block in blocks_of(BACKENDS) if block.language == "php")
            output = await output_of("php", "-r", here(block.text), environment=environment)
            assert json.loads(output)["delivered"] == 1


# What names each of the Python examples of docs/backends.md.
_KEYS = (
    'title": "Markets open in five minutes"})', 'Order filled", ', ".page(", "entitle_user", "events()", "cancel_job",
    "ALERTS",
)  # fmt: skip


def test_the_table_of_gatewayworker_names_calls_that_exist() -> None:
    from quotepush.node.api_routes import ROUTES

    (table,) = tables_of(BACKENDS, "Coming from GatewayWorker")
    routes = {f"{route.method} {route.path}" for route in ROUTES}
    for _, library, http, command in table[1:]:
        for call in words_of(library):
            assert call == "user" or hasattr(Backend, call.partition("(")[0]), call
        assert set(words_of(http)) <= routes, http
        for words in words_of(command):
            first, second, *_ = [*words.split(), ""]
            found = cli.commands[first]
            assert not isinstance(found, click.Group) or not second or second in found.commands, words
            if second.startswith("--"):
                assert second in flags_of(found), words


def test_the_calls_that_stand_for_those_of_others_exist() -> None:
    from quotepush.node.api_routes import ROUTES

    routes = {f"{route.method} {route.path}" for route in ROUTES}
    calls = 0
    for heading in ("Swoole calls", "Workerman", "distribute-ws", "Ratchet"):
        (table,) = tables_of(COMING_FROM, heading)
        for _, ours, _ in table[1:]:
            for word in words_of(ours):
                if re.match(r"[A-Z]+ /api|[A-Z]+ /(conns|sessions|stats|send)", word):
                    assert word in routes, word
                elif call := re.match(r"(\w+)\(", word):
                    assert hasattr(Backend, call[1]), word
                    calls += 1
                elif word.startswith("quotepush "):
                    assert word.split()[1] in cli.commands, word
    assert calls > 30


def test_no_word_of_others_is_explained_twice_in_a_table() -> None:
    headings = ("Swoole settings", "Swoole callbacks", "Swoole calls", "distribute-ws")
    for path, heading in [*((COMING_FROM, each) for each in headings), (BACKENDS, "Coming from GatewayWorker")]:
        (table,) = tables_of(path, heading)
        words = [word for word in first_cells(table) if word not in ("host", "port")]
        assert sorted(words) == sorted(set(words)), heading


def test_the_table_of_the_errors_of_backends_is_complete() -> None:
    from quotepush.node.api import STATUSES

    (table,) = tables_of(BACKENDS, "Errors")
    said = {word for row in table[1:] for word in words_of(row[2])}
    assert said == STATUSES.keys()
    for row in table[1:]:
        statuses = {int(number) for number in row[1].split(", ")}
        assert {STATUSES[word] for word in words_of(row[2])} == statuses
