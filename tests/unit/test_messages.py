"""What the program says, as a list that is read: a change of words is to be seen."""

import re

from scripts import gen_messages
from scripts.generated import stale


def test_the_list_is_current() -> None:
    """W-9: each message is true, short, and names what, where, and the cure."""
    assert not stale(gen_messages.generated()), "run scripts/gen-messages, and read what changed"


def test_the_generator_sees_what_is_said() -> None:
    source = '''
"""A docstring with words."""
def f(x):
    """Another one with words."""
    log.warning("disk %s is odd", x)
    raise E(f"can't read {x}: "
            f"{x!r}; mend it")
    return "word", "two words", f"{x}", x["a key"]
'''
    assert sorted(gen_messages.texts(source)) == [
        "can't read {}: {}; mend it", "disk %s is odd", "two words"
    ]  # fmt: skip


def test_no_line_is_out_of_place() -> None:
    text = gen_messages.LIST.read_text()
    lines = text.splitlines()[2:]
    assert lines == sorted(lines)
    assert len(lines) > 1500
    assert not [each for each in lines if re.search(r"\s$|TODO|FIXME", each)]
