"""The house rules of docs/architecture.md that no linter knows: who may import whom, who reads the environment."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "quotepush"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# What each wing may import besides itself: only what stands below it. ingest, push and cluster do not know each other.
GROUND = {"errors", "token_keys", "entitlement", "auth", "store", "settings", "metrics"}
PURE = {"errors", "quote", "wire"}
CLIENT = {
    "client_errors", "client_events", "client_frame", "client_link", "client_messages", "client_questions",
    "client_rows", "client_state", "client_token",
}  # fmt: skip
FLOORS: dict[str, set[str]] = {
    "errors": set(),
    "together": set(),
    "metrics": set(),
    "token_keys": {"errors"},
    "quote": {"errors"},
    "entitlement": {"quote"},
    "auth": {"errors", "token_keys", "entitlement"},
    "store": {"errors"},
    "settings": {"errors", "token_keys", "entitlement", "store"},
    "wire": {"errors", "quote"},
    "ingest": PURE | {"store", "together"},
    "push": PURE | {"entitlement", "auth", "settings"},
    "cluster": PURE | {"settings", "store"},
    "node": GROUND | PURE | {"ingest", "push", "cluster", "quotepush", "backend", "backend_sending"},
    # Programs of their own beside the server, and the libraries for other programs.
    "batches": {"errors", "quote", "ingest"},
    "publisher": {"errors", "store", "ingest", "batches"},
    "backend_hearing": {"errors"},
    "backend_events": {"errors", "store", "cluster", "backend_hearing"},
    "backend_demand": {"errors", "store", "cluster", "together", "backend_hearing"},
    "backend_sending": {"errors", "cluster"},
    "backend": PURE | {"store", "cluster", "publisher", "backend_demand", "backend_events", "backend_sending"},
    "backend_blocking": {"errors", "cluster", "backend", "backend_demand", "backend_sending"},
    "feed": PURE | {"store", "publisher", "backend_demand"},
    "private_redis": {"errors"},
    "client_errors": PURE,
    "client_events": PURE,
    "client_messages": PURE,
    "client_token": PURE,
    "client_rows": PURE | {"client_messages"},
    "client_frame": PURE | {"client_messages"},
    "client_state": PURE | {"client_messages", "client_rows"},
    "client_link": PURE | {"together", "client_errors", "client_messages", "client_token"},
    "client_questions": PURE | {"client_errors", "client_messages", "client_state"},
    "client": PURE | CLIENT,
    "client_blocking": PURE | {"client"},
    "watching_table": PURE | {"client"},
    "watching": PURE | {"client", "watching_table"},
    "publishing": PURE | {"feed"},
    "reaching": {"errors", "settings", "backend"},
    "commanding_jobs": {"errors", "backend", "reaching"},
    "commanding": PURE | {"settings", "cluster", "backend", "reaching", "commanding_jobs"},
    "tokens": GROUND | PURE | {"node"},
    "demo": {"errors", "feed", "private_redis"},
    # On top: the package's front door and the command line.
    "quotepush": {"client", "client_blocking", "publisher", "backend", "backend_blocking"},
    "cli": GROUND | {"quotepush", "node", "demo", "watching", "publishing", "tokens", "commanding"},
    "__main__": {"cli"},
}

# No loop, no socket, no clock of their own.
SANS_IO = (
    "quotepush.errors", "quotepush.token_keys", "quotepush.entitlement", "quotepush.auth", "quotepush.quote.",
    "quotepush.wire.", "quotepush.ingest.probe",
    "quotepush.push.subscriptions", "quotepush.push.outbox", "quotepush.push.members", "quotepush.push.desk",
    "quotepush.push.results", "quotepush.push.watchlist", "quotepush.push.session", "quotepush.push.addresses",
    "quotepush.push.rates", "quotepush.node.allotment", "quotepush.batches", "quotepush.client_state",
    "quotepush.client_messages", "quotepush.client_rows", "quotepush.client_errors", "quotepush.cluster.commands",
)  # fmt: skip
NOT_SANS_IO = {"asyncio", "aiohttp", "redis", "uvloop", "socket", "threading", "time", "os"}

# Who else reads variables: what systemd hands to a process is no setting of ours.
READS_ENVIRONMENT = {"quotepush.settings", "quotepush.node.notify", "quotepush.node.sockets"}

# Modules without a test file of their own name, and where they are tested.
TESTED_ELSEWHERE = {
    "quotepush": "tests/unit/test_docs.py",  # the names it offers, as the documents use them
    "quotepush.__main__": "tests/support/server.py",  # every server of the tests starts through it
    "quotepush.errors": "tests/unit/test_lock.py",  # classes without behaviour; their texts where they are raised
    "quotepush.client_errors": "tests/unit/test_client.py",
    "quotepush.client_events": "tests/unit/test_client.py",
    "quotepush.client_messages": "tests/unit/test_client_state.py",
    "quotepush.client_questions": "tests/unit/test_client.py",
    "quotepush.watching_table": "tests/unit/test_watching.py",
    "quotepush.cluster.nodes": "tests/unit/test_registry.py",
    "quotepush.cluster.sets": "tests/unit/test_registry.py",
    "quotepush.cluster.pages": "tests/unit/test_census.py",
    "quotepush.cluster.line": "tests/unit/test_backend.py",
    "quotepush.backend_hearing": "tests/unit/test_backend_events.py",
    "quotepush.cluster.hearing": "tests/unit/test_backend_events.py",
    "quotepush.node.api_routes": "tests/integration/test_api.py",
    "quotepush.cluster.kept": "tests/unit/test_inbox.py",
    "quotepush.cluster.crowds": "tests/integration/test_sending.py",
    "quotepush.node.posts": "tests/integration/test_sending.py",
    "quotepush.backend_sending": "tests/unit/test_backend.py",
    "quotepush.commanding_jobs": "tests/unit/test_commanding.py",
    "quotepush.reaching": "tests/unit/test_commanding.py",
    "quotepush.store.clients": "tests/unit/test_sentinel.py",
    "quotepush.feed": "tests/unit/test_feed.py",
    "quotepush.feed.run": "tests/unit/test_feed.py",
    "quotepush.ingest.keys": "tests/unit/test_batches.py",
    "quotepush.push.worker": "tests/unit/test_websocket.py",
    "quotepush.push.link": "tests/unit/test_websocket.py",
    "quotepush.push.gate": "tests/unit/test_site.py",
    "quotepush.push.questions": "tests/unit/test_site.py",
    # Processes and their wiring: tested as processes.
    "quotepush.node.main": "tests/integration/test_lifecycle.py",
    "quotepush.node.supervisor": "tests/integration/test_lifecycle.py",
    "quotepush.node.worker": "tests/integration/test_lifecycle.py",
    "quotepush.node.switchboard": "tests/integration/test_sending.py",
    "quotepush.node.memberships": "tests/integration/test_sending.py",
    "quotepush.node.carrying": "tests/integration/test_sending.py",
    "quotepush.node.logs": "tests/integration/test_lifecycle.py",
    "quotepush.node.collector": "tests/integration/test_lifecycle.py",
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, *, types: bool, later: bool) -> Iterator[str]:
    """Every module that is imported below ``node``.

    Args:
        types: also what only type checkers see.
        later: also what is imported when a function is called.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield full if full in MODULES else child.module
        else:
            is_later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            if (later or not is_later) and (types or not is_for_types_only(child)):
                yield from imports(child, types=types, later=later)


def own_imports(module: str, *, types: bool = True, later: bool = True) -> set[str]:
    found = imports(tree(module), types=types, later=later)
    return {name for name in found if name.partition(".")[0] == "quotepush"}


def wing(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "quotepush"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_below_its_floor(module: str) -> None:
    assert wing(module) in FLOORS, f"{wing(module)} has no floor yet: decide what it may import"
    allowed = FLOORS[wing(module)] | {wing(module)}
    for imported in own_imports(module):
        assert wing(imported) in allowed, f"{module} imports {imported}"


def test_the_floors_themselves_have_no_circle() -> None:
    def reach(name: str, seen: tuple[str, ...] = ()) -> None:
        assert name not in seen, f"a circle: {' -> '.join((*seen, name))}"
        for below in FLOORS[name] - {"quotepush"}:
            reach(below, (*seen, name))

    for name in FLOORS:
        reach(name)
    for first, second in (("ingest", "push"), ("push", "cluster"), ("cluster", "ingest")):
        assert second not in FLOORS[first] and first not in FLOORS[second]


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}"
        if module not in done:
            for imported in own_imports(module, types=False, later=False) & set(MODULES):
                visit(imported, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(SANS_IO)])
def test_the_pure_parts_know_no_loop_no_socket_and_no_clock(module: str) -> None:
    found = {name.partition(".")[0] for name in imports(tree(module), types=False, later=True)}
    assert not found & NOT_SANS_IO


@pytest.mark.parametrize("module", MODULES)
def test_only_the_settings_read_the_environment(module: str) -> None:
    if module in READS_ENVIRONMENT:
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "environb", "getenv", "putenv"), f"{module}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv"}, f"{module}:{node.lineno}"


def test_every_library_that_is_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["embedded"]]
    declared = {line.partition(">")[0].partition("[")[0].replace("-", "_") for line in wanted} | {"hiredis", "jwt"}
    declared = declared - {"pyjwt"} | {"cryptography"}  # pyjwt is imported as jwt, and its extra is cryptography
    found = {
        name.partition(".")[0]
        for module in MODULES
        for name in imports(tree(module), types=True, later=True)
        if name.partition(".")[0] not in sys.stdlib_module_names
    }
    assert found - {"quotepush"} == declared


def loaded_after(statement: str) -> set[str]:
    """The modules of a fresh interpreter after one statement."""
    script = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_main_does_not_load_what_only_workers_need() -> None:
    loaded = loaded_after("import quotepush.node.main")
    assert not {m for m in loaded if m.startswith("quotepush.push") or m == "quotepush.node.worker"}


def test_a_worker_does_not_load_what_only_main_needs() -> None:
    loaded = loaded_after("import quotepush.node.worker")
    assert not {m for m in loaded if m.startswith("quotepush.ingest")}
    assert not {m for m in loaded if m in ("quotepush.node.main", "quotepush.node.supervisor", "prometheus_client")}


def test_a_server_without_tokens_does_not_load_what_checks_them() -> None:
    loaded = loaded_after("import quotepush.node.worker, quotepush.node.main")
    assert not loaded & {"jwt", "cryptography.hazmat.primitives"}


def test_the_client_library_does_not_load_the_server() -> None:
    loaded = loaded_after("from quotepush import QuoteClient")
    assert not {m for m in loaded if m.startswith(("quotepush.node", "quotepush.push", "quotepush.ingest"))}
    assert not loaded & {"redis", "uvloop", "setproctitle", "click", "rich"}


def test_the_publishers_do_not_load_the_server() -> None:
    loaded = loaded_after("from quotepush import BlockingPublisher, Publisher")
    assert not {m for m in loaded if m.startswith(("quotepush.node", "quotepush.push", "quotepush.feed"))}
    assert not loaded & {"aiohttp", "uvloop", "setproctitle", "click", "rich"}


def test_the_backends_do_not_load_the_server() -> None:
    loaded = loaded_after("from quotepush import Backend, BlockingBackend")
    assert not {m for m in loaded if m.startswith(("quotepush.node", "quotepush.push", "quotepush.feed"))}
    assert not loaded & {"aiohttp", "uvloop", "setproctitle", "click", "rich"}


def test_the_package_alone_loads_nothing() -> None:
    assert {m for m in loaded_after("import quotepush") if m.startswith("quotepush.")} == set()


IMPORT_EACH_ALONE = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "quotepush"]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""


def test_every_module_can_be_imported_first() -> None:
    names = [name for name in MODULES if name != "quotepush.__main__"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_EACH_ALONE, *names],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_every_module_has_tests() -> None:
    missing = []
    for module, path in MODULES.items():
        if module in TESTED_ELSEWHERE:
            assert (ROOT / TESTED_ELSEWHERE[module]).exists(), TESTED_ELSEWHERE[module]
            continue
        has_code = any(not isinstance(node, ast.Expr) for node in tree(module).body)
        if has_code and not (ROOT / "tests" / "unit" / f"test_{path.stem}.py").exists():
            missing.append(module)
    assert not missing, "write tests/unit/test_<module>.py, or say where they are tested and why"
    assert set(TESTED_ELSEWHERE) <= set(MODULES), "no longer there"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree(module)), module
