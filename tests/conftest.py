"""Options of the whole test suite."""

import random
import signal

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        default="1",
        help="seed of the tests that play random histories; 'fresh' takes a new one, and says it",
    )


def pytest_configure() -> None:
    # under nohup SIGHUP is ignored, and so it would be by all that the tests start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of random histories; in the report of a failure, to play it again."""
    wanted: str = request.config.getoption("--seed")
    return random.SystemRandom().randrange(1 << 32) if wanted == "fresh" else int(wanted)
