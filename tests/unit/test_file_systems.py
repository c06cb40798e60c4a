"""What partx, blkid and LVM say of a stranger's disk is taken for no more than that."""

import random
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackupd.errors import NotSupportedError, UsageError
from nbdbackupd.model import file_systems, lvm
from nbdbackupd.model.file_systems import FileSystem
from nbdbackupd.ops.files import readers

MIB = 1 << 20
ROOT = FileSystem(disk="vda", partition=2, offset=MIB, size=MIB, type="ext4", is_files=True)
BOOT = replace(ROOT, partition=1, type="vfat")
SWAP = replace(ROOT, partition=3, type="swap", is_files=False)
VOLUME = replace(SWAP, partition=3, type="xfs", volume="vg/home", is_files=True)


def test_partitions_that_do_not_lie_on_the_disk() -> None:
    text = (
        'NR="1" START="2048" SECTORS="2048" NAME="a\\x20\\x22b" SCHEME="gpt"\n'
        'NR="2" START="4096" SECTORS="99999999" NAME="" SCHEME="gpt"\n'
        'NR="3" START="0" SECTORS="10" NAME="" SCHEME="gpt"\n'
        'NR="x" START="9" SECTORS="9" NAME="" SCHEME="gpt"\n'
        'NR="4" START="4096" SECTORS="9" TYPE="0x5" NAME="" SCHEME="dos"\n'
        'nonsense "\n'
    )
    (found,) = file_systems.parse_partx(text, 8 * MIB, 512)
    assert (found.number, found.offset, found.size) == (1, MIB, MIB)
    assert (found.name, found.scheme) == ('a "b', "gpt")
    (wide,) = file_systems.parse_partx(text.splitlines()[0], 64 * MIB, 4096)
    assert wide.offset == 8 * MIB


def test_tags_of_blkid() -> None:
    text = "ID_FS_LABEL=a_b\nID_FS_LABEL_ENC=a\\x20\\xc3\\xa4\\xff\nID_FS_TYPE=ext4\nOTHER=1\n"
    assert file_systems.parse_blkid(text) == {"LABEL": "a ä\ufffd", "TYPE": "ext4"}


@given(st.text(max_size=200))
def test_no_text_is_too_odd(text: str) -> None:
    file_systems.parse_blkid(text)
    file_systems.parse_partx(text, MIB, 512)


def test_the_journal_is_asked_for_by_one_bit() -> None:
    block = bytearray(1024)
    block[0x38:0x3A] = b"\x53\xef"
    assert not file_systems.is_unclean(bytes(block))
    block[0x60] = 0x46
    assert file_systems.is_unclean(bytes(block))
    assert not file_systems.is_unclean(bytes(block[:-1]))
    block[0x38] = 0
    assert not file_systems.is_unclean(bytes(block))


def test_the_choice() -> None:
    assert file_systems.choose([ROOT, SWAP], "") is ROOT
    assert file_systems.choose([ROOT, BOOT, SWAP], "1") is BOOT
    assert file_systems.choose([ROOT, SWAP, VOLUME], "3") is SWAP
    assert file_systems.choose([ROOT, SWAP, VOLUME], "vg/home") is VOLUME
    for found, wanted, words in (
        ([SWAP], "", "no file system was found; there is: partition 3 of vda"),
        ([ROOT, VOLUME], "", "several"),
        ([ROOT], "0", "no partition 0"),
        ([ROOT], "vg/home", "no partition vg/home"),
        ([ROOT, replace(ROOT, disk="vdb")], "2", "on vda, vdb: choose one with -d"),
    ):
        with pytest.raises(UsageError, match=words):
            file_systems.choose(found, wanted)


def test_what_no_reader_takes() -> None:
    luks = replace(SWAP, type="crypto_LUKS")
    with pytest.raises(NotSupportedError, match="encrypted"):
        readers.choose(luks, tool="", replay=False)
    with pytest.raises(UsageError, match="--replay"):
        readers.choose(ROOT, tool="grub-mount", replay=True)
    with pytest.raises(UsageError, match="several pieces"):
        readers.choose(replace(VOLUME, offset=-1), tool="fuse2fs", replay=False)


# -- LVM


def crc(data: bytes) -> int:
    """LVM2's checksum: CRC-32 that begins with a number of its own and ends as it is."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def physical_volume(text: str, ring: int = 0) -> bytes:
    """A volume of 1 MiB with one metadata area; the text begins at ``ring`` in it if given."""
    disk = bytearray(MIB)
    area, size = 4096, 64 << 10
    label = bytearray(512)
    label[:8], label[8:16] = b"LABELONE", (1).to_bytes(8, "little")
    label[20:24], label[24:32] = (32).to_bytes(4, "little"), b"LVM2 001"
    label[32:64] = b"abcdef0123456789abcdef0123456789"
    label[72:88] = MIB.to_bytes(8, "little") + bytes(8)
    label[104:120] = area.to_bytes(8, "little") + size.to_bytes(8, "little")
    label[16:20] = crc(bytes(label[20:])).to_bytes(4, "little")
    disk[512:1024] = label
    data = text.encode() + b"\0"
    start = ring or 512
    header = bytearray(512)
    header[4:20], header[20:24] = b" LVM2 x[5A%r0N*>", (1).to_bytes(4, "little")
    for place, number in ((24, area), (32, size), (40, start), (48, len(data))):
        header[place : place + 8] = number.to_bytes(8, "little")
    header[56:60] = crc(data).to_bytes(4, "little")
    disk[area : area + 512] = header
    first = data[: size - start]
    disk[area + start : area + start + len(first)] = first
    disk[area + 512 : area + 512 + len(data) - len(first)] = data[len(first) :]
    return bytes(disk)


def group(**changes: str) -> str:
    """The text of a group with volumes in one piece, in two that touch, and in two."""
    numbers = {"extent_size": "8", "pe_start": "2048", "status": '["READ", "VISIBLE"]'} | changes

    def segment(number: int, start: int, place: str, extent: int) -> str:
        return (
            f'segment{number} {{ start_extent = {start} extent_count = 4 type = "striped" '
            f'stripe_count = 1 # one disk\n stripes = [ "{place}", {extent} ] }}'
        )

    def volume(name: str, *segments: str) -> str:
        count = f"segment_count = {len(segments)}"
        return f"{name} {{ status = {numbers['status']} {count} {' '.join(segments)} }}\n"

    return (
        f"vg {{ extent_size = {numbers['extent_size']} seqno = 3\n"
        f'physical_volumes {{ pv0 {{ id = "abcdef-0123-4567-89ab-cdef-0123-456789" '
        f"pe_start = {numbers['pe_start']} }} }}\nlogical_volumes {{\n"
        + volume("one", segment(1, 0, "pv0", 10))
        + volume("two", segment(1, 0, "pv0", 20), segment(2, 4, "pv0", 24))
        + volume("far", segment(1, 0, "pv0", 30), segment(2, 4, "pv0", 40))
        + '}\n}\ncontents = "Text Format Volume Group"\n'
    )


def read_from(disk: bytes) -> lvm.Read:
    return lambda offset, length: disk[offset : offset + length]


@pytest.mark.parametrize("ring", [0, (64 << 10) - 300])
def test_volumes_of_a_group(ring: int) -> None:
    physical, found = lvm.volumes(read_from(physical_volume(group(), ring)))
    assert physical == "abcdef-0123-4567-89ab-cdef-0123-456789"
    assert [(each.name, each.size, each.physical == physical, each.offset) for each in found] == [
        ("vg/one", 4 * 4096, True, MIB + 10 * 4096),
        ("vg/two", 8 * 4096, True, MIB + 20 * 4096),
        ("vg/far", 8 * 4096, False, 0),
    ]


@pytest.mark.parametrize(
    "change",
    [{"extent_size": "-8"}, {"pe_start": "0x10"}, {"status": '["READ"]'}, {"status": "7"},
     {"extent_size": "9" * 30}, {"extent_size": "[ 1, 2 ]"}],
)  # fmt: skip
def test_groups_that_make_no_sense(change: dict[str, str]) -> None:
    _, found = lvm.volumes(read_from(physical_volume(group(**change))))
    assert [each for each in found if each.physical] == []


@pytest.mark.parametrize("text", ["", "{", "}", "vg {", "vg = [ 1", "a { " * 99, "a {} b {}"])
def test_texts_that_make_no_sense(text: str) -> None:
    assert lvm.volumes(read_from(physical_volume(text)))[1] == ()


def test_names_that_are_options_or_paths() -> None:
    for name in ("-rf", "..", '"a b"', '"x/../../y"', '"a:/:rw"'):
        text = group().replace("one {", f"{name} {{")
        _, found = lvm.volumes(read_from(physical_volume(text)))
        assert [each.name for each in found] == ["vg/two", "vg/far"], name


def test_every_flipped_byte_is_harmless() -> None:
    good = physical_volume(group())
    expected = lvm.volumes(read_from(good))
    rng = random.Random(3)
    places = [*range(512, 1024), *range(4096, 4096 + 60), *range(4608, 4608 + len(group()))]
    for place in rng.sample(places, 600):
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        physical, found = lvm.volumes(read_from(bytes(bad)))
        # what the checksums cover is refused, the rest means nothing
        assert (physical, found) in (expected, ("", ()), (expected[0], ()))
