"""A running QEMU without libvirt, by its monitor: its disks, and what a backup makes in it.

Tried with QEMU 7.2; what it needs is there since 5.2. Everything that a run makes has a name that
begins with ``nbdbackup-`` and the run's tag, so that whoever clears up after it finds all of it.
A node's name has 31 bytes at most; its last part tells what it is (``Part``) and of which disk.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents
from nbdbackupd.errors import BusyError, ProcessError, SourceError
from nbdbackupd.qemu import storage_daemon
from nbdbackupd.qemu.image import ImageInfo
from nbdbackupd.qemu.qmp import Monitor, connected
from nbdbackupd.qemu.storage_daemon import Bitmap

COMMAND_SECONDS: Final = 60.0
JOB_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.05
PREFIX: Final = "nbdbackup-"
FILTERS: Final = frozenset(
    {"throttle", "copy-on-read", "copy-before-write", "compress", "preallocate"}
)
"""Drivers that hold no bytes of their own; bitmaps are kept below them."""

PROTOCOLS: Final = frozenset({"file", "host_device"})
"""Drivers that a disk without a format of its own stands on."""

DEVICE: Final = re.compile(r"/machine/peripheral/([^/]+)")
PERIPHERAL: Final = "/machine/peripheral/"
RAW: Final = "raw"
THROTTLE: Final = "throttle"
FILTER: Final = "copy-before-write"
ACCESS: Final = "snapshot-access"
OPTIONS: Final = frozenset({"on-cbw-error", "cbw-timeout"})
CBW_SECONDS: Final = 17
"""How long a write of the guest waits for its old block to be kept: less than the 30 s after which
Linux gives a SCSI command up. QEMU 7.2 keeps 32 bits of its nanoseconds: 4.1 s there."""


class Part(StrEnum):
    """A node of ours, in the order in which they can be removed.

    ``FILTER`` and ``THROTTLED`` are copy-before-write filters; above the latter is ``LIMIT``, which
    stands for a throttle node that has its place above the image else.
    """

    ACCESS = "a"
    LIMIT = "t"
    FILTER = "c"
    THROTTLED = "f"
    SCRATCH = "s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Drive:
    """What a device of the guest has open; ``size`` in bytes.

    ``name`` is the device's id, else the drive's, else its node's; ``aliases`` are all of them.
    ``kind``: disk, cdrom, floppy, or flash, which holds firmware or its variables. ``node`` is
    the one below all filters, empty of a drive without medium. ``layers`` are the images, top
    first, as QEMU names them; ``info`` is that of the top, and ``document`` QEMU's JSON of it.
    ``error`` tells that the guest's last request failed.

    ``device`` is the path of what has the drive, in QEMU's object tree, or empty; ``throttle`` the
    group of a throttle node above the image. ``obstacle``: why no filter can be put between.
    """

    name: str
    aliases: frozenset[str]
    kind: str
    node: str = ""
    format: str = RAW
    size: int = 0
    is_read_only: bool = False
    layers: tuple[tuple[str, str], ...] = ()
    info: ImageInfo | None = None
    document: str = ""
    bitmaps: Mapping[str, Bitmap] | None = None
    error: str = ""
    device: str = ""
    throttle: str = ""
    obstacle: str = ""

    def bitmap(self, name: str) -> Bitmap | None:
        """The bitmap of that name, or None."""
        return (self.bitmaps or {}).get(name)


def tag(run_id: str) -> str:
    """What the names begin with of all that a run makes."""
    return PREFIX + hashlib.sha256(run_id.encode()).hexdigest()[:8]


def node(head: str, part: Part, number: int) -> str:
    """The name of a node of ours."""
    return f"{head}-{part}{number}"


class Machine:
    """A QEMU that answers; made by ``connect``. For any thread."""

    def __init__(self, monitor: Monitor, path: Path) -> None:
        self._monitor = monitor
        self.path = path

    def execute(self, command: str, descriptor: int = -1, **arguments: Any) -> Any:
        """Run a command; an underscore in an argument's name stands for a dash.

        Raises ProcessError.
        """
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._monitor.execute(command, given, descriptor=descriptor)

    @property
    def pid(self) -> int:
        """QEMU's process id, as the kernel knows it."""
        return self._monitor.pid

    def uuid(self) -> str:
        """The guest's UUID; all zeroes if QEMU was given none."""
        return str(_of(self.execute("query-uuid"), "UUID"))

    def status(self) -> str:
        """QEMU's run state: ``running``, ``paused``, ``prelaunch``, ``io-error`` and so on."""
        return str(_of(self.execute("query-status"), "status"))

    def has_iothreads(self) -> bool:
        """Whether a disk may be served by a thread of its own."""
        return bool(self.execute("query-iothreads"))

    def drives(self) -> tuple[Drive, ...]:
        """All drives in QEMU's order. Raises ProcessError if they are described badly."""
        try:
            found = self.execute("query-named-block-nodes", flat=True)
            nodes = {each["node-name"]: each for each in found}
            below = _edges(self.execute("x-debug-query-block-graph"))
            return tuple(self._drive(each, nodes, below) for each in self.execute("query-block"))
        except (KeyError, TypeError, AttributeError) as err:
            raise ProcessError(f"QEMU describes its disks without {err}") from err

    def _drive(
        self,
        device: dict[str, Any],
        nodes: Mapping[str, dict[str, Any]],
        below: Mapping[str, Mapping[str, str]],
    ) -> Drive:
        inserted = device.get("inserted")
        path = device.get("qdev", "")
        top = inserted["node-name"] if inserted else ""
        while top.startswith(PREFIX):
            top = below[top]["file"]
        found = DEVICE.match(path)
        own = found[1] if found else "" if path.startswith("/") else path
        names = [each for each in (own, device["device"], top) if each and not each.startswith("#")]
        name = names[0] if names else path or top
        kind = self._kind(device, path)
        if not inserted:
            # a drive without a medium, whatever it is
            return Drive(name=name, aliases=frozenset(names), kind="cdrom")
        chain = _chain(top, nodes, below)
        base = nodes[chain[0]]
        throttle, obstacle = _above(device, top, chain[0], nodes, below)
        return Drive(
            name=name,
            aliases=frozenset((*names, chain[0])),
            kind=kind,
            node=chain[0],
            format=_format(base),
            size=base["image"]["virtual-size"],
            is_read_only=bool(inserted["ro"]),
            layers=tuple((nodes[each]["file"], _format(nodes[each])) for each in chain),
            info=ImageInfo.from_dict({**base["image"], "format": _format(base)}),
            document=json.dumps([{**base["image"], "format": _format(base)}]),
            bitmaps={each.name: each for each in storage_daemon.bitmaps_of(base)},
            error=_error(device),
            device=_object(path),
            throttle=throttle,
            obstacle=obstacle,
        )

    def _kind(self, device: dict[str, Any], path: str) -> str:
        if "flash" in path or device["device"].startswith("pflash"):
            return "flash"
        if not device["removable"]:
            return "disk"
        kind = ""
        with contextlib.suppress(ProcessError):
            kind = str(self.execute("qom-get", path=path, property="type")) if path else ""
        return "floppy" if kind == "floppy" else "cdrom" if kind.endswith("-cd") else "disk"

    def has_filters(self) -> bool:
        """Whether QEMU says that it can keep old blocks without ever failing a write of the guest.

        That is since 7.1. Raises ProcessError.
        """
        types = {each["name"]: each for each in self.execute("query-qmp-schema")}
        try:
            options = types[types["blockdev-add"]["arg-type"]]
            drivers = {each["case"]: each["type"] for each in options["variants"]}
            members = {each["name"] for each in types[drivers[FILTER]]["members"]}
        except (KeyError, TypeError):
            return False
        return members >= OPTIONS and ACCESS in drivers

    def plug(self, device: str, name: str) -> None:
        """Have a device use another node; it waits for what is in flight. Raises ProcessError."""
        self.execute("qom-set", path=device, property="drive", value=name)

    def plugged(self) -> dict[str, str]:
        """The node that each device uses, by the device's path."""
        return {
            _object(each["qdev"]): each["inserted"]["node-name"]
            for each in self.execute("query-block")
            if each.get("qdev") and each.get("inserted")
        }

    def put_filter(self, head: str, number: int, drive: Drive) -> None:
        """Put a filter of ours below a drive's device, which keeps what is written over from now.

        The filter is there, with its scratch image, and nothing is above it. A throttle node stays
        above, by another one of the same group; what reads below it does not count. Raises
        ProcessError.
        """
        part = Part.THROTTLED if drive.throttle else Part.FILTER
        name = node(head, part, number)
        self.plug(drive.device, name)
        if drive.throttle:
            # only now: anything above would keep the filter from having the image for itself
            limit = node(head, Part.LIMIT, number)
            self.execute(
                "blockdev-add",
                driver=THROTTLE,
                node_name=limit,
                throttle_group=drive.throttle,
                file=name,
                discard="unmap",
            )
            self.plug(drive.device, limit)

    def _take_filters(self, head: str) -> tuple[str, ...]:
        """Give each device back what it had before ``put_filter``; what that was."""
        below = _edges(self.execute("x-debug-query-block-graph"))
        done = []
        for device, name in self.plugged().items():
            if not name.startswith(head):
                continue
            filter_ = name
            if _part(name) is Part.LIMIT:
                filter_ = below[name]["file"]
                self.plug(device, filter_)
                self.execute("blockdev-del", node_name=name)
            image = below[filter_]["file"]
            is_throttled = _part(filter_) is Part.THROTTLED
            self.plug(device, _throttle_above(image, below) if is_throttled else image)
            done.append(f"filter {filter_}")
        return tuple(done)

    def remove_bitmap(self, node: str, name: str) -> None:
        """Take a bitmap away, sound or not. Raises ProcessError."""
        self.execute("block-dirty-bitmap-remove", node=node, name=name)

    def jobs(self, head: str) -> dict[str, str]:
        """The state of each job whose name begins with ``head``."""
        found = self.execute("query-jobs")
        return {each["id"]: each["status"] for each in found if each["id"].startswith(head)}

    def lend(self, descriptor: int, head: str) -> str:
        """Give QEMU a duplicate of a descriptor; the name by which it opens that.

        Raises ProcessError.
        """
        number = int(_of(self.execute("add-fd", descriptor, opaque=head), "fdset-id"))
        return f"/dev/fdset/{number}"

    def serve(self, endpoint: Path, head: str) -> None:
        """Have QEMU's NBD server listen on a socket of ours; it is ended by ``clear``.

        Raises BusyError if its server serves somebody else, ConfigError, ProcessError.
        """
        with storage_daemon.listening(endpoint) as listener:
            self.execute("getfd", listener.fileno(), fdname=head)
        address = {"type": "fd", "data": {"str": head}}
        try:
            self.execute("nbd-server-start", addr=address, max_connections=0)
        except ProcessError as err:
            with contextlib.suppress(ProcessError):
                self.execute("closefd", fdname=head)
            endpoint.unlink(missing_ok=True)
            if "already running" not in err.message:
                raise
            raise BusyError(
                "QEMU's NBD server serves another program, a backup or a migration: try again "
                "when that has ended"
            ) from err

    def clear(self, head: str, endpoint: Path) -> tuple[str, ...]:
        """End and remove all whose names begin with ``head``; what that was.

        ``endpoint`` is the NBD server's socket: as long as it is there the server is ours. Whoever
        calls has seen to it that no connection is in its handshake. Raises ProcessError,
        SourceError if a job does not end.
        """
        done = []
        exports = self.execute("query-block-exports")
        own = [each["id"] for each in exports if each["id"].startswith(head)]
        for each in own:
            self.execute("block-export-del", id=each, mode="hard")
            done.append(f"export {each}")
        others = [each for each in exports if each["id"] not in own and each["type"] == "nbd"]
        if (own or endpoint.exists()) and not others:
            with contextlib.suppress(ProcessError):  # it was not started yet, or is stopped
                self.execute("nbd-server-stop")
        endpoint.unlink(missing_ok=True)
        for each in self.jobs(head):
            self.end_job(each)
            done.append(f"job {each}")
        self._remove_nodes(head, Part.ACCESS)
        done += self._take_filters(head)
        nodes = self.execute("query-named-block-nodes", flat=True)
        for found in nodes:
            for bitmap in found.get("dirty-bitmaps", []):
                if bitmap.get("name", "").startswith(head):
                    self.remove_bitmap(found["node-name"], bitmap["name"])
        done += self._remove_nodes(head, *Part)
        for each in self.execute("query-fdsets"):
            if any(fd.get("opaque", "").startswith(head) for fd in each["fds"]):
                self.execute("remove-fd", fdset_id=each["fdset-id"])
        return tuple(done)

    def _remove_nodes(self, head: str, *parts: Part) -> list[str]:
        """Remove nodes that nobody uses, the uppermost first."""
        found = self.execute("query-named-block-nodes", flat=True)
        own = [each["node-name"] for each in found if each["node-name"].startswith(head)]
        own = [each for part in parts for each in own if _part(each) is part]
        for each in own:
            self.execute("blockdev-del", node_name=each)
        return [f"node {each}" for each in own]

    def end_job(self, job: str) -> None:
        """End a job. Raises ProcessError, SourceError if it goes on."""
        deadline = time.monotonic() + JOB_SECONDS
        with contextlib.suppress(ProcessError):  # it has ended by itself
            self.execute("job-cancel", id=job)
        while job in self.jobs(job):
            if time.monotonic() > deadline:
                raise SourceError(f"job {job} of QEMU does not end within {JOB_SECONDS:g} s")
            time.sleep(POLL_SECONDS)


@contextmanager
def connect(path: Path, name: str) -> Iterator[Machine]:
    """Reach a QEMU by its monitor's socket; ``name`` is what messages call it.

    Raises BusyError, DomainNotFoundError, DomainError, ProcessError as ``qmp.connected``.
    """
    with connected(path, f"QEMU of {name}", timeout=COMMAND_SECONDS) as monitor:
        yield Machine(monitor, path)


def _of(document: object, key: str) -> Any:
    if not isinstance(document, dict) or key not in document:
        raise ProcessError(f"QEMU answered without {key}")
    return document[key]


def _edges(graph: dict[str, Any]) -> dict[str, dict[str, str]]:
    """For each node its children by their role, by name."""
    names = {each["id"]: each["name"] for each in graph["nodes"]}
    found: dict[str, dict[str, str]] = {}
    for edge in graph["edges"]:
        found.setdefault(names[edge["parent"]], {})[edge["name"]] = names[edge["child"]]
    return found


def _chain(
    top: str, nodes: Mapping[str, dict[str, Any]], below: Mapping[str, Mapping[str, str]]
) -> Sequence[str]:
    """The nodes of a disk's images, top first, without filters."""
    found: list[str] = []
    name: str | None = top
    while name:
        while nodes[name]["drv"] in FILTERS:
            name = below[name].get("file") or below[name]["backing"]
        found.append(name)
        name = below.get(name, {}).get("backing")
    return found


def _above(
    device: dict[str, Any],
    top: str,
    image: str,
    nodes: Mapping[str, dict[str, Any]],
    below: Mapping[str, Mapping[str, str]],
) -> tuple[str, str]:
    """The group of a throttle node above an image, and why no filter can be put between."""
    if not device.get("qdev"):
        return "", "QEMU names no device of it"
    if top == image:
        return "", ""
    found = nodes[top]
    # of a named drive (-drive) the node ends when its device lets go of it
    if found["drv"] == THROTTLE and below[top]["file"] == image and not device["device"]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            options = documents.parse_json(found["file"].removeprefix("json:").encode())
            return str(options["throttle-group"]), ""
    return "", f"a filter is above its image: {found['drv']}"


def _throttle_above(image: str, below: Mapping[str, Mapping[str, str]]) -> str:
    """The throttle node that is above an image and no device uses now; else the image."""
    found = [
        name
        for name, children in below.items()
        if children.get("file") == image and not name.startswith(PREFIX)
    ]
    return found[0] if len(found) == 1 else image


def _object(path: str) -> str:
    """Where a device is in QEMU's object tree, by its id or that place."""
    return path if path.startswith("/") or not path else PERIPHERAL + path


def _part(name: str) -> Part | None:
    letter = name.rpartition("-")[2][:1]
    return Part(letter) if letter in {*Part} else None


def _format(node: dict[str, Any]) -> str:
    return RAW if node["drv"] in PROTOCOLS else str(node["drv"])


def _error(device: dict[str, Any]) -> str:
    state = str(device.get("io-status", "ok"))
    return "" if state == "ok" else state
