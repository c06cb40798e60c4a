"""A run goes on with its own program whatever becomes of the files."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PROGRAM: Final = """
import importlib, pathlib, shutil, sys

from nbdbackupd.app import held

before = set(sys.modules)
held.hold()
assert set(sys.modules) - before <= {"importlib.machinery"}, "reading is enough"
top = pathlib.Path(held.__file__).parents[1]
names = [
    ".".join(path.relative_to(top.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in top.rglob("*.py")
    if path.name not in ("__main__.py", "nbdkit_plugin.py")
]
NEW_VERSION
for name in names:
    importlib.import_module(name)
try:
    import nbdbackupd.model.newer
except ModuleNotFoundError as err:
    assert err.name == "nbdbackupd.model.newer"
else:
    raise AssertionError("a module of the new version")
assert len(names) > 200
sys.stdout.write(" ".join(str(path) for path in top.rglob("*.pyc")))
"""
REPLACED: Final = """
shutil.rmtree(top)
for name in [*names, "nbdbackupd.model.newer"]:
    path = top.parent / (name.replace(".", "/") + ".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("raise RuntimeError('the new version')")
"""


def run(directory: Path, *, compiled: bool, new_version: str) -> str:
    shutil.copytree(
        ROOT / "nbdbackupd", directory / "nbdbackupd", ignore=shutil.ignore_patterns("*.pyc")
    )
    if compiled:
        subprocess.run([sys.executable, "-m", "compileall", "-q", directory], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("NEW_VERSION", new_version)],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_the_program_is_replaced(tmp_path: Path) -> None:
    for name, compiled in (("source", False), ("compiled", True)):
        assert not run(tmp_path / name, compiled=compiled, new_version=REPLACED)


def test_the_program_is_removed(tmp_path: Path) -> None:
    assert not run(tmp_path, compiled=False, new_version="shutil.rmtree(top)")
