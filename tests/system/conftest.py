"""Which guests have iothreads: see tests/lib/matrix.py."""

from pathlib import Path

import pytest

from tests.lab.base import Lab
from tests.lib import matrix

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is run with and without iothreads."""
    for item in items:
        name = item.path.stem.removeprefix("test_")
        if item.path == HERE / f"test_{name}.py" and name in matrix.ENDS:
            item.add_marker("ends")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: one of a module makes the guests of all of its tests."""
    Lab.iothreads = matrix.iothreads_of(item.path.stem, item.config.getoption("--iothreads"))
