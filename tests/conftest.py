"""Options of the whole test suite."""

import random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        default="1",
        help="seed of the tests that play random histories; 'fresh' takes a new one, and says it",
    )


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of random histories; in the report of a failure, to play it again."""
    wanted: str = request.config.getoption("--seed")
    return random.SystemRandom().randrange(1 << 32) if wanted == "fresh" else int(wanted)
