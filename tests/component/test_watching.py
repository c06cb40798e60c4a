"""``--watch`` on a real terminal, and without one."""

import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdbackupd.app import ctl, watching
from nbdbackupd.model.chain import Level
from tests.lib import chains
from tests.lib.ctl import PYTHON, ROOT

pytestmark = pytest.mark.component

SECONDS = 90.0


class Watched:
    """A command whose output is read, from a terminal or from a pipe."""

    def __init__(self, *words: str, terminal: bool) -> None:
        self.said = ""
        self.end, other = pty.openpty() if terminal else os.pipe()
        command = [PYTHON, "-m", "nbdbackupd", *words, "--watch", "--interval", "1s"]
        environment = {**os.environ, "TERM": "xterm", "LINES": "12", "COLUMNS": "60"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=other if terminal else subprocess.DEVNULL,
            stdout=other, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        os.close(other)

    def until(self, seen: Callable[[str], object]) -> None:
        """Read on until what was said since the last time is as wanted."""
        deadline = time.monotonic() + SECONDS
        self.said = ""
        while not seen(self.said):
            assert time.monotonic() < deadline, self.said
            self.said += os.read(self.end, 65536).decode()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(SECONDS)
        os.close(self.end)
        return code


def test_a_terminal_shows_the_newest_look(tmp_path: Path) -> None:
    chains.add_point(tmp_path, 1, Level.FULL)
    watched = Watched("list", str(tmp_path), terminal=True)
    watched.until(lambda said: "1 restore point," in said and watching.WRAP in said)
    assert watched.said.count(watching.HOME) == 1
    assert "every 1.0 s, Ctrl-C ends this" in watched.said
    for number in range(2, 6):
        chains.add_point(tmp_path, number)
    watched.until(lambda said: "5 restore points," in said and "more lines" in said)
    newest = watched.said.rpartition(watching.HOME)[2]
    assert newest.count("\n") == 11
    # a look that fails is told, and the next one may do well
    aside = tmp_path.with_name("aside")
    tmp_path.rename(aside)
    watched.until(lambda said: "! there is no backup set" in said)
    aside.rename(tmp_path)
    watched.until(lambda said: "5 restore points," in said)
    assert watched.stop() == 0


def test_a_pipe_gets_one_look_after_another(tmp_path: Path) -> None:
    chains.add_point(tmp_path, 1, Level.FULL)
    watched = Watched("list", str(tmp_path), terminal=False)
    watched.until(lambda said: len(re.findall(r"1 restore point,", said)) == 2)
    assert "\x1b" not in watched.said
    assert watched.stop() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("list", "set", "--interval", "2s"), "--interval is for --watch"),
        (("list", "set", "--watch", "--interval", "0"), "give a time above 0"),
        (("list", "set", "--watch", "--json"), "exclude one another"),
        (("status", "--watch", "--nagios"), "neither with --nagios"),
        (("status", "--watch", "--metrics"), "nor with --metrics"),
    ],
)
def test_what_does_not_go_together(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ctl.main(words) == 2
    said = capsys.readouterr()
    assert message in said.out + said.err


def test_a_first_look_that_fails_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ctl.main(["list", str(tmp_path / "absent"), "--watch"]) == 50
    assert "there is no backup set" in capsys.readouterr().err


def test_a_picture_fits() -> None:
    drawn = watching.picture(["head", *map(str, range(30))], 10)
    assert drawn.count("\n") == 9
    assert "(23 more lines do not fit on this terminal)" in drawn
    assert watching.picture(["head", "a"], 10).count("\n") == 2
