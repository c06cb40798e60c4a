"""The steps at which tests let something happen are in the product, and stand in one table."""

import re
from pathlib import Path

import pytest

from tests.lib.model_deaths import PLACES
from tests.lib.rigged import owner_of, rig
from tests.lib.steps import FIELDS, GUARD, STEPS

TESTS = Path(__file__).parents[1]
TABLE = TESTS / "lib/steps.py"
RAW = re.compile(r"\b(?:nbdbackupd(?:\.\w+)+|os):[A-Za-z_][\w.]*")
FAULT = re.compile(r'["@]([a-z]+(?:-[a-z]+)+)#')


def texts() -> dict[Path, str]:
    """The other files of the tests."""
    files = set(TESTS.rglob("*.py")) - {TABLE, Path(__file__)}
    return {file: file.read_text("utf-8") for file in files}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_a_function(step: str) -> None:
    owner, name = owner_of(STEPS[step])
    assert callable(getattr(owner, name))


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_has_a_default(field: str) -> None:
    owner, name = owner_of(FIELDS[field])
    assert isinstance(owner.__init__.__kwdefaults__[name], float)


def test_the_guard_is_a_program() -> None:
    owner, name = owner_of(f"{GUARD}:main")
    assert callable(getattr(owner, name))


def test_no_two_names_mean_the_same() -> None:
    places = [*STEPS.values(), *FIELDS.values()]
    assert len(set(places)) == len(places)


def test_each_step_is_used() -> None:
    used = {name for text in texts().values() for name in FAULT.findall(text)}
    assert {*STEPS, *FIELDS} - used - {*PLACES} == set()


def test_places_stand_in_the_table_only() -> None:
    found = {str(file): RAW.findall(text) for file, text in texts().items()}
    assert {file: places for file, places in found.items() if places} == {}


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(KeyError, match="never-heard-of"):
        rig("KILL@never-heard-of#1")
    with pytest.raises(ValueError, match="no fault"):
        rig("KILL@os:rename#1")
