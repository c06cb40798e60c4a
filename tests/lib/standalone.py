"""QEMU without libvirt: a process with two monitors, one for the product and one for the test."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.process import ProcessHandle, wait_until
from tests.lab.qmp import Monitor
from tests.lab.virtio_agent import Agent
from tests.lib.ctl import Ctl
from tests.lib.images import make, overlay, qemu_img

MIB = 1 << 20
SECONDS = 30.0
UUID = "3c4f1a52-9a3e-4a40-9bb1-0a1d7a4b9c11"
VARIABLES = 512 << 10


class Process:
    """A QEMU whose guest has no system; ``writers`` are its disks, by device, as qemu-io has them.

    ``images`` gives, by the name that the product uses, the image's path and format.
    """

    def __init__(
        self,
        directory: Path,
        arguments: list[str],
        images: Mapping[str, tuple[Path, str]],
        writers: Mapping[str, str],
    ) -> None:
        self.directory = directory
        self.arguments = arguments
        self.images = dict(images)
        self.writers = dict(writers)
        self.socket = directory / "qmp"
        self.handle: ProcessHandle | None = None
        self.monitor: Monitor

    def start(self) -> None:
        """Start it, and hold its second monitor."""
        pid = self.directory / "pid"
        argv = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32", "-display", "none"]
        for name in ("qmp", "own"):
            argv += ["-qmp", f"unix:{self.directory / name},server=on,wait=off"]
        argv += ["-nodefaults", "-pidfile", os.fspath(pid), "-daemonize", *self.arguments]
        subprocess.run(argv, check=True, cwd=self.directory, timeout=SECONDS)
        self.handle = ProcessHandle(int(pid.read_text()))
        self.monitor = Monitor(self.directory / "own")

    @property
    def is_running(self) -> bool:
        """Whether QEMU lives."""
        return self.handle is not None and self.handle.is_running()

    def quit(self) -> None:
        """Let it end in order."""
        self.monitor.execute("quit")
        assert self.handle is not None
        assert self.handle.wait(SECONDS)
        self.monitor.close()

    def kill(self) -> None:
        """Kill it."""
        if self.handle is not None and self.is_running:
            self.handle.send(signal.SIGKILL)
            assert self.handle.wait(SECONDS)
        self.monitor.close()

    def io(self, disk: str, command: str) -> None:
        """Have the guest's disk written by qemu-io in QEMU itself."""
        answer = self.monitor.human(f'qemu-io -d {self.writers[disk]} "{command}"')
        assert "rror" not in answer, answer
        assert "failed" not in answer, answer

    def scribble(self, rng: random.Random, count: int = 10) -> None:
        """Random writes, zeroes and discards on all disks."""
        for disk in self.writers:
            for _ in range(count):
                length = rng.randrange(1, 200) * 512
                offset = rng.randrange(0, (8 * MIB - length) // 512) * 512
                verbs = (
                    f"write -P {rng.randrange(1, 256)}",
                    "write -P 0",
                    "write -z -u",
                    "discard",
                )
                self.io(disk, f"{rng.choice(verbs)} {offset} {length}")

    def contents(self) -> dict[str, bytes]:
        """What each disk holds now, by qemu-img."""
        found = {}
        for disk, (path, form) in self.images.items():
            if disk in self.writers:
                self.io(disk, "flush")
            raw = self.directory / "reference.raw"
            qemu_img("convert", "-U", "-f", form, "-O", "raw", path, raw)
            found[disk] = raw.read_bytes()
            raw.unlink()
        return found

    def bitmaps(self) -> set[str]:
        """Names of all bitmaps in QEMU."""
        nodes = self.monitor.execute("query-named-block-nodes", {"flat": True})
        return {
            each["name"]
            for node in nodes
            for each in node.get("dirty-bitmaps", [])
            if "name" in each
        }

    def tops(self) -> dict[str, str]:
        """What each device has below it: the name of the node, by the device."""
        return {
            each.get("qdev", "").removeprefix("/machine/peripheral/").partition("/virtio")[0]: (
                each["inserted"]["node-name"]
            )
            for each in self.monitor.execute("query-block")
            if each.get("inserted")
        }

    def leftovers(self) -> list[str]:
        """What a run has made in QEMU and not removed, but for bitmaps of points."""
        nodes = self.monitor.execute("query-named-block-nodes", {"flat": True})
        found = [each["node-name"] for each in nodes if each["node-name"].startswith("nbdb")]
        found += [each["id"] for each in self.monitor.execute("query-jobs")]
        found += [each["id"] for each in self.monitor.execute("query-block-exports")]
        if self.monitor.execute("query-status")["running"]:
            # QEMU 7.2 lets go of none while the guest is paused
            found += [str(each) for each in self.monitor.execute("query-fdsets")]
        return found + [each for each in self.bitmaps() if each.endswith("-changes")]

    def has_read(self) -> bool:
        """Whether the guest has read from a disk."""
        found = self.monitor.execute("query-blockstats")
        return any(each["stats"]["rd_operations"] for each in found)

    @property
    def guest_runs(self) -> bool:
        """Whether the guest's processors run."""
        return bool(self.monitor.execute("query-status")["running"])

    def exports(self) -> set[str]:
        """The ids of all exports; a run that was killed may have left its own."""
        return {str(each["id"]) for each in self.monitor.execute("query-block-exports")}

    @property
    def has_exports(self) -> bool:
        """Whether a run reads: what its last disk held is offered."""
        return self.is_read_since(set())

    def is_read_since(self, before: set[str]) -> bool:
        """Whether a run reads that has made other exports than these."""
        last = f"-e{len(self.images) - 1}"
        return any(each.endswith(last) for each in self.exports() - before)

    def wait_clean(self) -> None:
        """Wait until nothing of a run is left."""
        wait_until(lambda: not self.leftovers(), "end of what a run left", SECONDS)

    def backup(self, ctl: Ctl, into: Path, *options: str, code: int | None = 0) -> Any:
        """Save it."""
        arguments = ["--qmp", os.fspath(self.socket), "vm7", "-o", os.fspath(into), "--json"]
        done = ctl("backup", *arguments, *options, code=code)
        return done.json if done.code in (0, 3) else done.stderr


ABOVE = {
    "throttle": ("driver=throttle,node-name=t1,throttle-group=g0,file=n1"),
    # no filter of ours is put below such a one: a backup is made by jobs then
    "copy-on-read": ("driver=copy-on-read,node-name=t1,file=n1"),
}


def modern(directory: Path, *more: str, above: str = "throttle", is_new: bool = True) -> Process:
    """-blockdev, a filter above one disk, an overlay, a raw disk; its guest was never started."""
    one, two, three = (directory / each for each in ("one.qcow2", "two.qcow2", "three.raw"))
    if is_new:
        make(one, 8 * MIB)
        overlay(two, make(directory / "below.qcow2", 8 * MIB))
        make(three, 8 * MIB, format="raw")
    arguments = [
        *("-uuid", UUID, "-S", "-object", "throttle-group,id=g0,x-iops-total=100000"),
        *("-blockdev", f"driver=qcow2,node-name=n1,file.driver=file,file.filename={one}"),
        *("-blockdev", ABOVE[above]),
        *("-device", "virtio-blk-pci,drive=t1,id=disk1"),
        *("-blockdev", f"driver=qcow2,node-name=n2,file.driver=file,file.filename={two}"),
        *("-device", "virtio-blk-pci,drive=n2,id=disk2"),
        *("-blockdev", f"driver=raw,node-name=n3,file.driver=file,file.filename={three}"),
        *("-device", "virtio-blk-pci,drive=n3,id=disk3"),
        *more,
    ]
    images = {"disk1": (one, "qcow2"), "disk2": (two, "qcow2"), "disk3": (three, "raw")}
    writers = {name: f"/machine/peripheral/{name}/virtio-backend" for name in images}
    return Process(directory, arguments, images, writers)


def proxmox(directory: Path) -> Process:
    """Much of what people give QEMU, beside what qemu-server writes; relative names; it runs.

    Of ``io0`` an iothread takes care, so that no ``qemu-io`` can write it (QEMU 7.2 aborts).
    """
    images = {}
    for name, form in (
        *(("scsi0", "qcow2"), ("virtio0", "raw"), ("virtio1", "qcow2"), ("sata0", "qcow2")),
        *(("disk5", "qcow2"), ("disk6", "qcow2"), ("disk7", "raw"), ("io0", "qcow2")),
    ):
        path = directory / f"{name}.{form}"
        if name == "disk6":
            overlay(path, make(directory / "below.qcow2", 8 * MIB))
        else:
            make(path, 8 * MIB, format=form)
        images[name] = (path, form)
    (directory / "vars.fd").write_bytes(bytes(VARIABLES))
    code = "/usr/share/seabios/bios-256k.bin"
    arguments = [
        *("-name", "vm7,debug-threads=on", "-smbios", f"type=1,uuid={UUID}"),
        *("-chardev", f"socket,id=qmp2,path={directory / 'second'},server=on,wait=off"),
        *("-mon", "chardev=qmp2,mode=control"),
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"),
        *("-drive", "if=pflash,unit=1,format=raw,id=drive-efidisk0,file=vars.fd"),
        *("-device", "virtio-scsi-pci,id=scsihw0", "-device", "ahci,id=ahci0"),
        *("-object", "throttle-group,id=g0,x-iops-total=100000", "-object", "iothread,id=io1"),
        "-drive",
        "file=scsi0.qcow2,if=none,id=drive-scsi0,format=qcow2,cache=none,aio=threads,"
        "throttling.iops-total=100000,throttling.group=drives",
        *("-device", "scsi-hd,bus=scsihw0.0,scsi-id=0,drive=drive-scsi0,id=scsi0,bootindex=100"),
        *("-drive", "if=none,id=drive-ide2,media=cdrom"),
        *("-device", "ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2"),
        "-drive",
        "file=virtio0.raw,if=none,id=drive-virtio0,format=raw,throttling.group=drives,"
        "throttling.iops-total=100000,discard=on,detect-zeroes=unmap",
        *("-device", "virtio-blk-pci,drive=drive-virtio0,id=virtio0"),
        *("-drive", "file=virtio1.qcow2,if=virtio,id=virtio1,format=qcow2"),
        *("-drive", "file=sata0.qcow2,if=none,id=drive-sata0,format=qcow2"),
        *("-device", "ide-hd,bus=ahci0.0,drive=drive-sata0,id=sata0"),
        *("-blockdev", "driver=qcow2,node-name=n5,file.driver=file,file.filename=disk5.qcow2"),
        *("-blockdev", "driver=throttle,node-name=throttle-5,throttle-group=g0,file=n5"),
        *("-device", "virtio-blk-pci,drive=throttle-5,id=disk5"),
        *("-blockdev", "driver=qcow2,node-name=n6,file.driver=file,file.filename=disk6.qcow2"),
        *("-device", "virtio-blk-pci,drive=n6,id=disk6"),
        *("-blockdev", "driver=raw,node-name=n7,file.driver=file,file.filename=disk7.raw"),
        *("-device", "scsi-hd,bus=scsihw0.0,scsi-id=7,drive=n7,id=disk7"),
        *("-blockdev", "driver=qcow2,node-name=n8,file.driver=file,file.filename=io0.qcow2"),
        *("-device", "virtio-blk-pci,drive=n8,id=io0,iothread=io1"),
    ]
    writers = {name: name for name in ("scsi0", "sata0", "disk7")}
    for name in ("virtio0", "disk5", "disk6"):
        writers[name] = f"/machine/peripheral/{name}/virtio-backend"
    writers["virtio1"] = "/machine/peripheral-anon/device[0]/virtio-backend"
    process = Process(directory, arguments, images, writers)
    process.socket = directory / "second"
    return process


@contextmanager
def running(process: Process) -> Iterator[Process]:
    """It runs during the body."""
    process.start()
    try:
        yield process
    finally:
        process.kill()


class AgentSocket(threading.Thread):
    """A guest's agent as QEMU shows it: one connection at a time, on which it says what it likes.

    A real one is in tests/system/test_freeze.py; this one can be silent, lie and flood.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(name="agent", daemon=True)
        self.agent = Agent()
        self.flood = b""
        self.lie: object = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(os.fspath(path))
        self._server.listen(1)
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                with connection, contextlib.suppress(OSError):
                    self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as requests:
            # what an earlier client has not fetched
            connection.sendall(b'{"return": 5}\nnoise\xff{"return": {}}\n')
            for line in requests:
                request = json.loads(line.lstrip(b"\xff"))
                if self.agent.is_hung:
                    continue
                is_sync = request["execute"] == "guest-sync-delimited"
                reply = self.agent.answer(request)
                if not is_sync and self.lie is not None:
                    reply = {"return": self.lie}
                if not is_sync and self.flood:
                    while True:
                        connection.sendall(self.flood)
                connection.sendall(b"\xff" * is_sync + json.dumps(reply).encode() + b"\n")

    def close(self) -> None:
        """Nobody is there any more."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
