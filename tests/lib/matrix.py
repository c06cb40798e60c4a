"""Which system tests are run how often: {no iothreads, iothreads} x {this Debian, the other one}.

All of that takes four times as long as once. By default every file is run once on the release
that the tests run on, a few with iothreads, and one of them once more on the other release: an
hour on two processors has no room for more.

The whole is to be had by options, on either release::

    scripts/test -m ends --iothreads=other
    scripts/test --iothreads=0 tests/system
    scripts/test --iothreads=2 tests/system
    scripts/test --iothreads=0 --other-release=all tests/host/test_other_release.py
    scripts/test --iothreads=2 --other-release=all tests/host/test_other_release.py
"""

import zlib
from typing import Final

ENDS: Final = ("chain", "faults", "interrupt", "kill", "levels", "lifecycle", "running")
"""Files whose subject is how a job of a running domain ends."""
OTHER_RELEASE: Final = ("chain", "freeze::test_a_thaw_whose_hook_fails")
"""Files, and tests of some, that are run on the other release, too."""
IOTHREADS: Final = 2
NEVER: Final = "peer"
"""So begin the names of files whose guests have none, unless they say so themselves: the peer's
clients close their connections first, and QEMU 7.2 aborts by that where a disk has an iothread."""
ALWAYS: Final = ("abort_estimate", "events_told", "full_target", "metadata")
"""Other files whose guests have some by the rule."""


def iothreads_of(name: str, wanted: str) -> int:
    """The number for the guests of a test file; ``wanted`` is the option's value.

    ``rule`` and ``other`` are two halves: together they are both numbers for each of ``ENDS``.
    """
    subject = name.removeprefix("test_")
    if wanted not in ("rule", "other"):
        return 0 if subject.startswith(NEVER) else int(wanted)
    if subject not in ENDS:
        return IOTHREADS if subject in ALWAYS else 0
    is_chosen = zlib.crc32(name.encode()) % 2 == 0
    return IOTHREADS if is_chosen == (wanted == "rule") else 0


def path_of(name: str) -> str:
    """The path of a system test file in the tree, with the test that is named after ``::``."""
    subject, colons, test = name.partition("::")
    return f"tests/system/test_{subject}.py{colons}{test}"
