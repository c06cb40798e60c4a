"""What tests share is made anew after a failure."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lib.pages import TOP

pytestmark = pytest.mark.component
TESTS = """
import itertools

import pytest

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def guest():
    number = next(numbers)
    yield number
    print(f"guest {number} ended")


@pytest.fixture(scope="session")
def host():
    return next(numbers)


@pytest.fixture
def refuses(guest):
    assert guest > 4, "not yet"
    yield guest
    assert guest > 5, "left in disorder"


def test_first(guest):
    assert guest == 1


def test_shares_it_and_fails(guest, host):
    assert (guest, host) == (1, 2)
    raise RuntimeError


def test_has_others(guest, host):
    assert (host, guest) == (3, 4)


def test_shares_them_and_is_refused(refuses):
    pass


def test_has_another(refuses):
    assert refuses == 5


def test_has_the_last(guest):
    assert guest == 6
"""


def test_a_failed_test_leaves_nothing(tmp_path: Path) -> None:
    """A test, its fixture before it, and its fixture after it fail: the next one has new ones."""
    file = tmp_path / "test_guests.py"
    file.write_text(TESTS)
    words = ["-q", "-rA", "-p", "tests.lib.fresh", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--rootdir", tmp_path, file],
        cwd=TOP, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    told = {
        line.split("::")[1].split(" ")[0]: line.split(" ")[0]
        for line in done.stdout.splitlines()
        if line.startswith(("PASSED", "FAILED", "ERROR"))
    }
    assert told == {
        "test_first": "PASSED",
        "test_shares_it_and_fails": "FAILED",
        "test_has_others": "PASSED",
        "test_shares_them_and_is_refused": "ERROR",
        "test_has_another": "ERROR",
        "test_has_the_last": "PASSED",
    }, done.stdout
    assert "left in disorder" in done.stdout
    assert done.stdout.count("guest 1 ended") == 1
