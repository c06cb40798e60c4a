"""D-1: a libvirt that does not see this host's files is refused before anything is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lib.ctl import ROOT, Ctl

pytestmark = pytest.mark.system

RELAY = """\
#!{python}
import os, socket, sys, threading
made = socket.socket(socket.AF_UNIX)
made.connect({path!r})
def send():
    while data := os.read(0, 65536):
        made.sendall(data)
    made.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
while data := made.recv(65536):
    os.write(1, data)
"""


def contents(directory: Path) -> dict[str, bytes]:
    """Each file and what is in it, but for notes of what was verified."""
    files = [each for each in sorted(directory.rglob("*")) if each.is_file()]
    found = [each for each in files if each.parent.name != "verified"]
    return {str(each): each.read_bytes() for each in found}


def elsewhere(
    ctl: Ctl, image: Path, alien: Path, *words: str | Path
) -> "subprocess.CompletedProcess[str]":
    """Run a verb on another host: one with other memory, and another file of the disk's path."""
    ctl.runtime.mkdir(exist_ok=True)
    script = (
        f"mount -t tmpfs none {ctl.runtime} && mount -t tmpfs none /dev/shm && "
        f'mount --bind {alien} {image} && exec "$@"'
    )
    verb, *rest = words
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *ctl.argv(str(verb), *rest)],
        cwd=ROOT, env=ctl.environment, text=True, stdin=subprocess.DEVNULL, capture_output=True,
        check=False, timeout=60,
    )  # fmt: skip


def test_every_verb_refuses_another_host(lab: DaemonLab, tmp_path: Path) -> None:
    """D-1."""
    guest = lab.guest("vm1")
    image = guest.image("vda")
    ctl = Ctl(lab.uri, lab.directory / "c")
    ctl.backup("vm1", tmp_path / "set")
    alien = tmp_path / "alien.qcow2"
    run(["qemu-img", "create", "-f", "qcow2", alien, "64M"])
    before = contents(tmp_path)
    made = tmp_path / "set"
    for words in (
        ("backup", "vm1", "-o", tmp_path / "new"),
        ("backup", "vm1", "-o", made, "-l", "full"),
        ("backup", "vm1", "-o", made, "--start-paused"),
        ("estimate", "vm1", "-o", made),
        ("check", "vm1"),
        ("checkpoints", "vm1"),
        ("abort", "vm1"),
        ("restore", made, "--in-place", "--yes"),
        ("restore", made, "-o", tmp_path / "out", "--define", "--name", "two"),
        ("boot", made, "--name", "three"),
        ("verify", made, "--boot"),
    ):
        done = elsewhere(ctl, image, alien, *words)
        assert done.returncode == 20, (words, done)
        assert "is the libvirt of another host or container" in done.stderr, (words, done)
        assert "Traceback" not in done.stderr
    assert contents(tmp_path) == before
    assert lab.virsh("list", "--all", "--name").split() == ["vm1"]


def test_each_way_to_this_host_works(lab: DaemonLab, tmp_path: Path) -> None:
    """D-1: what leads here is taken, by whatever name it was called."""
    lab.guest("vm2")
    relay = tmp_path / "relay"
    relay.write_text(RELAY.format(python=sys.executable, path=os.fspath(lab.socket)))
    relay.chmod(0o755)
    for number, uri in enumerate((
        f"qemu+ssh://localhost/system?command={relay}&proxy=netcat",
        f"qemu+ssh://root@another.invalid:22/system?command={relay}&proxy=netcat",
    )):  # fmt: skip
        ctl = Ctl(uri, lab.directory / str(number))
        assert ctl.backup("vm2", tmp_path / f"set{number}")["result"] == "saved"
        assert list(ctl.runtime.glob(".same-host-*")) == []


def test_who_may_not_write_the_runtime_directory(lab: DaemonLab, tmp_path: Path) -> None:
    """D-1: the proof needs no directory of ours, since an ordinary user may look as well."""
    lab.guest("vm3")
    ctl = Ctl(lab.uri, tmp_path)
    ctl.runtime = Path("/proc/sys/none")
    done = ctl("checkpoints", "vm3")
    assert "vm3" in done.stdout
    assert list(Path("/dev/shm").glob(".same-host-*")) == []
