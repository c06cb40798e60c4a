"""Where a domain is, by what hosts have noted (H-2, H-4, H-7)."""

from itertools import permutations

import pytest

from nbdbackupd.model.whereabouts import MIGRATED, Note, Phase, Standing, next_number, standing


def note(host: str, number: int, phase: str, **more: object) -> Note:
    return Note(
        host=host, name=f"host-{host}", domain="vm", number=number, phase=Phase(phase),
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


def judged(here: str, *notes: Note) -> tuple[str, str, str]:
    """Holder, last and saver by host; the order of the notes means nothing."""
    found = {standing(each, here) for each in permutations(notes)}
    assert len(found) == 1
    result = found.pop()
    assert result.is_closed == (result.holder is None and result.last is not None)
    return (
        result.holder.host if result.holder else "",
        result.last.host if result.last else "",
        result.saver.host if result.saver else "",
    )


def test_nobody_has_noted_anything() -> None:
    assert standing((), "a") == Standing()
    assert not standing((), "a").is_closed


def test_where_it_ended_all_is_closed() -> None:
    assert judged("a", note("a", 1, "ended", reason="shutdown")) == ("", "a", "")
    assert judged("b", note("a", 1, "ended", reason="shutdown")) == ("", "a", "")


def test_power_loss_and_start_elsewhere() -> None:
    """H-7: a still says that it runs there."""
    notes = (note("a", 1, "running"), note("b", 2, "running"))
    assert judged("a", *notes) == ("b", "b", "")
    # by the start on b: a is dead, or was
    assert judged("b", *notes) == ("", "b", "")
    ended = (note("a", 1, "running"), note("b", 2, "ended", reason="shutdown"))
    assert judged("a", *ended) == ("", "b", "")
    assert judged("c", *ended) == ("", "b", "")


def test_power_loss_without_a_start() -> None:
    assert judged("a", note("a", 1, "running")) == ("", "a", "")
    assert judged("b", note("a", 1, "running")) == ("a", "a", "")


@pytest.mark.parametrize("phase", ["starting", "running"])
def test_a_start_that_is_announced_holds(phase: str) -> None:
    notes = (note("a", 3, "ended"), note("b", 4, phase))
    assert judged("a", *notes)[0] == "b"


def test_two_starts_of_one_number_hold_each_other_off() -> None:
    notes = (note("a", 3, "running"), note("b", 3, "running"))
    assert judged("a", *notes)[0] == "b"
    assert judged("b", *notes)[0] == "a"


def test_migration() -> None:
    """H-2, H-5: from a to b, at each moment, seen from a and from a third host."""
    coming = (note("a", 1, "running"), note("b", 2, "starting", arrived=True))
    assert judged("c", *coming)[0] == "b"
    both = (note("a", 1, "running"), note("b", 2, "running", arrived=True))
    assert judged("c", *both)[0] == "b"
    there = (note("a", 1, "ended", reason=MIGRATED), note("b", 2, "running", arrived=True))
    assert judged("a", *there) == ("b", "b", "")
    over = (note("a", 1, "ended", reason=MIGRATED), note("b", 2, "ended", reason="shutdown"))
    assert judged("a", *over) == ("", "b", "")
    assert judged("b", *over) == ("", "b", "")


def test_a_migration_that_failed_leaves_it_where_it_was() -> None:
    notes = (note("a", 1, "running"), note("b", 2, "ended", arrived=True, reason="failed"))
    assert judged("b", *notes)[0] == "a"
    assert judged("c", *notes)[0] == "a"


def test_migrated_to_a_host_that_says_nothing() -> None:
    for here in "ab":
        assert judged(here, note("a", 5, "ended", reason=MIGRATED))[0] == "a"
    # an end of before tells nothing of where it is now
    notes = (note("a", 5, "ended", reason=MIGRATED), note("b", 4, "ended", reason="shutdown"))
    assert judged("b", *notes)[0] == "a"


def test_a_host_that_is_gone_for_good() -> None:
    """What arrived there ran there until it is started anew elsewhere."""
    notes = (note("a", 1, "ended", reason=MIGRATED), note("b", 2, "running", arrived=True))
    assert judged("a", *notes)[0] == "b"
    again = (note("a", 3, "ended", reason="shutdown"), notes[1])
    assert judged("a", *again) == ("", "a", "")


def test_who_has_saved_its_end() -> None:
    end = note("b", 2, "ended", reason="shutdown", saved="p7", saved_number=2)
    assert judged("a", note("a", 1, "ended"), end) == ("", "b", "b")
    assert judged("b", note("a", 1, "ended"), end) == ("", "b", "")
    # of an end before the last
    stale = note("a", 1, "ended", saved="p6", saved_number=1)
    assert judged("b", stale, note("b", 2, "ended")) == ("", "b", "")
    assert judged("c", stale, note("b", 2, "ended")) == ("", "b", "")


def test_numbers() -> None:
    assert next_number(()) == 1
    assert next_number([note("a", 4, "ended"), note("b", 9, "starting")]) == 10
