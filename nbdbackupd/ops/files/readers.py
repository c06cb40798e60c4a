"""Which program reads a file system, and how it is called.

None of them gives a stranger's file system to this host's kernel, unless the user asks for just
that. Measured with e2fsprogs 1.47.0 and GRUB 2.06: fuse2fs shows ext with all that belongs to it;
grub-mount shows names, contents and times of many types, but no owners, no rights, and what a
symbolic link points to instead of the link.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import proc
from nbdbackupd.errors import NotSupportedError, UsageError
from nbdbackupd.model.file_systems import EXT, GRUB, FileSystem
from nbdbackupd.ops.files import fuse

FUSE2FS: Final = "fuse2fs"
GRUB_MOUNT: Final = "grub-mount"
GUESTMOUNT: Final = "guestmount"
KERNEL: Final = "kernel"
TOOLS: Final = (FUSE2FS, GRUB_MOUNT, GUESTMOUNT, KERNEL)

PLAIN: Final = frozenset({"vfat", "exfat"})
"""Types that have neither owners nor links: grub-mount shows all of them."""

START_SECONDS: Final = 60.0
APPLIANCE_SECONDS: Final = 600.0
"""guestmount boots a small virtual machine: 21 s without KVM on two processors."""

REPLAY_SECONDS: Final = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A disk to read from: a file with its bytes."""

    disk: str
    file: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A program for a file system; ``follows_links``: links are shown as what they point to.

    ``notes`` are for the user: what is not as in the guest.
    """

    tool: str
    follows_links: bool = False
    notes: tuple[str, ...] = ()


def choose(found: FileSystem, *, tool: str, replay: bool) -> Reader:
    """The reader of a file system: the one that is wanted, or the best that this host has.

    Raises NotSupportedError if none can read it, UsageError if the wanted one can't, ProcessError
    if the program is not installed.
    """
    scattered = found.offset < 0
    if scattered and tool in (FUSE2FS, KERNEL):
        raise UsageError(f"{found.place} lies in several pieces, which {tool} can't read")
    if not found.is_files and not scattered:
        raise NotSupportedError(
            f"{found.place} holds {found.type or 'nothing that blkid knows'} and no file system"
            f"{_elsewhere(found)}"
        )
    name = tool or _best(found)
    if name == FUSE2FS and found.type not in EXT:
        raise UsageError(
            f"fuse2fs reads ext2, ext3 and ext4, not the {found.type} of {found.place}"
        )
    if name == GRUB_MOUNT and replay:
        raise UsageError("grub-mount can't replay a journal: leave --replay out, or see --tool")
    program = "mount" if name == KERNEL else name
    if name == GRUB_MOUNT:
        program = _grub()
    if shutil.which(program) is None:
        raise NotSupportedError(
            f"{found.type or 'the file system'} on {found.place} needs {name}: {proc.hint(name)}"
        )
    if name == KERNEL and os.geteuid() != 0:
        raise UsageError("--kernel needs root")
    return Reader(
        tool=name,
        follows_links=name == GRUB_MOUNT,
        notes=tuple(_notes(name, found, replay=replay)),
    )


def _elsewhere(found: FileSystem) -> str:
    kinds = {
        "LVM2_member": "give the name of a logical volume, --partition GROUP/VOLUME",
        "crypto_LUKS": "encrypted file systems can't be read",
        "swap": "it is swap space",
    }
    return f": {kinds[found.type]}" if found.type in kinds else ""


def _best(found: FileSystem) -> str:
    if found.type in EXT and (shutil.which(FUSE2FS) or not shutil.which(GUESTMOUNT)):
        return FUSE2FS
    if shutil.which(GUESTMOUNT):
        return GUESTMOUNT
    if found.type in GRUB or found.offset < 0:
        return GRUB_MOUNT
    return GUESTMOUNT


def _grub() -> str:
    """Debian's name of the program, or Fedora's."""
    return "grub2-mount" if shutil.which("grub2-mount") else GRUB_MOUNT


def _notes(name: str, found: FileSystem, *, replay: bool) -> Iterator[str]:
    if name == KERNEL:
        yield (
            f"this host's kernel reads the {found.type} of {found.place}: a file system that was "
            "made to do harm can take over the host"
        )
    if found.unclean and not replay:
        yield (
            f"the journal of {found.place} was not replayed: the newest changes before the point "
            "may be missing; --replay replays it on a copy that is thrown away"
        )
    if name == GRUB_MOUNT and found.type not in PLAIN:
        yield (
            f"grub-mount reads {found.type or found.place} without owners and rights, and follows "
            f"symbolic links; guestmount shows all: {proc.hint(GUESTMOUNT)}"
        )


@contextmanager
def mounted(
    reader: Reader,
    sources: Sequence[Source],
    found: FileSystem,
    at: Path,
    *,
    replay: bool,
    cancelled: Callable[[], None],
) -> Iterator[Callable[[], int | None]]:
    """Show the file system in the directory ``at`` while the block runs.

    Yields a function that tells the exit status of the program, None while it runs or if nobody
    can tell. Raises ProcessError, and what ``cancelled`` raises.
    """
    mine = next((each for each in sources if each.disk == found.disk), sources[0])
    if reader.tool == FUSE2FS:
        if replay:
            _replay_ext(mine, found)
        options = f"ro,norecovery,fakeroot,auto_unmount,nosuid,nodev,offset={found.offset}"
        argv: list[str | Path] = [FUSE2FS, "-f", "-o", options, mine.file, at]
        with fuse.foreground(argv, at, seconds=START_SECONDS, cancelled=cancelled) as up:
            yield up.poll
    elif reader.tool == GUESTMOUNT:
        argv = _guestmount(sources, mine, found, at, replay=replay)
        # libvirt would run the appliance as an account that can't open our files
        with fuse.foreground(
            argv,
            at,
            seconds=APPLIANCE_SECONDS,
            cancelled=cancelled,
            env={"LIBGUESTFS_BACKEND": "direct"},
        ) as up:
            yield up.poll
    elif reader.tool == KERNEL:
        argv = _kernel(mine, found, at, replay=replay)
        with fuse.background(argv, at, seconds=START_SECONDS, kernel=True):
            yield lambda: None
    else:
        argv = _grub_mount(sources, mine, found, at)
        with fuse.background(argv, at, seconds=START_SECONDS):
            yield lambda: None


def _grub_mount(
    sources: Sequence[Source], mine: Source, found: FileSystem, at: Path
) -> list[str | Path]:
    if found.volume:
        # GRUB joins group and name by a hyphen and doubles those within them
        name = "-".join(part.replace("-", "--") for part in found.volume.split("/"))
        return [_grub(), "-r", f"lvm/{name}", *(each.file for each in sources), at]
    scheme = {"gpt": "gpt", "dos": "msdos"}.get(found.scheme, found.scheme)
    root = f"loop0,{scheme}{found.partition}" if found.partition else "loop0"
    return [_grub(), "-r", root, mine.file, at]


def _guestmount(
    sources: Sequence[Source], mine: Source, found: FileSystem, at: Path, *, replay: bool
) -> list[str | Path]:
    inside = f"/dev/{found.volume}" if found.volume else f"/dev/sda{found.partition or ''}"
    # the appliance writes to an overlay of its own; what is given here takes the place of its "ro"
    journal = {"xfs": "norecovery,nouuid", "ext3": "noload", "ext4": "noload"}.get(found.type)
    if journal and not replay:
        inside = f"{inside}:/:ro,{journal}"
    argv: list[str | Path] = [GUESTMOUNT, "--no-fork", *([] if replay else ["--ro"])]
    for each in sources if found.volume else [mine]:
        argv += ["--format=raw", "-a", each.file]
    return [*argv, "-m", inside, "-o", "auto_unmount", at]


def _kernel(mine: Source, found: FileSystem, at: Path, *, replay: bool) -> list[str | Path]:
    options = ["ro", "loop", "nosuid", "nodev", "noexec"]
    options += [f"offset={found.offset}", f"sizelimit={found.size}"]
    if not replay:
        journal = {"xfs": ["norecovery", "nouuid"], "ext3": ["noload"], "ext4": ["noload"]}
        options += journal.get(found.type, [])
    return ["mount", "-t", found.type, "-o", ",".join(options), mine.file, at]


def _replay_ext(mine: Source, found: FileSystem) -> None:
    # 1: something was fixed, which is what it is for
    argv = ["e2fsck", "-y", "-E", "journal_only", f"{mine.file}?offset={found.offset}"]
    proc.output(argv, timeout=REPLAY_SECONDS, ok=(0, 1))
