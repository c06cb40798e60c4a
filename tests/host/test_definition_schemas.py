"""The allow list of definitions, held against the schemas of all releases that are supported."""

import pytest

from tests.lab.hostroot import SUITES, hypervisor, root_directory
from tests.lib import allow_checks, schema

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a root file system may have to be made first
]


def test_every_place_of_each_release() -> None:
    """S-1 to S-3: what any of them knows is allowed with a reason, or does not get through."""
    found: list[schema.Place] = []
    for suite in SUITES:
        root = root_directory(hypervisor(suite))
        places = schema.Schema(root / schema.INSTALLED.relative_to("/")).places
        found += places
        for check in allow_checks.OF_A_RELEASE:
            check(places)
    allow_checks.nothing_is_made_up(found)
