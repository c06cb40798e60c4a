"""The peer's programs can be had in both versions."""

import pytest

from tests.lab.peer import BOOKWORM, TRIXIE, peer

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_versions() -> None:
    assert peer(BOOKWORM).version() == "1.9.15"
    major, minor = peer(TRIXIE).version().split(".")[:2]
    assert (int(major), int(minor)) >= (2, 28)
