"""The allow list of definitions, held against the schema of the libvirt that is installed (S-1)."""

from collections.abc import Callable, Iterable

import pytest

from tests.lib import allow_checks, schema
from tests.lib.schema import Place


@pytest.fixture(scope="module")
def places() -> tuple[Place, ...]:
    return schema.Schema(schema.INSTALLED).places


@pytest.mark.parametrize("check", allow_checks.OF_A_RELEASE, ids=lambda check: check.__name__)
def test_every_place_of_the_schema(
    places: tuple[Place, ...], check: Callable[[Iterable[Place]], None]
) -> None:
    """S-1, S-2, S-3: all that libvirt knows, fed one by one."""
    assert len(places) > 2000
    check(places)
