"""Single files of points: what is read of real file systems equals what was put into them."""

import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from nbdbackupd.repo import layout
from nbdbackupd.units import local_time
from tests.lib import trees
from tests.lib.ctl import PYTHON, ROOT, Ctl
from tests.lib.sets import Change, SetBuilder
from tests.lib.trees import MIB

pytestmark = pytest.mark.component

SECONDS: Final = 110.0
MANY: Final = 10_000


@pytest.fixture(scope="module", autouse=True)
def _fuse() -> None:
    """Without FUSE nothing here can be shown, and that must be seen."""
    assert os.access("/dev/fuse", os.R_OK | os.W_OK), (
        "/dev/fuse is needed: give the machine of the tests this device (docker: --device "
        "/dev/fuse --cap-add SYS_ADMIN)"
    )


class World:
    """Directories as they were, and a set whose disks hold them."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.hard = trees.hard_cases(top / "hard", MANY)
        self.plain = trees.plain_cases(top / "plain")
        ext = trees.ext4(top / "ext", self.hard, 128 * MIB, "root", "-N", "20000")
        xfs = trees.xfs(top / "xfs", self.plain, 32 * MIB, "data")
        fat = trees.vfat(top / "fat", self.plain, 16 * MIB, "EFI")
        ntfs = trees.ntfs(top / "ntfs", self.plain, 16 * MIB, "Windows")
        self.vda = top / "vda.raw"
        self.starts = trees.disk(
            self.vda, "gpt",
            [(fat, ", type=uefi, name=boot"), (ext, ""), (xfs, ""), (MIB, ", type=swap")],
        )  # fmt: skip
        self.vdb = top / "vdb.raw"
        trees.disk(
            self.vdb, "dos", [(ntfs, ", type=7"), (20 * MIB, ", type=5"), (fat, "5:, type=c")]
        )  # 5: an extended partition, so the last one is a logical one
        self.set = top / "set"
        made = SetBuilder(self.set, level=1)
        made.disks = {
            "vda": bytearray(self.vda.read_bytes()), "vdb": bytearray(self.vdb.read_bytes())
        }  # fmt: skip
        made.full()
        # what the guest does next: one file more, another gone
        (top / "late").write_text("made later\n")
        where = f"{self.vda}?offset={self.starts[1]}"
        for command in (
            f"write {top / 'late'} /late",
            "rm /empty",
            "ea_set /late user.colour blue",
        ):
            subprocess.run(["debugfs", "-w", "-R", command, where], check=True, capture_output=True)
        made.inc({"vda": differences(made.disks["vda"], self.vda.read_bytes())})
        self.ctl = Ctl("test:///default", top)


def differences(old: bytearray, new: bytes, grain: int = 4096) -> list[Change]:
    """What changed between two states of a disk."""
    return [
        Change(start, new[start : start + grain])
        for start in range(0, len(new), grain)
        if old[start : start + grain] != new[start : start + grain]
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("files"))
    yield made
    left = [line for line in mounts() if str(made.top) in line]
    assert not left
    for name in ("mounts", "map"):
        assert [each.name for each in (made.ctl.runtime / name).iterdir()] == ["gate"]


def has_inodes() -> bool:
    """Whether fuse2fs shows inode numbers of its own: built with FUSE 2 it does."""
    done = subprocess.run(["fuse2fs", "-V"], capture_output=True, text=True, check=False)
    found = re.search(r"FUSE library version:? (\d)", done.stdout + done.stderr)
    assert found is not None
    return found[1] == "2"


def as_read(top: Path) -> dict[str, tuple[object, ...]]:
    """A directory as fuse2fs can show it."""
    found = trees.described(top)
    if not has_inodes():
        found["// names of one file"] = ()
    return found


def mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def waited(what: object, seconds: float = SECONDS) -> None:
    """Until it is so."""
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def first(world: World) -> str:
    return str(world.ctl.points(world.set)[0]["id"])


# -- what there is


def test_file_systems_of_both_kinds_of_tables(world: World) -> None:
    found = world.ctl("files", world.set, "fs", "--json").json["file_systems"]
    assert [(each["disk"], each["partition"], each["type"], each["label"]) for each in found] == [
        ("vda", 1, "vfat", "EFI"), ("vda", 2, "ext4", "root"), ("vda", 3, "xfs", "data"),
        ("vda", 4, "", ""), ("vdb", 1, "ntfs", "Windows"), ("vdb", 5, "vfat", "EFI"),
    ]  # fmt: skip
    assert [each["offset"] for each in found[:4]] == world.starts
    assert found[0]["name"] == "boot"
    assert [each["files"] for each in found] == [True, True, True, False, True, True]


def test_the_one_that_is_meant_must_be_clear(world: World) -> None:
    several = world.ctl("files", "-d", "vda", world.set, "ls", code=2)
    assert "partition 2 of vda (ext4, 128 MiB)" in several.stderr
    for wanted in ("7", "vg/root"):
        none = world.ctl("files", "-p", wanted, world.set, "ls", code=2)
        assert f"no partition {wanted}" in none.stderr
    both = world.ctl("files", "-p", "1", world.set, "ls", code=2)
    assert "on vda, vdb" in both.stderr
    swap = world.ctl("files", "-p", "4", world.set, "ls", code=20)
    assert "no file system" in swap.stderr


# -- ext4: all that it holds


def test_ext4_comes_out_as_it_was(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ("-d", "vda", "-p", "2", "--point", first(world), world.set, "cp", "/", out, "--json")
    report = world.ctl("files", *argv, code=3).json
    assert report["warnings"] == ["/pipe: fifo"]
    assert report["problems"] == []
    (out / "lost+found").rmdir()
    expected = as_read(world.hard)
    del expected["pipe"]
    assert trees.described(out) == expected
    told = [each for each in report["notes"] if "names are of one file" in each]
    assert bool(told) != has_inodes()
    assert (out / "etc/program").stat().st_mode & stat.S_ISUID == 0
    assert (out / "sparse").stat().st_blocks * 512 < MIB
    assert report["copied"]["files"] == sum(each.is_file() and not each.is_symlink()
                                            for each in world.hard.rglob("*"))  # fmt: skip


def test_ext4_as_an_archive(world: World, tmp_path: Path) -> None:
    file, out = tmp_path / "out.tar.gz", tmp_path / "out"
    argv = ("-d", "vda", "-p", "2", "--point", first(world), world.set, "tar", "/", "-z", "-f")
    world.ctl("files", *argv, file)
    assert file.stat().st_size < 4 * MIB
    out.mkdir()
    with tarfile.open(file) as archive:
        assert len(archive.getmembers()) == len(list(world.hard.rglob("*"))) + 2
    trees.run(["tar", "-x", "-p", "--numeric-owner", "-f", file, "-C", out])
    (out / "lost+found").rmdir()
    assert trees.described(out) == as_read(world.hard)
    assert stat.S_IMODE((out / "etc/program").stat().st_mode) == 0o4755


def test_each_point_has_its_own_files(world: World, tmp_path: Path) -> None:
    old = world.ctl("files", "-d", "vda", "-p", "2", "--point", first(world), world.set, "ls")
    new = world.ctl("files", "-d", "vda", "-p", "2", world.set, "ls")
    assert "/empty\n" in old.stdout
    assert "/late\n" not in old.stdout
    assert "/empty\n" not in new.stdout
    assert "/late\n" in new.stdout
    world.ctl("files", "-d", "vda", "-p", "2", world.set, "cp", "late", tmp_path)
    assert (tmp_path / "late").read_text() == "made later\n"
    try:
        os.setxattr(tmp_path, "user.test", b"x")
        assert os.getxattr(tmp_path / "late", "user.colour") == b"blue"
    except OSError as err:
        assert err.errno == errno.ENOTSUP  # noqa: PT017 - of this host's file system
    archive = world.ctl("files", "-d", "vda", "-p", "2", world.set, "tar", "late", "-f",
                        tmp_path / "a.tar")  # fmt: skip
    assert "can't read" not in archive.stderr
    with tarfile.open(tmp_path / "a.tar") as opened:
        (member,) = opened.getmembers()
    assert member.pax_headers["SCHILY.xattr.user.colour"] == "blue"


def test_a_listing_tells_all(world: World) -> None:
    argv = ("-d", "vda", "-p", "2", "--point", first(world), world.set, "ls")
    entries = world.ctl("files", *argv, "/tmp", "/etc/hosts", "/absolute", "--json").json["entries"]
    names = sorted((each.name for each in (world.hard / "tmp").iterdir()), key=os.fsencode)
    assert [each["path"] for each in entries[:-2]] == [f"/tmp/{name}" for name in names]
    for each in entries[-2:]:
        assert each["path"] == "/etc/hosts"
        assert (each["type"], each["mode"], each["size"], each["links"]) == ("file", "0644", 20, 2)
        assert each["modified"] == "2001-02-03T04:05:06Z"
    text = world.ctl("files", *argv, "/").stdout
    assert "-> ../../../../../../etc" in text
    hosts = world.ctl("files", *argv, "/etc/hosts").stdout
    assert f"  {local_time('2001-02-03T04:05:06Z')}  " in hosts
    assert [line[0] for line in text.splitlines() if line.endswith("/pipe")] == ["p"]
    assert all(line.isprintable() for line in world.ctl("files", *argv, "/tmp").stdout.split("\n"))
    deep = world.ctl("files", *argv, "-R", "/etc").stdout
    assert "/etc/deep/er/secret" in deep


def test_links_lead_nowhere_but_into_the_tree(world: World, tmp_path: Path) -> None:
    argv = ("-d", "vda", "-p", "2", "--point", first(world), world.set, "cp")
    world.ctl("files", *argv, "/out/hosts", "/directory/er/secret", "/../../etc/program", tmp_path)
    for name, path in {"hosts": "etc/hosts", "secret": "etc/deep/er/secret",
                       "program": "etc/program"}.items():  # fmt: skip
        assert (tmp_path / name).read_bytes() == (world.hard / path).read_bytes()
    world.ctl("files", *argv, "/out", tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("../../../../../../etc")
    for path, words in {"/round/x": "loop", "/dangling/x": "no /dangling/x", "/etc/no": "no /etc",
                        "/etc/hosts/x": "no /etc/hosts/x"}.items():  # fmt: skip
        assert words in world.ctl("files", *argv, path, tmp_path, code=2).stderr


def test_nothing_is_replaced(world: World, tmp_path: Path) -> None:
    argv = ("-d", "vda", "-p", "2", world.set)
    (tmp_path / "hosts").symlink_to("elsewhere")
    assert "exists" in world.ctl("files", *argv, "cp", "/etc/hosts", tmp_path, code=50).stderr
    assert not (tmp_path / "elsewhere").exists()
    world.ctl("files", *argv, "cp", "/etc/hosts", tmp_path / "hosts", code=50)
    assert "new name" in world.ctl("files", *argv, "cp", "/", tmp_path, code=2).stderr
    world.ctl("files", *argv, "cp", "/etc", "/late", tmp_path / "new", code=2)
    (tmp_path / "a.tar").write_text("old")
    world.ctl("files", *argv, "tar", "-f", tmp_path / "a.tar", code=50)
    assert (tmp_path / "a.tar").read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.tar", "hosts"]


# -- the other file systems, by grub-mount


@pytest.mark.parametrize(
    ("disk", "number", "kind"),
    [("vda", "1", "vfat"), ("vda", "3", "xfs"), ("vdb", "1", "ntfs"), ("vdb", "5", "vfat")],
)
def test_files_of_others(world: World, tmp_path: Path, disk: str, number: str, kind: str) -> None:
    argv = ("-d", disk, "-p", number, "--tool", "grub-mount", world.set)
    if kind == "ntfs":
        for name in ("top.bin", "a copy"):
            world.ctl("files", *argv, "cp", "/top.bin", tmp_path / name)
            assert (tmp_path / name).read_bytes() == (world.plain / "top.bin").read_bytes()
        return
    done = world.ctl("files", *argv, "cp", "/", tmp_path / "out")
    assert ("without owners and rights" in done.stderr) == (kind == "xfs")
    found = trees.described(tmp_path / "out", rights=False)
    assert found == trees.described(world.plain, rights=False)


def test_the_kernel_reads_if_it_is_asked_to(world: World, tmp_path: Path) -> None:
    done = world.ctl("files", "-d", "vda", "-p", "3", "--kernel", world.set, "cp", "/",
                     tmp_path / "out")  # fmt: skip
    assert "can take over the host" in done.stderr
    found, expected = (trees.described(each) for each in (tmp_path / "out", world.plain))
    # a prototype of mkfs.xfs knows no times
    for name in expected:
        if not name.startswith("//"):
            found[name] = (*found[name][:2], None, found[name][3])
            expected[name] = (*expected[name][:2], None, expected[name][3])
    assert found == expected


def test_a_reader_that_follows_links(tmp_path: Path) -> None:
    """Links are what they point to, none leads round in circles, lost ones are told."""
    source = trees.plain_cases(tmp_path / "src")
    for name, target in {"to-file": "top.bin", "to-dir": "dir", "dir/round": "..",
                         "dir/lost": "nowhere", "dir/self": "."}.items():  # fmt: skip
        (source / name).symlink_to(target)
    made = SetBuilder(tmp_path / "set", level=1)
    image = trees.xfs(tmp_path / "xfs", source, 32 * MIB, "links")
    made.disks = {"vda": bytearray(image.read_bytes())}
    made.full()
    ctl = Ctl("test:///default", tmp_path)
    argv = ("--tool", "grub-mount", made.path)
    report = ctl("files", *argv, "cp", "/", tmp_path / "out", "--json", code=3).json
    told = set(report["warnings"])
    assert "/dir/lost: a link to what is not there" in told
    assert "/dir/self: a link to a directory that holds it" in told
    assert "/dir/round: a link to a directory that holds it" in told
    for path in ("top.bin", "to-file"):
        assert (tmp_path / "out" / path).read_bytes() == (source / "top.bin").read_bytes()
    for path in ("dir", "to-dir"):
        big = tmp_path / "out" / path / "below/big.bin"
        assert big.read_bytes() == (source / "dir/below/big.bin").read_bytes()
    listed = ctl("files", *argv, "ls", "-R", "/dir", "--json", code=3).json["entries"]
    assert "/dir/below/big.bin" in [each["path"] for each in listed]


# -- mounts


def test_a_mount_until_it_is_unmounted(world: World, tmp_path: Path) -> None:
    at = tmp_path / "at"
    at.mkdir()
    options = ("-d", "vda", "-p", "2", "--point", first(world))
    done = world.ctl("mount", *options, "--detach", world.set, at, "--json").json
    try:
        look_at(world, at, done, options)
    finally:
        world.ctl("unmount", "--lazy", at, code=None)
    assert "nothing is mounted" in world.ctl("unmount", at, code=2).stderr
    (at / "file").write_text("x")
    assert "not empty" in world.ctl("mount", *options, world.set, at, code=2).stderr


def look_at(world: World, at: Path, done: dict[str, object], options: tuple[str, ...]) -> None:
    """What there is to see while it is mounted, and what can be done to it."""
    assert done["directory"] == str(at)
    assert done["tool"] == "fuse2fs"
    # here, in contrast to a copy, a program keeps what makes it run as its owner
    assert (at / "etc/program").stat().st_mode & stat.S_ISUID
    for part in ("etc", "tmp", "no entry"):
        assert trees.described(at / part) == as_read(world.hard / part)
    assert len(list((at / "many").iterdir())) == MANY // 100
    with pytest.raises(OSError, match=r"[Rr]ead-only"):
        (at / "new").write_text("x")
    assert "already" in world.ctl("mount", *options, world.set, at, code=2).stderr
    with (at / "sparse").open("rb") as held:
        assert "in use" in world.ctl("unmount", at, code=75).stderr
        assert held.read(3) == b"\0\0\0"
    world.ctl("unmount", at)
    assert list(at.iterdir()) == []


def test_a_mount_in_use_can_be_detached(world: World, tmp_path: Path) -> None:
    at = tmp_path / "with blank"
    at.mkdir()
    world.ctl("mount", "-d", "vda", "-p", "2", "--detach", world.set, at)
    with (at / "late").open("rb"):
        world.ctl("unmount", "--lazy", at)
        assert list(at.iterdir()) == []


@pytest.mark.parametrize("tool", ["fuse2fs", "grub-mount", "kernel"])
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL", "fusermount3"])
def test_each_way_a_mount_ends(world: World, tmp_path: Path, tool: str, how: str) -> None:
    at = tmp_path / "at"
    at.mkdir()
    options = ("-d", "vda", "-p", "2", *(["--kernel"] if tool == "kernel" else ["--tool", tool]))
    with world.ctl.start("mount", *options, world.set, at) as process:
        waited(lambda: any(str(at) in line for line in mounts()))
        waited((at / "late").exists)
        # who unmounts it before we have seen it there ends a program that failed to mount
        assert process.stdout is not None
        assert process.stdout.readline()
        if how == "fusermount3":
            unmount = ["umount", str(at)] if tool == "kernel" else ["fusermount3", "-u", str(at)]
            subprocess.run(unmount, check=True, timeout=SECONDS)
        else:
            process.send_signal(signal.Signals[how])
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == (-signal.SIGKILL if how == "SIGKILL" else 0), (out, err)
    if how == "SIGKILL":
        # the next one sweeps up
        world.ctl("files", "-d", "vda", world.set, "fs")
    waited(lambda: not any(str(world.top) in line or str(at) in line for line in mounts()))
    waited(lambda: not processes(str(world.ctl.runtime)))
    assert [each.name for each in (world.ctl.runtime / "mounts").iterdir()] == ["gate"]
    at.rmdir()


def processes(word: str) -> list[str]:
    """Command lines that name a path."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line and "/proc/self" not in line:
            found.append(line)
    return found


def test_a_copy_that_is_interrupted(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ("-d", "vda", "-p", "2", world.set, "cp", "/many", out)
    with world.ctl.start("files", *argv) as process:
        waited(lambda: len(list(out.rglob("file *"))) > 20)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    found = [path for path in out.rglob("*") if path.is_file()]
    for path in found:
        assert path.read_bytes() == (world.hard / "many" / path.relative_to(out)).read_bytes()
    assert 20 < len(found) < MANY


# -- what is not as it should be


def test_an_unclean_journal(tmp_path: Path) -> None:
    """What only the journal holds is not shown unless it is replayed; the set stays as it is."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/file").write_bytes(b"o" * 4096)
    (tmp_path / "new").write_bytes(b"n" * 4096)
    image = trees.ext4(tmp_path / "ext", tmp_path / "src", 32 * MIB, "j", "-b", "4096")
    block = trees.run(["debugfs", "-R", "bmap /file 0", image]).strip()
    subprocess.run(
        ["debugfs", "-w", "-f", "-", image], check=True, capture_output=True, text=True,
        input=f"jo\njw -b {block} {tmp_path / 'new'}\njc\n", timeout=SECONDS,
    )  # fmt: skip
    made = SetBuilder(tmp_path / "set", level=1)
    made.disks = {"vda": bytearray(image.read_bytes())}
    made.full()
    ctl = Ctl("test:///default", tmp_path)
    before = trees.described(tmp_path / "set")
    assert ctl("files", made.path, "fs", "--json").json["file_systems"][0]["unclean"] is True
    done = ctl("files", made.path, "cp", "/file", tmp_path / "old")
    assert "was not replayed" in done.stderr
    assert (tmp_path / "old").read_bytes() == b"o" * 4096
    done = ctl("files", made.path, "cp", "/file", tmp_path / "replayed", "--replay")
    assert "was not replayed" not in done.stderr
    assert (tmp_path / "replayed").read_bytes() == b"n" * 4096
    after = trees.described(tmp_path / "set")
    # the lock of who reads
    assert after.pop(layout.READING)
    assert after == before
    assert (
        "can't replay"
        in ctl("files", "--replay", "--tool", "grub-mount", made.path, "ls", code=2).stderr
    )


def test_damage_is_told_and_the_rest_is_there(tmp_path: Path) -> None:
    source = trees.plain_cases(tmp_path / "src")
    content = (source / "dir/below/big.bin").read_bytes()
    image = trees.ext4(tmp_path / "ext", source, 32 * MIB, "d")
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(image.read_bytes())}
    made.full()
    stream = made.path / made.points[0].disk("vda").file
    data = bytearray(stream.read_bytes())
    data[data.index(content[1_000_000:1_000_064])] ^= 1
    stream.write_bytes(data)
    ctl = Ctl("test:///default", tmp_path)
    done = ctl("files", made.path, "cp", "/", tmp_path / "out", code=40)
    assert "can't read /dir/below/big.bin: " in done.stderr
    assert "its SHA-256 does not match" in done.stderr
    expected = trees.described(source)
    del expected["dir/below/big.bin"]
    found = trees.described(tmp_path / "out")
    del found["lost+found"]
    assert found == expected
    done = ctl("files", made.path, "tar", "-f", tmp_path / "a.tar", code=40)
    assert "can't read /dir/below/big.bin" in done.stderr


def test_damage_where_the_file_system_begins(tmp_path: Path) -> None:
    """It must not be taken for a disk that holds nothing."""
    source = trees.plain_cases(tmp_path / "src")
    image = trees.ext4(tmp_path / "ext", source, 16 * MIB, "to be damaged")
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(image.read_bytes())}
    made.full()
    stream = made.path / made.points[0].disk("vda").file
    data = bytearray(stream.read_bytes())
    data[data.index(b"to be damaged")] ^= 1
    stream.write_bytes(data)
    done = Ctl("test:///default", tmp_path)("files", made.path, "fs", code=40)
    assert "damaged where partitions" in done.stderr
    assert done.stdout == ""


def test_names_that_would_lead_out(tmp_path: Path) -> None:
    (tmp_path / "src/dir").mkdir(parents=True)
    (tmp_path / "src/dir/.._.._evil").write_text("evil")
    (tmp_path / "src/good").write_text("good")
    image = trees.ext4(tmp_path / "ext", tmp_path / "src", 16 * MIB, "h", "-O", "^metadata_csum")
    data = image.read_bytes()
    assert data.count(b".._.._evil") == 1
    made = SetBuilder(tmp_path / "set")
    made.disks = {"vda": bytearray(data.replace(b".._.._evil", b"../../evil"))}
    made.full()
    ctl = Ctl("test:///default", tmp_path)
    (tmp_path / "a").mkdir()
    ctl("files", made.path, "cp", "/", tmp_path / "a/out", code=30)
    assert (tmp_path / "a/out/good").read_text() == "good"
    assert not list(tmp_path.rglob("evil"))


def test_what_is_missing_is_named(world: World, tmp_path: Path) -> None:
    argv = ("-d", "vda", "-p", "2", world.set, "ls")
    for name, package in {"fuse2fs": "fuse2fs", "nbdfuse": "libnbd-bin", "fusermount3": "fuse3",
                          "grub-mount": "grub-common"}.items():  # fmt: skip
        ctl = Ctl("test:///default", world.top, {"PATH": str(without(tmp_path / name, name))})
        more = ("--tool", name) if "mount" in name[:5] + name[-5:] and "grub" in name else ()
        done = ctl("files", *more, *argv, code=None)
        assert done.code in (20, 30)
        assert f"install the package {package}" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def without(directory: Path, name: str) -> Path:
    """A directory of programs that lacks one."""
    directory.mkdir()
    lacks = {name, "fusermount" if name == "fusermount3" else name, "guestmount"}
    for place in ("/usr/bin", "/usr/sbin"):
        for path in Path(place).iterdir():
            if path.name not in lacks and not (directory / path.name).is_symlink():
                (directory / path.name).symlink_to(path)
    return directory


def test_logical_volumes(tmp_path: Path) -> None:
    """A group on a partition of one disk and on another disk; one volume lies on both."""
    source = trees.hard_cases(tmp_path / "src")
    plain = trees.plain_cases(tmp_path / "plain")
    image = trees.ext4(tmp_path / "ext", source, 64 * MIB, "lvroot")
    fat = trees.vfat(tmp_path / "fat", plain, 40 * MIB, "SPLIT")
    disks = trees.lvm_group(tmp_path, image, fat)
    made = SetBuilder(tmp_path / "set", level=1)
    made.disks = {name: bytearray(path.read_bytes()) for name, path in disks.items()}
    made.full()
    ctl = Ctl("test:///default", tmp_path)
    found = ctl("files", made.path, "fs", "--json").json["file_systems"]
    assert [(each["volume"], each["type"], each["offset"] > 0) for each in found] == [
        ("", "LVM2_member", True), ("", "LVM2_member", False),
        ("vg-a/ro-ot", "ext4", True), ("vg-a/wide", "", False),
    ]  # fmt: skip
    # the only one that is known to hold files
    ctl("files", made.path, "cp", "/etc", tmp_path)
    assert trees.described(tmp_path / "etc") == as_read(source / "etc")
    for volume, name, where in (("wide", "top.bin", plain), ("ro-ot", "empty", source)):
        ctl("files", made.path, "cp", name, tmp_path, "-p", f"vg-a/{volume}",
            "--tool", "grub-mount")  # fmt: skip
        assert (tmp_path / name).read_bytes() == (where / name).read_bytes()
    assert (
        "several pieces"
        in ctl("files", made.path, "ls", "-p", "vg-a/wide", "--tool", "fuse2fs", code=2).stderr
    )


def test_a_host_without_fuse(world: World) -> None:
    hide = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"'
    argv = world.ctl.argv("files", world.set, "fs")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hide, "sh", *argv], cwd=ROOT, check=False,
        env=world.ctl.environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 10, done.stderr
    assert "/dev/fuse does not exist" in done.stderr
    assert "kernel module fuse" in done.stderr


def test_root_is_not_needed(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As an account that owns nothing but a directory."""
    top = Path(f"/var/tmp/{tmp_path_factory.mktemp('u').name}-{os.getpid()}")
    top.mkdir(mode=0o755)
    try:
        shutil.copytree(ROOT / "nbdbackupd", top / "nbdbackupd")
        shutil.copytree(world.set, top / "set")
        trees.run(["chmod", "-R", "a+rX", top])
        own = top / "own"
        (own / "at").mkdir(parents=True)
        trees.run(["chown", "-R", "65534:65534", own])
        head = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", PYTHON]
        head += ["-m", "nbdbackupd", "--runtime-dir", str(own / "run")]

        def as_nobody(*argv: str | Path) -> str:
            done = subprocess.run(
                [*head, *argv], cwd=top, check=False, capture_output=True, text=True,
                timeout=SECONDS, env={"PATH": "/usr/bin:/usr/sbin"},
            )  # fmt: skip
            assert done.returncode in (0, 3), done.stderr
            return done.stdout

        options = ("-d", "vda", "-p", "2")
        as_nobody("files", *options, top / "set", "cp", "/etc", "/no entry", own)
        assert trees.described(own / "etc") == as_read(world.hard / "etc")
        assert trees.described(own / "no entry") == trees.described(world.hard / "no entry")
        as_nobody("files", "-d", "vda", "-p", "3", top / "set", "cp", "/top.bin", own)
        assert (own / "top.bin").read_bytes() == (world.plain / "top.bin").read_bytes()
        as_nobody("mount", "--detach", *options, top / "set", own / "at")
        assert "late" in as_nobody("unmount", own / "at") or not any(
            str(own) in line for line in mounts()
        )
    finally:
        shutil.rmtree(top, ignore_errors=True)


def test_contradictions(world: World) -> None:
    for argv, words in {
        ("ls", "-f", "x"): "-f and -z are for tar",
        ("cp", "/x"): "where to",
        ("fs", "/x"): "takes no PATH",
        ("cp", "-R", "/x", "y"): "-R is for ls",
        ("tar", "--json"): "stdout",
        ("ls", "-p", "3", "-d", "vda", "--tool", "fuse2fs"): "fuse2fs reads ext2",
    }.items():
        action, *rest = argv
        done = world.ctl("files", world.set, action, *rest, code=2)
        assert words in done.stderr, argv
