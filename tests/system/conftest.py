"""Which guests have iothreads: the fixed rule by which half of all is run each time."""

import zlib

import pytest

from tests.lab.base import Lab

IOTHREADS = 2


def iothreads_of(name: str, wanted: str) -> int:
    """The number for the guests of a test file; ``wanted`` is the option's value."""
    if wanted not in ("rule", "other"):
        return int(wanted)
    is_chosen = zlib.crc32(name.encode()) % 2 == 0
    return IOTHREADS if is_chosen == (wanted == "rule") else 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: one of a module makes the guests of all of its tests."""
    Lab.iothreads = iothreads_of(item.path.stem, item.config.getoption("--iothreads"))
