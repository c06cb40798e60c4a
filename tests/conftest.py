"""Options of the whole test suite."""

import importlib.util
import os
import random
import signal
from collections.abc import Generator

import pytest

from tests.lib import ctl

pytest_plugins = ["tests.lib.fresh"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        default="1",
        help="seed of the tests that play random histories; 'fresh' takes a new one, and says it",
    )
    parser.addoption(
        "--iothreads",
        default="0",
        help="how many iothreads the guests of system tests have; 'rule': some files' have some, "
        "'other': the other half of those about the end of a job; see tests/lib/matrix.py",
    )
    parser.addoption(
        "--other-release",
        default="chosen",
        help="which system tests are run on the other release of Debian, too: chosen, or all",
    )
    parser.addoption(
        "--programs",
        action="store_true",
        help="start each command line as a program of its own, not from one with its modules",
    )


def pytest_configure(config: pytest.Config) -> None:
    ctl.are_programs = config.getoption("--programs")
    # under nohup SIGHUP is ignored, and so it would be by all that the tests start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # and SIGINT in the background of a shell
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # the other release has no hypothesis, nor tests that need it
    if importlib.util.find_spec("hypothesis") is not None:
        give_examples_time()


def give_examples_time() -> None:
    """How long an example takes says how busy the machine is, and nothing of what is tested."""
    from hypothesis import HealthCheck, settings

    quiet = [HealthCheck.too_slow]
    settings.register_profile("suite", deadline=None, suppress_health_check=quiet)
    settings.load_profile("suite")


SLOWEST_FIRST = ("host", "system", "packages", "component")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where files are run side by side: the slow kinds first, or one processor ends alone."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return

    def rank(item: pytest.Item) -> int:
        kind = item.path.parent.name
        return SLOWEST_FIRST.index(kind) if kind in SLOWEST_FIRST else len(SLOWEST_FIRST)

    items.sort(key=rank)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make captured output fit to be sent from one process to another: tests log odd bytes."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What runs note of themselves does not go into the state directory of this host."""
    os.environ["NBDBACKUP_STATE_DIR"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of random histories; in the report of a failure, to play it again."""
    wanted: str = request.config.getoption("--seed")
    return random.SystemRandom().randrange(1 << 32) if wanted == "fresh" else int(wanted)
