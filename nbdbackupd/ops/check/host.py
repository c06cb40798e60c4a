"""What this host brings: programs, Python libraries, libvirt."""

from nbdbackupd import proc
from nbdbackupd.errors import ProcessError
from nbdbackupd.format import blocks
from nbdbackupd.model.finding import Notes
from nbdbackupd.ops.check.request import Patient
from nbdbackupd.source import hooked
from nbdbackupd.virt import features

SECONDS = 20.0
NEEDED = (
    # all the others are started through it
    "setpriv",
    "qemu-img",
    "qemu-nbd",
    "qemu-storage-daemon",
)
OPTIONAL = {"nbdinfo": "only --extents nbdinfo needs it"}
LZ4_PACKAGE = "python3-lz4"


def programs(_: Patient, notes: Notes) -> None:
    """Whether each program can be run; its version is the first line that it prints."""
    for name in NEEDED:
        try:
            notes.ok(f"{name}: {_version(name)}")
        except ProcessError as err:
            notes.fail(err.message, f"install it: {proc.PACKAGES.get(name, 'util-linux')}")
    for name, use in OPTIONAL.items():
        try:
            notes.ok(f"{name}: {_version(name)}")
        except ProcessError:
            notes.ok(f"{name} is not there; {use}")


def _version(name: str) -> str:
    lines = proc.output([name, "--version"], timeout=SECONDS).split("\n")
    # "qemu-img version 7.2.9 (…)", "nbdinfo 1.14.2"
    return lines[0].removeprefix(name).strip().removeprefix("version").strip()


def libraries(_: Patient, notes: Notes) -> None:
    """Whether the Python libraries can be imported. Without libvirt's nobody gets here."""
    try:
        from nbdbackupd.nbdio import client

        notes.ok(f"libnbd: {client.libnbd_version()}")
    except ImportError as err:
        notes.fail(f"the Python library of libnbd can't be used: {err}", "install python3-libnbd")

    try:
        notes.ok(f"lz4: {blocks.lz4_version()}")
    except ImportError as err:
        notes.warn(f"no compression: {err}", f"install {LZ4_PACKAGE}, or do without compression")


def connection(patient: Patient, notes: Notes) -> None:
    """Versions, and whether libvirt is on this host at all."""
    opened = patient.domain.connection
    found = features.versions(opened)
    notes.ok(f"libvirt {found.libvirt}, QEMU {found.qemu}, Python binding {found.binding}")
    hook = hooked.look(opened, patient.request.runtime_dir)
    if hook.is_installed:
        notes.warn(
            f"libvirt does not call our hook yet: {hook.why}",
            "until then no backup is made at a guest's end, and one of a domain that is off reads "
            "whole, or the same changes each time, so that no start is refused",
        )
    elif hook.is_removed:
        notes.warn(
            f"libvirt's hook does nothing: {hook.why}",
            "install the package nbdbackupd; until then no backup is made at a guest's end",
        )
    elif hook.why:
        notes.ok(f"no hook of libvirt's calls us: {hook.why}; guests are saved when that is asked")
    else:
        notes.ok("libvirt tells us when a domain starts or ends")
