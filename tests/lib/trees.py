"""File systems made of a directory, without mounting anything, and what is in directories."""

import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

MIB = 1 << 20
# mkfs.xfs makes nothing below 300 MiB but for its own tests, which say so in this way
XFS_TESTS = {"TEST_DIR": "x", "TEST_DEV": "x", "QA_CHECK_FS": "x"}
OLD = 981173106


def run(argv: Sequence[str | Path], **environment: str) -> str:
    """A program's output; it must succeed."""
    done = subprocess.run(
        argv, check=False, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL, env={**os.environ, "MTOOLS_SKIP_CHECK": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def hard_cases(top: Path, many: int = 0) -> Path:
    """A directory with what file systems of Linux can hold; ``many`` small files, too."""
    (top / "etc/deep/er").mkdir(parents=True)
    (top / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (top / "etc/deep/er/secret").write_bytes(os.urandom(70_000))
    (top / "etc/deep/er/secret").chmod(0o600)
    (top / "etc/program").write_bytes(b"#!/bin/true\n")
    (top / "etc/program").chmod(0o4755)
    (top / "empty").write_bytes(b"")
    (top / "no entry").mkdir(mode=0o700)
    (top / "no entry/x").write_text("x")
    (top / "tmp").mkdir()
    (top / "tmp").chmod(0o1777)
    names = ["new\nline", "-rf", "tab\t", "ünïcödé-名前", "x" * 255, "back\\slash", " blank ", "*"]
    for number, name in enumerate(names):
        (top / "tmp" / name).write_text(f"{number}")
    (top / "tmp" / os.fsdecode(b"no utf \xff\xfe")).write_text("bytes")
    os.link(top / "etc/hosts", top / "etc/deep/hosts-too")
    for name, target in {
        "link": "etc/hosts", "absolute": "/etc/hosts", "directory": "etc/deep",
        "dangling": "nowhere", "round": "round", "out": "../../../../../../etc",
        "long": "/" + "y" * 200,
    }.items():  # fmt: skip
        (top / name).symlink_to(target)
    os.mkfifo(top / "pipe")
    with (top / "sparse").open("wb") as file:
        file.seek(5 * MIB)
        file.write(b"middle")
        file.truncate(20 * MIB)
    for number in range(many):
        directory = top / f"many/{number // 100}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file {number}").write_bytes(b"%d" % number * (number % 50))
    for path in [*top.rglob("*"), top]:
        os.utime(path, ns=(OLD * 10**9, OLD * 10**9 + len(path.name)), follow_symlinks=False)
    return top


def plain_cases(top: Path) -> Path:
    """A directory with what every file system can hold: no links, no rights, no odd names."""
    (top / "dir/below").mkdir(parents=True)
    (top / "dir/below/big.bin").write_bytes(os.urandom(3 * MIB + 17))
    (top / "dir/a-long-Name.with_more.txt").write_text("blanks")
    (top / "empty.txt").write_bytes(b"")
    (top / "top.bin").write_bytes(os.urandom(100_000))
    return top


def ext4(image: Path, source: Path, size: int, label: str, *options: str) -> Path:
    """An image of ext4 with what is in a directory."""
    _blank(image, size)
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-L", label, *options, "-d", source, image])
    return image


def xfs(image: Path, source: Path, size: int, label: str) -> Path:
    """The same of XFS: directories, regular files, symbolic links."""
    _blank(image, size)
    lines = ["/none", "0 0", "d--755 0 0"]
    _proto(source, lines)
    proto = image.with_name(f"{image.name}.proto")
    proto.write_text("\n".join([*lines, "$", ""]))
    run(["mkfs.xfs", "-q", "-f", "-L", label, "-p", proto, image], **XFS_TESTS)
    return image


def _proto(directory: Path, lines: list[str]) -> None:
    for path in sorted(directory.iterdir()):
        mode = f"{stat.S_IMODE(path.lstat().st_mode):03o}"
        if path.is_symlink():
            lines.append(f"{path.name} l--777 0 0 {path.readlink()}")
        elif path.is_dir():
            lines.append(f"{path.name} d--{mode} 0 0")
            _proto(path, lines)
            lines.append("$")
        else:
            lines.append(f"{path.name} ---{mode} 0 0 {path}")


def vfat(image: Path, source: Path, size: int, label: str) -> Path:
    """The same of FAT: directories and files."""
    _blank(image, size)
    run(["mkfs.vfat", "-n", label, image])
    for path in sorted(source.iterdir()):
        run(["mcopy", "-s", "-m", "-i", image, path, "::"])
    return image


def ntfs(image: Path, source: Path, size: int, label: str) -> Path:
    """The same of NTFS: the files in the directory itself alone."""
    _blank(image, size)
    run(["mkntfs", "-F", "-q", "-L", label, image])
    for path in sorted(source.iterdir()):
        if path.is_file() and path.stat().st_size:
            run(["ntfscp", image, path, path.name])
    return image


def disk(image: Path, label: str, parts: Sequence[tuple[Path | int, str]]) -> list[int]:
    """A partitioned disk: images, or bare sizes, each with words for sfdisk; their offsets.

    Sizes are in bytes, all are whole MiB. Words may begin with a number and a colon: 5 and more
    are logical partitions within the extended one.
    """
    sizes = [each if isinstance(each, int) else each.stat().st_size for each, _ in parts]
    _blank(image, sum(sizes) + 8 * MIB + len(parts) * MIB)
    script = [f"label: {label}"]
    for size, (_, words) in zip(sizes, parts, strict=True):
        number, _, rest = words.rpartition(":")
        script.append(f"{number}{':' if number else ''} size={size // 512}{rest}")
    subprocess.run(
        ["sfdisk", "-q", image], input="\n".join([*script, ""]), text=True, check=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    rows = [
        line.partition("start=")[2].partition(",")[0]
        for line in run(["sfdisk", "-d", image]).splitlines()
        if "start=" in line
    ]
    starts = [int(row) * 512 for row in rows]
    with image.open("r+b") as target:
        for start, (each, _) in zip(starts, parts, strict=True):
            if isinstance(each, Path):
                target.seek(start)
                with each.open("rb") as source:
                    shutil.copyfileobj(source, target, MIB)
    return starts


def lvm_group(top: Path, root: Path, wide: Path) -> dict[str, Path]:
    """Two disks of a volume group ``vg-a``: ``ro-ot`` lies in one piece, ``wide`` on both.

    LVM's own programs write all but the table of volumes: to make these, they would need a kernel
    with device mapper. ``wide`` must have 40 MiB.
    """
    disks = {"vda": top / "pv1", "vdb": top / "pv2"}
    _blank(disks["vda"], 128 * MIB)
    _blank(disks["vdb"], 64 * MIB)
    run(["sh", "-c", f"echo 'label: gpt\nsize=120M, type=lvm' | sfdisk -q {disks['vda']}"])
    loops = []
    try:
        for path, place in ((disks["vda"], ["-o", str(MIB)]), (disks["vdb"], [])):
            loops.append(run(["losetup", "-f", "--show", *place, path]).strip())
        _make_group(top, loops)
    finally:
        for loop in loops:
            run(["losetup", "-d", loop])
    extent, first = 4 * MIB, MIB
    pieces = [
        ("vda", MIB + first + 2 * extent, root.read_bytes()),
        ("vda", MIB + first + 18 * extent, wide.read_bytes()[: 6 * extent]),
        ("vdb", first + 3 * extent, wide.read_bytes()[6 * extent :]),
    ]
    for name, offset, data in pieces:
        with disks[name].open("r+b") as file:
            file.seek(offset)
            file.write(data)
    return disks


def _make_group(top: Path, loops: list[str]) -> None:
    accept = ", ".join(f'"a|^{loop}$|"' for loop in loops)
    config = f'devices{{use_devicesfile=0 filter=[{accept}, "r|.*|"]}} backup{{backup=0 archive=0}}'

    def lvm(*words: str | Path) -> str:
        head = [words[0], "--nolocking", "--config", config]
        return run([*head, *words[1:]], DM_DISABLE_UDEV="1", LVM_SUPPRESS_FD_WARNINGS="1")

    lvm("pvcreate", "-ff", "-y", *loops)
    lvm("vgcreate", "-y", "vg-a", *loops)
    text = top / "vg.txt"
    lvm("vgcfgbackup", "-f", text, "vg-a")
    volumes = ""
    for number, (name, pieces) in enumerate(
        {"ro-ot": [("pv0", 2, 16)], "wide": [("pv0", 18, 6), ("pv1", 3, 4)]}.items()
    ):
        uuid = f"aaaaa{number}-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa"
        volumes += (
            f'{name} {{\nid = "{uuid}"\nstatus = ["READ", "WRITE", "VISIBLE"]\nflags = []\n'
            f"segment_count = {len(pieces)}\n"
        )
        start = 0
        for count, (place, extent, length) in enumerate(pieces, 1):
            volumes += (
                f"segment{count} {{\nstart_extent = {start}\nextent_count = {length}\n"
                f'type = "striped"\nstripe_count = 1\nstripes = ["{place}", {extent}]\n}}\n'
            )
            start += length
        volumes += "}\n"
    before = text.read_text()
    end = before.index("\n}\n", before.index("vg-a {"))
    text.write_text(f"{before[:end]}\nlogical_volumes {{\n{volumes}}}\n{before[end:]}")
    lvm("vgcfgrestore", "-f", text, "vg-a")
    assert "wide" in lvm("lvs", "-a")


def _blank(image: Path, size: int) -> None:
    with image.open("wb") as file:
        file.truncate(size)


def described(top: Path, *, rights: bool = True) -> dict[str, tuple[object, ...]]:
    """All that is below a directory: type, rights, time, content, target, names of one file."""
    found: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, list[str]] = {}
    for directory, subdirectories, files in os.walk(top):
        for name in [*subdirectories, *files]:
            path = Path(directory, name)
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            shown = str(path.relative_to(top))
            content: object = None
            if stat.S_ISREG(kind):
                content = path.read_bytes()
                inodes.setdefault(status.st_ino, []).append(shown)
            elif stat.S_ISLNK(kind):
                content = path.readlink()
            mode = status.st_mode & 0o1777 if rights and not stat.S_ISLNK(kind) else None
            found[shown] = (kind, mode, int(status.st_mtime) if rights else None, content)
    if rights:
        found["// names of one file"] = tuple(
            sorted(tuple(sorted(each)) for each in inodes.values() if len(each) > 1)
        )
    return found
