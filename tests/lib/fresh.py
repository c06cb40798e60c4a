"""A plugin of pytest: a test that fails leaves nothing to those after it.

What tests of a file share, such as a guest, may be in any state then: the next test has it made
anew, instead of failing, too.
"""

from collections.abc import Generator

import pytest

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note a failure, that of a fixture included."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


# within the plugins that catch output
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """End all fixtures after a failure, whoever could have used them again."""
    is_spoiled = item.stash.get(FAILED, False)
    try:
        yield
    except BaseException:
        is_spoiled = True
        raise
    finally:
        if is_spoiled:
            item.session._setupstate.teardown_exact(None)
