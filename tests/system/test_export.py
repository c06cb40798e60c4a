"""``export``: readers that are not ours get the disks of one instant, and QEMU survives them.

QEMU 7.2 aborts if a client of an iothread's disk leaves first, and hangs if its job ends while one
is in its handshake: the readers here do both.
"""

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab.command import run
from tests.lab.compare import first_difference
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lab.process import wait_until
from tests.lib.ctl import Ctl

pytestmark = pytest.mark.system
KIB = 1024
SMALL_MIB = 48
SOON = 15.0
CHECKPOINT = "my-own.1"


@pytest.fixture(scope="module", params=[2, 0], ids=["iothreads", "plain"])
def guest(lab: DaemonLab, request: pytest.FixtureRequest) -> Guest:
    disks = [
        DiskSpec(target="vda", size=16 * MIB),
        DiskSpec(target="vdb", size=16 * MIB),
        DiskSpec(target="vdc", size=8 * MIB, format="raw"),
    ]
    guest = lab.guest(f"vm {request.param}", disks, GuestOptions(iothreads=request.param))
    guest.start()
    for number, target in enumerate(guest.disks):
        guest.write(target, 0, 2 * MIB, 17 + number)
    xml = lab.directory / "checkpoint.xml"
    name = CHECKPOINT
    xml.write_text(
        f"<domaincheckpoint><name>{name}</name><disks><disk name='vda' checkpoint='bitmap'/>"
        "<disk name='vdb' checkpoint='bitmap'/><disk name='vdc' checkpoint='no'/></disks>"
        "</domaincheckpoint>"
    )
    guest.virsh("checkpoint-create", guest.name, "--xmlfile", xml)
    return guest


@contextmanager
def exporting(
    ctl: Ctl, guest: Guest, *options: str | Path
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    with ctl.start("export", guest.name, "--json", *options) as process:
        assert process.stdout is not None
        text = ""
        while line := process.stdout.readline():
            text += line
            if line == "}\n":
                break
        yield process, json.loads(text)


def ended(process: subprocess.Popen[str], signum: int) -> tuple[int, str]:
    process.send_signal(signum)
    _, said = process.communicate(timeout=20)
    return process.returncode, said


def assert_unharmed(ctl: Ctl, guest: Guest) -> None:
    wait_until(lambda: guest.block_jobs() == [], "the job's end", SOON)
    assert guest.is_running()
    assert not guest.is_paused()
    wait_until(lambda: list(ctl.scratch.glob("*")) == [], "the end of scratch files", SOON)
    # it can be paused: no answer of the server waits for anybody
    guest.pause()
    guest.resume()


def connected(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(path)
    return client


def in_transmission(path: str, export: str, requests: int = 4) -> socket.socket:
    """A client by hand, which asks for some MiB and reads nothing of it."""
    client = connected(path)
    assert client.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGICIHAVEOPT")
    client.sendall(b"\0\0\0\3")
    name = export.encode()
    client.sendall(b"IHAVEOPT" + (1).to_bytes(4, "big") + len(name).to_bytes(4, "big") + name)
    assert len(client.recv(10, socket.MSG_WAITALL)) == 10
    for cookie in range(requests):
        request = bytes.fromhex("2560951300000000") + cookie.to_bytes(8, "big") + bytes(8)
        client.sendall(request + MIB.to_bytes(4, "big"))
    return client


def test_readers_get_what_was_there_and_the_guest_survives_them(
    ctl: Ctl, guest: Guest, tmp_path: Path
) -> None:
    guest.write("vda", 4 * MIB, 192 * KIB, 99)
    guest.write_zeroes("vdb", MIB, 64 * KIB, unmap=True)
    references = {each: guest.reference(each, tmp_path / f"{each}.raw") for each in guest.disks}
    path = tmp_path / "my socket?"
    with exporting(ctl, guest, "--since", CHECKPOINT, "--socket", path) as (process, found):
        assert path.stat().st_mode & 0o777 == 0o600
        assert found["socket"] == str(path)
        disks = {disk["target"]: disk for disk in found["disks"]}
        assert {name: disk["bytes"] for name, disk in disks.items()} == {
            "vda": 16 * MIB, "vdb": 16 * MIB, "vdc": 8 * MIB,
        }  # fmt: skip
        assert "raw" in disks["vdc"]["reason"]
        assert not disks["vdc"]["context"]
        for target in disks:
            guest.write(target, 0, MIB, 200)
        for target, disk in disks.items():
            run(["qemu-img", "convert", "-O", "raw", disk["uri"], tmp_path / f"q-{target}.raw"])
            run(["nbdcopy", disk["uri"], tmp_path / f"n-{target}.raw"])
            for way in "qn":
                copy = tmp_path / f"{way}-{target}.raw"
                assert first_difference(references[target], copy) is None, (target, way)
        for target, place in (("vda", (4 * MIB, 192 * KIB)), ("vdb", (MIB, 64 * KIB))):
            disk = disks[target]
            said = run(["nbdinfo", "--json", f"--map={disk['context']}", disk["uri"]])
            dirty = [(each["offset"], each["length"]) for each in json.loads(said) if each["type"]]
            assert dirty == [place]
        run(["nbdinfo", "--list", disks["vda"]["uri"].replace("/vda?", "/?")])
        # nobody reads what this one asked for; one is killed, one stays in its handshake
        with ExitStack() as stack:
            stack.enter_context(in_transmission(found["socket"], "vda"))
            stack.enter_context(connected(found["socket"]))
            with in_transmission(found["socket"], "vdb"):
                pass
            again = ctl("export", guest.name, code=75)
            assert "export of" in again.stderr
            assert ended(process, signal.SIGTERM) == (0, "")
        assert not path.exists()
    assert_unharmed(ctl, guest)


@pytest.mark.parametrize("how", ["kill", "int", "alone"])
def test_each_end(ctl: Ctl, guest: Guest, how: str) -> None:
    with exporting(ctl, guest, "--pause") as (process, found), ExitStack() as stack:
        assert len(found["disks"]) == 3
        assert found["consistency"] == "paused"
        # one that reads nothing keeps another from ending the job until it is cut off: seen once
        is_stalled = how != "alone" or not guest.iothreads
        stack.enter_context(in_transmission(found["socket"], "vdb", 4 * is_stalled))
        if how != "alone":
            # QEMU hangs if libvirt ends a job beside one
            stack.enter_context(connected(found["socket"]))
        if how == "kill":
            assert ended(process, signal.SIGKILL)[0] == -signal.SIGKILL
        elif how == "int":
            assert ended(process, signal.SIGINT) == (0, "")
        else:
            ctl("abort", guest.name, code=75)
            guest.virsh("domjobabort", guest.name)
            _, said = process.communicate(timeout=40)
            assert process.returncode == 30, said
            assert "its backup job was ended" in said
    assert_unharmed(ctl, guest)


def test_what_can_not_be_exported(ctl: Ctl, guest: Guest, tmp_path: Path) -> None:
    assert "no checkpoint nope" in ctl("export", guest.name, "--since", "nope", code=None).stderr
    (tmp_path / "file").write_text("precious")
    said = ctl("export", guest.name, "--socket", tmp_path / "file", code=None).stderr
    assert "exists: remove it" in said
    assert (tmp_path / "file").read_text() == "precious"
    assert (
        "exclude one another"
        in ctl("export", guest.name, "--pause", "--freeze", "auto", code=2).stderr
    )
    assert_unharmed(ctl, guest)


def test_scratch_that_fills_up_ends_it(ctl: Ctl, guest: Guest, small: Path) -> None:
    """The guest goes on, a reader that stands in the way is cut off."""
    options = ("--scratch-dir", small, "--scratch-reserve", "16M", "-i", "vda,vdb")
    with exporting(ctl, guest, *options) as (process, found):
        with in_transmission(found["socket"], "vda"):
            for place in range(0, 16 * MIB, MIB):
                for target in ("vda", "vdb"):
                    guest.write(target, place, MIB, 7)
                if process.poll() is not None:
                    break
            _, said = process.communicate(timeout=20)
        assert "scratch directory" in said
        assert process.returncode not in (0, 1)
    assert_unharmed(ctl, guest)
