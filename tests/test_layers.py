"""Who may import whom, and who alone may use which library.

app → ops → {config, source, repo} → {virt, qemu, nbdio, format, systemd} → model → base
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = ROOT / "nbdbackupd"

BASE: Final = frozenset(
    {"errors", "log", "events", "proc", "durable", "threads", "documents", "files", "plain"}
    | {"rundir", "units", "where"}
)
LOWEST: Final = frozenset({"virt", "qemu", "nbdio", "format", "systemd"})
ALLOWED: Final = {
    "base": BASE,
    "model": BASE | {"model"},
    **{name: BASE | {"model", name} for name in LOWEST},
    "source": BASE | {"model", "virt", "qemu", "source"},
    "repo": BASE | {"model", "format", "repo"},
    "config": BASE | {"model", "config"},
    "ops": BASE | LOWEST | {"model", "source", "repo", "config", "ops"},
    "app": BASE | LOWEST | {"model", "source", "repo", "config", "ops", "app"},
}
"""For each layer the parts of the package that it may import."""

ROOMS: Final = (
    "sets", "removal", "domain", "retention", "checkpoints", "backup", "notify", "status", "report",
    "run", "restore", "define", "verify", "map", "files", "boot", "check",
)  # fmt: skip
"""The folders of ops: each may use those before it, also for types only."""

OWNERS: Final = {
    "libvirt": "virt",
    "libvirt_qemu": "virt",
    "libvirtmod": "virt",
    "nbd": "nbdio",
    "lz4": "format",
    "blake3": "format",
    "xxhash": "format",
    "zstandard": "format",
    "subprocess": "proc",
    "multiprocessing": "nobody",
    "pty": "nobody",
    "argparse": "app",
    "nbdkit": "app",
    "yaml": "config",
    "getopt": "nobody",
    "optparse": "nobody",
    "importlib": "app",
}
"""The one layer, package or base module that may import a library."""

ATTRIBUTES: Final = {
    **dict.fromkeys(("sys.exit", "os._exit", "os.abort", "sys.argv"), "app"),
    **dict.fromkeys(("os.environ", "os.getenv", "os.putenv", "os.environb"), "app"),
    **dict.fromkeys(("os.system", "os.popen", "os.fork", "os.posix_spawn"), "nobody"),
    **dict.fromkeys(("os.execv", "os.execvp", "os.execve", "os.spawnv", "os.startfile"), "nobody"),
    **dict.fromkeys(("time.time", "time.time_ns", "time.localtime", "time.gmtime"), "app"),
    **dict.fromkeys(("datetime.now", "datetime.utcnow", "datetime.today", "date.today"), "app"),
    **dict.fromkeys(("uuid.uuid1", "uuid.uuid4"), "app"),
    **dict.fromkeys(("json.loads", "json.load", "ET.fromstring", "ET.iterparse"), "documents"),
    **dict.fromkeys(("ET.parse", "ET.XML", "ET.XMLParser", "ET.XMLPullParser"), "documents"),
}
"""The one layer that may read the environment or the clock, end the process, make ids, or
parse what others wrote."""

EXEMPT: Final = {
    # children get our environment, with the locale set to C
    ("proc.py", "os.environ"),
}

NAMES: Final = {"SystemExit": "app", "exit": "nobody", "quit": "nobody", "__import__": "nobody"}


def layer_of(path: Path) -> str:
    """The layer of a file, given relative to the package."""
    if len(path.parts) > 1:
        return path.parts[0]
    return {"__init__.py": "base", "__main__.py": "app"}.get(path.name, "base")


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Every imported module, dotted; ``from a import b`` gives ``a.b`` (b may be a module)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(path: Path, source: str) -> list[str]:
    """What a file (relative to the package) does that it must not."""
    tree = ast.parse(source)
    layer = layer_of(path)
    mine = {layer, path.stem if layer == "base" else path.parent.as_posix()}
    found = []
    for name in imported(tree, path):
        first, _, rest = name.partition(".")
        if first == "nbdbackupd":
            part = rest.partition(".")[0]
            if part not in ALLOWED[layer] and part != "__version__":
                found.append(f"{path}: {layer} must not import {name}")
        elif OWNERS.get(first, layer) not in mine:
            found.append(f"{path}: only {OWNERS[first]} may import {first}")
        if ATTRIBUTES.get(name, layer) not in mine:
            found.append(f"{path}: only {ATTRIBUTES[name]} may use {name}")
    for node in ast.walk(tree):
        used = ""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Name):
            used = node.id
        owner = ATTRIBUTES.get(used) or NAMES.get(used) or layer
        if owner not in mine and (path.name, used) not in EXEMPT:
            line = node.lineno if isinstance(node, ast.expr) else 0
            found.append(f"{path}:{line}: only {owner} may use {used}")
    return found


def uses() -> dict[str, set[str]]:
    """For each module of the package those that it imports, late or for types only as well."""
    names = {".".join(path.with_suffix("").parts): path for path in sources()}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        targets = [
            each.removeprefix("nbdbackupd.")
            for each in imported(ast.parse((PACKAGE / path).read_text()), path)
            if each.startswith("nbdbackupd.")
        ]
        # a name of a module, or of something in it
        modules = {each if each in names else each.rpartition(".")[0] for each in targets}
        found[name] = modules & set(names) - {name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that use one another in a ring; empty if there is none."""
    done: set[str] = set()
    for start, followers in graph.items():
        way, open_ends = [start], [sorted(followers)]
        while way:
            if not open_ends[-1]:
                done.add(way.pop())
                open_ends.pop()
                continue
            follower = open_ends[-1].pop()
            if follower in way:
                return [*way[way.index(follower) :], follower]
            if follower not in done:
                way.append(follower)
                open_ends.append(sorted(graph[follower]))
    return []


def test_no_module_uses_itself_through_others() -> None:
    graph = uses()
    assert len(graph["ops.backup.backup"]) > 10
    assert circle(graph) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


LATE: Final = {
    "app/generator.py": "a boot goes on whatever can't be imported",
    "app/guard.py": "a guard stays small until it has work",
    "app/context.py": "libvirt's library",
    "app/named.py": "PyYAML, where no name of a domain is given",
    "app/verbs/config.py": "libvirt's library",
    "app/verbs/give_way.py": "the hook calls it, while libvirt waits: only what that needs",
    "app/verbs/restore_define.py": "libvirt's library",
    "app/verbs/restore_targets.py": "libvirt's library",
    "app/verbs/verify_boot.py": "libvirt's library",
    "app/verbs/verify_by_age.py": "PyYAML, where no name of a domain is given",
    "ops/check/check.py": "it tells of a library that is missing",
    "ops/domain/configured.py": "PyYAML and libvirt's library: restores do without",
    "ops/status/gather.py": "libvirt's library",
}
"""Modules that import others of the package late, and what for."""


def test_what_is_imported_late_has_a_reason() -> None:
    found = {
        str(path)
        for path in sources()
        for function in ast.walk(ast.parse((PACKAGE / path).read_text()))
        if isinstance(function, ast.FunctionDef)
        for name in imported(function, path)
        if name.startswith("nbdbackupd.")
    }
    assert found == set(LATE)


ONE_USER: Final = 52
BESIDE: Final = 20
"""How many modules but verbs may have one user, and how many one in their own folder: a module of
one user has a subject of its own, or a layer, or goes into that other module."""


def test_few_modules_have_one_user() -> None:
    users: dict[str, list[str]] = {}
    for name, others in uses().items():
        for other in others:
            users.setdefault(other, []).append(name)
    alone = {name: each[0] for name, each in users.items() if len(each) == 1}
    found = [name for name in alone if not name.startswith("app.verbs.")]
    beside = [name for name in found if name.rpartition(".")[0] == alone[name].rpartition(".")[0]]
    assert 0 < len(beside) < BESIDE, beside
    assert len(found) < ONE_USER, found


def test_rooms_of_ops_have_an_order() -> None:
    folders = {path.name for path in (PACKAGE / "ops").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ROOMS)
    found = [
        f"{name} uses {other}"
        for name, others in uses().items()
        for other in others
        if name.startswith("ops.") and other.startswith("ops.")
        and ROOMS.index(other.split(".")[1]) > ROOMS.index(name.split(".")[1])
    ]  # fmt: skip
    assert not found, "\n".join(found)


def sources() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def test_every_module_keeps_to_its_layer() -> None:
    found = [fault for path in sources() for fault in faults(path, (PACKAGE / path).read_text())]
    assert not found, "\n".join(found)


def test_every_package_has_a_layer() -> None:
    assert {layer_of(path) for path in sources()} == set(ALLOWED)
    tops = {path.stem for path in sources() if len(path.parts) == 1}
    assert tops == BASE | {"__init__", "__main__"}


def test_base_modules_import_without_cycles() -> None:
    """Of the base only these lines exist; errors and plain know nobody."""
    known = {"errors": set[str](), "plain": set[str](), "documents": {"errors"}}
    known |= {"durable": {"errors", "plain"}, "proc": {"errors", "plain"}}
    known |= {"log": {"errors", "durable", "plain"}, "events": {"log"}}
    known |= {"rundir": {"durable"}, "threads": {"log"}, "units": set()}
    known |= {"where": {"durable", "proc"}}
    for name, allowed in known.items():
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        parts = {
            each.split(".")[1] for each in imported(tree, Path(name)) if each.startswith("nbdb")
        }
        assert parts <= allowed, name


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        ("model/a.py", "from nbdbackupd.format import stream", "model must not import"),
        ("model/a.py", "def f():\n import nbdbackupd.repo.layout", "model must not import"),
        ("virt/a.py", "from nbdbackupd.nbdio.copy import Sink", "virt must not import"),
        ("source/a.py", "from nbdbackupd import repo", "source must not import"),
        ("source/a.py", "from nbdbackupd.format import index", "source must not import"),
        ("repo/a.py", "from nbdbackupd.virt import domain", "repo must not import"),
        ("ops/a.py", "from nbdbackupd.app import asking", "ops must not import"),
        ("errors.py", "from nbdbackupd.model import chain", "base must not import"),
        ("ops/a.py", "import libvirt", "only virt may import"),
        ("repo/a.py", "from lz4.frame import compress", "only format may import"),
        ("qemu/a.py", "import nbd as n", "only nbdio may import"),
        ("qemu/a.py", "from subprocess import run", "only proc may import"),
        ("durable.py", "import subprocess", "only proc may import"),
        ("ops/a.py", "import argparse", "only app may import"),
        ("ops/a.py", "import sys\nsys.exit(1)", "only app may use sys.exit"),
        ("ops/a.py", "from os import environ", "only app may use os.environ"),
        ("qemu/a.py", "import os\nos.environ['X']", "only app may use os.environ"),
        ("model/a.py", "raise SystemExit", "only app may use SystemExit"),
        ("ops/a.py", "datetime.now(UTC)", "only app may use datetime.now"),
        ("ops/a.py", "from time import time", "only app may use time.time"),
        ("app/a.py", "import os\nos.system('x')", "only nobody may use os.system"),
        ("app/a.py", "import subprocess", "only proc may import"),
        ("app/a.py", "import yaml", "only config may import"),
        ("app/verbs/a.py", "from yaml import safe_load", "only config may import"),
    ],
)
def test_the_check_finds(path: str, source: str, words: str) -> None:
    found = faults(Path(path), source)
    assert len(found) == 1
    assert words in found[0]


def test_the_check_lets_pass() -> None:
    for path, source in [
        ("proc.py", "import os, subprocess\nos.environ"),
        ("virt/a.py", "import libvirt, time\ntime.monotonic()\nfrom nbdbackupd.virt import b"),
        ("ops/a.py", "from nbdbackupd import proc\nfrom nbdbackupd.format import index"),
        ("app/a.py", "import argparse, os, sys\nos.environ\nsys.exit(1)"),
        ("config/a.py", "import os, yaml\nfrom nbdbackupd.model import policy"),
    ]:
        assert faults(Path(path), source) == []


def test_the_command_line_loads_nothing_heavy() -> None:
    """``--version`` and errors of usage are quick: verbs import what they need when they run."""
    script = (
        "import sys; from nbdbackupd.app import ctl; ctl.build_parser([]);"
        "heavy = {'libvirt', 'nbd', 'lz4', 'subprocess', 'asyncio', 'xml.etree.ElementTree',"
        " 'yaml', 'jinja2', 'nbdbackupd.ops.backup.backup', 'nbdbackupd.repo.set_directory'};"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "verb",
    ["restore", "list", "show", "verify", "map", "unmap", "mount", "unmount", "files", "import"],
)
def test_what_restores_needs_no_hypervisor(verb: str) -> None:
    """A bare host has neither libvirt's library nor a configuration."""
    script = (
        "import sys; sys.modules['libvirt'] = sys.modules['yaml'] = None\n"
        f"from nbdbackupd.app import ctl; ctl.build_parser([{verb!r}])"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=True)
