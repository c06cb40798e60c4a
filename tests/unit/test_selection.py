"""Which disks are saved, which are left out, which are refused."""

from collections.abc import Collection

import pytest

from nbdbackupd.errors import NotSupportedError, UsageError
from nbdbackupd.model.chain import Level
from nbdbackupd.model.domain import Disk, Domain
from nbdbackupd.model.selection import How, ImageFacts, Selection, select_disks


def qcow2(target: str) -> Disk:
    return Disk(target=target, format="qcow2", source=f"/i/{target}")


DOMAIN = Domain(
    name="vm1",
    uuid="u",
    disks=(
        qcow2("vda"),
        qcow2("vdb"),
        Disk(target="vdr", source="/i/r.raw"),
        Disk(target="sda", device="cdrom", source="/i/cd.iso"),
        Disk(target="fda", device="floppy"),
        Disk(target="sdl", device="lun", type="block", source="/dev/sdq"),
    ),
)


def only(*disks: Disk) -> Domain:
    return Domain(name="vm1", uuid="u", disks=disks)


def select(
    domain: Domain = DOMAIN,
    *,
    level: Level = Level.INC,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    raw: bool = False,
    facts: dict[str, ImageFacts] | None = None,
) -> Selection:
    return select_disks(domain, facts or {}, level=level, include=include, exclude=exclude, raw=raw)


def test_default_takes_what_can_be_tracked_and_lists_the_rest() -> None:
    found = select()
    assert [(disk.target, disk.how) for disk in found.chosen] == [
        ("vda", How.BITMAP),
        ("vdb", How.BITMAP),
    ]
    reasons = {skip.target: skip.reason for skip in found.skipped}
    assert list(reasons) == ["vdr", "sda", "fda", "sdl"]
    assert "--raw" in reasons["vdr"]
    assert "CD-ROM" in reasons["sda"]
    assert reasons["fda"] == "an empty drive"
    assert "LUN" in reasons["sdl"]


@pytest.mark.parametrize("level", [Level.FULL, Level.INC, Level.DIFF, Level.COPY])
def test_raw_is_read_in_full_when_asked(level: Level) -> None:
    found = select(raw=True, level=level)
    assert {disk.target: disk.how for disk in found.chosen}["vdr"] is How.FULL_ONLY


def test_include_and_exclude() -> None:
    found = select(include=["vda", "vdb"], exclude=[])
    assert {skip.target: skip.reason for skip in found.skipped}["sda"].startswith("not among")
    found = select(exclude=["vda", "sda"])
    assert [disk.target for disk in found.chosen] == ["vdb"]
    assert {skip.target for skip in found.skipped} == {"vda", "vdr", "sda", "fda", "sdl"}


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        (["vdz"], [], "no disk vdz"),
        ([], ["vd"], "no disk vd"),
        (["vda"], ["vda"], "both"),
        (["fda"], [], "empty drive"),
        (["vda", "sdl"], [], "LUN"),
        (["vdr"], [], "--raw"),
    ],
)
def test_contradictions(include: list[str], exclude: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        select(include=include, exclude=exclude)


def test_nothing_left() -> None:
    with pytest.raises(NotSupportedError, match="no disk to save"):
        select(exclude=["vda", "vdb"])
    with pytest.raises(NotSupportedError, match="no disks"):
        select(only())


@pytest.mark.parametrize("level", [Level.FULL, Level.INC, Level.DIFF])
def test_what_holds_no_bitmaps_is_saved_whole_with_the_cure(level: Level) -> None:
    """L-7: one such disk refused the whole domain."""
    old = {"vda": ImageFacts(format="qcow2", compat="0.10")}
    first, second = select(level=level, facts=old).chosen
    assert (first.how, first.is_fault, second.how) == (How.FULL_ONLY, True, How.BITMAP)
    assert "'qemu-img amend -f qcow2 -o compat=1.1 " in first.why
    vmdk = only(Disk(target="vda", format="vmdk", source="/i/a"), qcow2("vdb"))
    first = select(vmdk, level=level).chosen[0]
    assert (first.how, first.is_fault) == (How.FULL_ONLY, True)
    assert first.why == "format vmdk holds no bitmaps: convert it to qcow2"


def test_what_is_left_out_for_want_of_a_way() -> None:
    """W-2, L-7: disks that hold data, and that nobody excluded, are not left out in silence."""
    domain = only(
        qcow2("vda"),
        Disk(target="vdb", source="/i/b"),
        Disk(target="vdc", device="lun", type="block", source="/dev/c"),
        Disk(target="vdd", type="vhostuser", source="/s"),
        Disk(target="vde", type="dir", format="fat", source="/d"),
        Disk(target="vdf"),
        qcow2("vdg"),
        Disk(target="vdh", format="qcow2", source="/i/h", transient=True),
        Disk(target="hda", device="cdrom", source="/i/cd"),
        Disk(target="fda", device="floppy"),
    )
    facts: dict[str, ImageFacts] = {}
    missing = {"vdg": "No such file or directory", "hda": "of no interest"}
    found = select_disks(domain, facts, level=Level.INC, missing=missing)
    assert [each.target for each in found.chosen] == ["vda"]
    assert [each.target for each in found.unsaved] == ["vdb", "vdc", "vdd", "vde", "vdf", "vdg"]
    assert found.unsaved[-1].reason.endswith("can't be read: No such file or directory")
    found = select_disks(domain, facts, level=Level.INC, missing=missing, exclude=["vdg", "vdb"])
    assert [each.target for each in found.unsaved] == ["vdc", "vdd", "vde", "vdf"]
    # a CD that is named is wanted
    named = select_disks(domain, facts, level=Level.INC, include=["hda"])
    assert [(each.target, each.how) for each in named.chosen] == [("hda", How.FULL_ONLY)]


def test_copy_takes_what_holds_no_bitmaps() -> None:
    domain = only(qcow2("vda"), Disk(target="vdb", format="vmdk", source="/i/b"))
    old = {"vda": ImageFacts(format="qcow2", compat="0.10")}
    found = select(domain, level=Level.COPY, facts=old)
    assert [disk.how for disk in found.chosen] == [How.FULL_ONLY, How.FULL_ONLY]


def test_format_is_what_the_guest_sees_not_what_the_image_claims() -> None:
    # a guest may write a qcow2 header to its raw disk
    domain = only(qcow2("vda"), Disk(target="vdb", format="raw", source="/i/b"))
    facts = {"vdb": ImageFacts(format="qcow2", compat="1.1")}
    assert [skip.target for skip in select(domain, facts=facts).skipped] == ["vdb"]


def test_disks_that_libvirt_tracks_no_changes_of() -> None:
    domain = only(
        qcow2("vda"),
        Disk(target="vdb", format="qcow2", source="/i/b", readonly=True),
        Disk(target="vdc", format="qcow2", source="/i/c", transient=True),
        Disk(target="vdd", format="qcow2", source="/i/d", data_file="/i/d.raw"),
        Disk(target="vde", type="vhostuser", source="/s"),
        Disk(target="vdf", format="qcow2"),
    )
    facts = {"vdd": ImageFacts(format="qcow2", compat="1.1", has_raw_data=True)}
    found = select(domain, facts=facts)
    assert {disk.target: disk.how for disk in found.chosen} == {
        "vda": How.BITMAP,
        "vdb": How.FULL_ONLY,
        "vdd": How.FULL_ONLY,
    }
    facts = {"vdd": ImageFacts(format="qcow2", compat="1.1")}
    assert select(domain, facts=facts).chosen[-1].how is How.BITMAP
    assert [skip.target for skip in found.skipped] == ["vdc", "vde", "vdf"]


def test_an_image_of_no_bytes_is_not_tracked() -> None:
    """W-11: QEMU says that it added a bitmap and does not store it."""
    facts = {"vda": ImageFacts(format="qcow2", compat="1.1", size=0)}
    assert select(only(qcow2("vda")), facts=facts).chosen[0].how is How.FULL_ONLY
