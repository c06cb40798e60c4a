"""A QEMU without libvirt: who it is, its disks as those of a domain, and our bitmaps in it."""

import json
import logging
import os
import re
import uuid as uuids
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, events
from nbdbackupd.errors import NbdbackupError, UsageError
from nbdbackupd.model import domain as domain_model
from nbdbackupd.model.chain import ImageLayer
from nbdbackupd.model.naming import uuid_of
from nbdbackupd.model.plan import DiskState
from nbdbackupd.ops.domain.survey import Looked, image_layer
from nbdbackupd.qemu import machine
from nbdbackupd.qemu.machine import Drive, Machine

log = logging.getLogger(__name__)
NO_UUID: Final = str(uuids.UUID(int=0))
FLASH: Final = "flash"
PROXMOX: Final = "/etc/pve/qemu-server/{}.conf"
MAX_FILE: Final = 1 << 20
HIDDEN: Final = "***"
SECRETS: Final = frozenset({"data", "secret", "key", "string", "cookie", "credential", "pin"})
"""Of ``-object secret``, of rbd, of ``-fw_cfg``, of curl; see also ``_is_secret``."""

WHOLE: Final = {"-smbios": frozenset({"value"})}
"""Options of which more is one: OEM strings carry credentials of systemd and of cloud-init."""

OPTION: Final = re.compile(r"(?P<before>^|,)(?P<key>[\w.-]+)=(?:,,|[^,])*")
INNER: Final = re.compile(r"(?P<before>[:?&])(?P<key>[\w.-]+)=(?:\\.|[^,:&])*")
"""An option, and one within a name, as in ``rbd:pool/image:key=…``."""

USERINFO: Final = re.compile(r"(\b[\w+.-]+://)[^/@,]*@")


@dataclass(frozen=True, kw_only=True, slots=True)
class Qemu:
    """A QEMU that answers on its monitor; ``name`` is its user's."""

    machine: Machine
    name: str
    uuid: str

    def drives(self) -> dict[str, Drive]:
        """The drives by name. Raises ProcessError."""
        return {each.name: each for each in self.machine.drives()}

    def remove(self, name: str, why: str, targets: Collection[str] | None = None) -> str:
        """Remove a bitmap from these drives, or all; why that failed, which costs a warning."""
        count = 0
        try:
            for target, drive in self.drives().items():
                if drive.bitmap(name) is not None and (targets is None or target in targets):
                    self.machine.remove_bitmap(drive.node, name)
                    count += 1
        except NbdbackupError as err:
            events.emit(log, events.CHECKPOINT_LEFT, checkpoint=name, reason=err.message)
            return err.message
        if count:
            events.emit(log, events.CHECKPOINT_REMOVED, checkpoint=name, reason=why)
        return ""

    def targets(self, names: Iterable[str]) -> tuple[str, ...]:
        """Disks by what the user calls them: the device, the drive or the node.

        Raises UsageError for a name that two of them have.
        """
        drives = self.machine.drives()
        found = []
        for name in names:
            targets = {each.name for each in drives if name in each.aliases}
            if len(targets) > 1:
                raise UsageError(
                    f"{name} may be one of: {', '.join(sorted(targets))}; name the device"
                )
            found.append(next(iter(targets), name))
        return tuple(found)


@contextmanager
def connect(path: Path, name: str) -> Iterator[Qemu]:
    """Reach a QEMU by its monitor; nobody else does meanwhile.

    Raises BusyError if another program holds the monitor, DomainNotFoundError if none is there,
    DomainError, ProcessError if it does not answer.
    """
    with machine.connect(path, name) as found:
        uuid = found.uuid()
        if uuid == NO_UUID:
            uuid = uuid_of(name)
        yield Qemu(machine=found, name=name, uuid=uuid)


def look(qemu: Qemu) -> Looked:
    """The drives as disks of a domain, with their images and bitmaps."""
    drives = qemu.drives()
    places = _Places(qemu.machine.pid)
    layers = {
        name: tuple(image_layer(places.absolute(path), form) for path, form in each.layers)
        for name, each in drives.items()
    }
    disks = tuple(
        domain_model.Disk(
            target=name,
            device=each.kind,
            format=each.format,
            source=layers[name][0].path if layers[name] else "",
            # the bitmap of a disk that nobody writes to would always be clean
            readonly=each.is_read_only,
            layers=layers[name],
        )
        for name, each in drives.items()
        if each.kind != FLASH
    )
    flash = {
        each.is_read_only: layers[name][0].path
        for name, each in drives.items()
        if each.kind == FLASH and layers[name]
    }
    argv = _command_line(qemu.machine)
    definition = domain_model.Domain(
        name=qemu.name,
        uuid=qemu.uuid,
        disks=disks,
        loader=flash.get(True, ""),
        nvram=flash.get(False, ""),
        kernel=places.absolute(_argument(argv, "-kernel")),
        initrd=places.absolute(_argument(argv, "-initrd")),
        has_iothreads=qemu.machine.has_iothreads(),
    )
    present = {disk.target: drives[disk.target] for disk in disks if disk.source}
    return Looked(
        definition=definition,
        is_active=True,
        infos={name: each.document for name, each in present.items()},
        chains={name: (each.info,) for name, each in present.items() if each.info is not None},
        states={name: _state(each, layers[name]) for name, each in present.items()},
    )


def _state(drive: Drive, layers: tuple[ImageLayer, ...]) -> DiskState:
    bitmaps = {name: each.sound and each.recording for name, each in (drive.bitmaps or {}).items()}
    return DiskState(size=drive.size, layers=layers, bitmaps={layers[0].path: bitmaps})


class _Places:
    """Where the files are that a QEMU was given by relative names.

    A daemon has changed its directory since; the files that it holds open have kept their places.
    """

    def __init__(self, pid: int) -> None:
        self._link = f"/proc/{pid}/cwd"
        self._directory = _link(Path(self._link))
        try:
            self._held = {_link(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            self._held = set()

    def absolute(self, path: str) -> str:
        """The path; what is none (``nbd://…``, ``json:…``) stays.

        One that can't be told, as of a QEMU with rights that we lack, is given by way of the
        process: in our own directory there may be another file of that name.
        """
        if not path or path.startswith("/") or ":" in path.partition("/")[0]:
            return path
        held = [each for each in self._held if each.endswith(os.path.normpath(f"/{path}"))]
        if len(held) == 1:
            return held[0]
        beside = os.path.normpath(f"{self._directory}/{path}")
        is_there = self._directory and Path(beside).exists()
        return beside if is_there else f"{self._link}/{path}"


def describe(qemu: Qemu) -> dict[str, Any]:
    """How QEMU was started, and Proxmox's file of it, for people; without what is secret."""
    argv = _command_line(qemu.machine)
    found: dict[str, Any] = {"name": qemu.name, "uuid": qemu.uuid, "command_line": sifted(argv)}
    number = _argument(argv, "-id")
    if number.isdecimal() and (text := _read(Path(PROXMOX.format(number)))):
        lines = (_proxmox_line(line) for line in text.splitlines(keepends=True))
        found["proxmox"] = "".join(lines)
    return found


def _proxmox_line(line: str) -> str:
    key = line.partition(":")[0]
    if key == line or not _is_secret(key):
        return " ".join(sifted(line.split(" ")))
    return f"{key}: {HIDDEN}\n"


def sifted(argv: Sequence[str]) -> list[str]:
    """QEMU's arguments with ``***`` in place of each value that a key says to be secret.

    Host and guest may be known to many who have the set; what is secret is known by its key alone.
    """
    found, before = [], ""
    for word in argv:
        keys = WHOLE.get(before, frozenset[str]())
        found.append(_sifted_json(word) if word[:1] == "{" else _sifted(word, keys))
        before = word
    return found


def _sifted(word: str, keys: Collection[str]) -> str:
    """A list of options, or a name with options in it (``rbd:pool/image:key=…``)."""

    def hide(match: re.Match[str]) -> str:
        key = match["key"]
        is_secret = key in keys or _is_secret(key)
        return f"{match['before']}{key}={HIDDEN}" if is_secret else match[0]

    return USERINFO.sub(rf"\1{HIDDEN}@", INNER.sub(hide, OPTION.sub(hide, word)))


def _sifted_json(word: str) -> str:
    try:
        document = documents.parse_json(word.encode())
    except ValueError:
        return _sifted(word, ())

    def sift(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: sift(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [sift(each, key) for each in value]
        if isinstance(value, str):
            return HIDDEN if _is_secret(key) else USERINFO.sub(rf"\1{HIDDEN}@", value)
        return value

    return json.dumps(sift(document))


def _is_secret(key: str) -> bool:
    """Whether a key's value is a secret; that of ``password-secret`` is the id of one."""
    last = key.rpartition(".")[2].lower()
    return last in SECRETS or last.endswith(("password", "passwd", "passphrase", "token"))


def _command_line(found: Machine) -> list[str]:
    """QEMU's arguments, as far as this host shows its process."""
    text = _read(Path(f"/proc/{found.pid}/cmdline"))
    return text.split("\0")[:-1]


def _argument(argv: Sequence[str], option: str) -> str:
    place = argv.index(option) + 1 if option in argv else len(argv)
    return argv[place] if place < len(argv) else ""


def _link(path: Path) -> str:
    try:
        return os.fspath(path.readlink())
    except OSError:
        return ""


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE).decode(errors="replace")
    except OSError:
        return ""
