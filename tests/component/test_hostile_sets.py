"""Sets and archives that somebody made to harm: each ends with a line, soon, small, and in place.

The digests are right, as those of a stranger's own set are. What may not happen: a traceback, a
path outside of the output directory, a program that waits for ever or eats the memory.
"""

import json
import os
import random
import shutil
import stat
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.repo import layout
from tests.lib import sets
from tests.lib.ctl import PYTHON, ROOT, Ctl
from tests.lib.sets import SetBuilder

pytestmark = pytest.mark.component

KIB = 1 << 10
MIB = 1 << 20
MEMORY = 600 * MIB
"""Of address space beyond what the program needs anyway: some 150 MiB."""

SECONDS = 30
ENDS = {2, 3, 10, 20, 30, 40, 50, 75}


class Victim:
    """Runs verbs on a set within bounds, and looks at what they leave."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "set"
        self.out = directory / "out"
        self.ctl = Ctl("test:///default", directory / "ctl")

    def run(self, verb: str, *words: str | Path, codes: set[int] = ENDS) -> str:
        """One verb; its standard error, which is a few lines and no traceback."""
        argv = [
            "prlimit", f"--data={MEMORY}", "--", *self.ctl.argv(verb, *words),
        ]  # fmt: skip
        done = subprocess.run(
            argv, cwd=ROOT, env=self.ctl.environment, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        text = done.stderr.decode(errors="surrogateescape")
        assert done.returncode in codes, (verb, done.returncode, text)
        assert "Traceback" not in text, text
        assert text.count("\n") <= 12, text
        assert max(map(len, text.split("\n"))) < 2000
        for stream in (text, done.stdout.decode(errors="surrogateescape")):
            assert harmless(stream), (verb, stream)
        return text


def harmless(text: str) -> bool:
    """Whether a terminal shows the text and does nothing else."""
    return all(char == "\n" or char.isprintable() for char in text)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    """A place for a set; nothing beside it may change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_text("kept")
    found = Victim(tmp_path)
    yield found
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["kept"]
    assert (tmp_path / "outside/kept").read_text() == "kept"
    known = {"outside", "set", "out", "ctl", "archive.zip"}
    assert {path.name for path in tmp_path.iterdir()} <= known


def make_set(path: Path) -> SetBuilder:
    """A full and an increment of one disk."""
    rng = random.Random(5)
    builder = SetBuilder(path)
    builder.disks = {"vda": sets.random_disk(rng, MIB)}
    builder.full()
    builder.inc({"vda": sets.random_changes(rng, MIB, 5)})
    return builder


@pytest.mark.parametrize("name", layout.DIRECTORIES)
def test_directories_that_are_links(victim: Victim, name: str) -> None:
    """S-7: root would read and write wherever the link leads."""
    make_set(victim.path)
    away = victim.directory / "ctl"
    away.mkdir()
    if (victim.path / name).is_dir():
        (victim.path / name).rename(away / name)
    else:
        (away / name).mkdir()
    (victim.path / name).symlink_to(away / name)
    before = sorted(map(str, away.rglob("*")))
    for verb, *words in (
        ("list", victim.path), ("show", victim.path), ("verify", victim.path),
        ("restore", victim.path, "-o", victim.out), ("map", victim.path, "--detach"),
        ("import", victim.path), ("boot", victim.path, "--scratch-dir", away / "scratch"),
    ):  # fmt: skip
        text = victim.run(verb, *words, codes={50})
        assert f"{victim.path / name} is a symbolic link" in text
        assert text.count("\n") == 1
    assert [each for each in sorted(map(str, away.rglob("*"))) if each not in before] == []
    assert not victim.out.exists()


def test_a_log_that_is_a_link_or_has_no_end(victim: Victim) -> None:
    """S-7, S-6: ``log --set`` reads what lies in the set, in lines of bounded length."""
    make_set(victim.path)
    (victim.path / "logs").mkdir()
    (victim.path / "logs/a.log").symlink_to(victim.directory / "outside/kept")
    assert "a.log" in victim.run("log", "-o", victim.path, codes={50})
    (victim.path / "logs/a.log").unlink()
    with (victim.path / "logs/a.log").open("wb") as file:
        file.truncate(2 << 30)
    victim.run("log", "-o", victim.path, codes={0})


def test_an_output_whose_config_is_a_link(victim: Victim) -> None:
    """S-7: firmware would be written wherever the link leads."""
    make_set(victim.path)
    victim.out.mkdir()
    (victim.out / "config").symlink_to(victim.directory / "outside")
    text = victim.run("restore", victim.path, "-o", victim.out, codes={50})
    assert "config is a symbolic link" in text
