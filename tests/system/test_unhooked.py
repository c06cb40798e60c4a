"""G-3: an offline run and a start never meet in a refused start, hook called or not."""

import json
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackupd import rundir
from nbdbackupd.app import ctl
from nbdbackupd.source import hooked
from nbdbackupd.virt.connection import open_connection
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lab.process import wait_until
from tests.lib.ctl import ROOT
from tests.lib.scene import WARNED, Scene, assert_same, scene

pytestmark = pytest.mark.system
BUSY = 75
HOOK = """\
#!/bin/sh
NBDBACKUP_RUNTIME_DIR={runtime} NBDBACKUP_STATE_DIR={state}
export NBDBACKUP_RUNTIME_DIR NBDBACKUP_STATE_DIR
hook={hook}
[ ! -r "$hook" ] || . "$hook"
"""


@pytest.fixture
def lab() -> Iterator[DaemonLab]:
    with DaemonLab() as lab:
        yield lab


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path) -> Iterator[Scene]:
    """A guest that is off, with a full of it."""
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, "off", [DiskSpec(size=16 * MIB)], options) as here:
        here.guest.write("vda", 0, 4 * MIB, 0xEE)
        here.save()
        here.guest.write("vda", MIB, MIB, 0xDD)
        here.guest.stop()
        yield here


def test_a_start_wins_where_no_hook_tells_of_it(here: Scene) -> None:
    """G-3: the run holds no lock of QEMU's, sees the start, and what it has read is no point."""
    with (
        here.ctl.rigged("STOP@disk-copied#1"),
        here.ctl.start("backup", "off", "-o", here.set, "--json") as process,
    ):
        here.ctl.faults = ()
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "stop", 60)
        here.guest.start()
        here.guest.write("vda", 2 * MIB, MIB, 0x11)
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == BUSY, said
    assert "domain off was started while its images were read" in said
    assert len(here.ctl.points(here.set)) == 1
    here.save()
    here.prove_all()


def install(here: Scene, lab: DaemonLab) -> None:
    """Put our hook where libvirt's daemon looks for it, but for its settings as packages do."""
    place = lab.root / "etc/hooks/qemu.d/nbdbackup"
    place.parent.mkdir(parents=True)
    # as its package puts it, which can be removed
    hook = here.directory / "hook"
    shutil.copy(ROOT / "hooks/qemu", hook)
    place.write_text(HOOK.format(runtime=here.ctl.runtime, state=here.ctl.state, hook=hook))
    place.chmod(0o755)


def test_a_hook_that_libvirt_has_not_read_yet(
    here: Scene, lab: DaemonLab, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """G-3: nothing is written, so that not even a short lock refuses a start; it is told."""
    monkeypatch.setattr(rundir, "DEFAULT", here.ctl.runtime)

    def look() -> hooked.Hook:
        with open_connection(lab.uri) as connection:
            return hooked.look(connection, here.ctl.runtime)

    assert not look().is_installed
    install(here, lab)
    found = look()
    assert found.is_installed
    assert "'systemctl start nbdbackup-load-hook'" in found.why
    before = here.bitmaps_off("vda")
    references = here.references()
    words = here.ctl.argv("backup", "off", "-o", here.set, "--json")
    assert ctl.main(words[words.index("-c") :]) == WARNED
    report = json.loads(capsys.readouterr().out)
    assert report["point"]["level"] == "diff"
    assert any(
        "'systemctl start nbdbackup-load-hook'" in each for each in report["point"]["warnings"]
    )
    assert here.bitmaps_off("vda") == before
    (image,) = here.ctl.restore(here.set, here.directory / "out").values()
    assert_same(image, "qcow2", references["vda"])
    words = here.ctl.argv("check", "off")
    assert ctl.main(words[words.index("-c") :]) == WARNED
    assert "libvirt does not call our hook yet" in " ".join(capsys.readouterr().out.split())
    # a daemon that began after the file was there has found it, also before it has called it
    time.sleep(hooked.MARGIN_SECONDS)
    lab.restart()
    assert look() == hooked.Hook()
    here.save()
    # and one that calls it is known by that, whatever the file's times say
    here.guest.start()
    place = lab.root / "etc/hooks/qemu.d/nbdbackup"
    shutil.copy(place, here.directory / "copy")
    place.unlink()
    shutil.copy(here.directory / "copy", place)
    assert look() == hooked.Hook()
    # what another daemon has called says nothing
    called = (here.ctl.runtime / rundir.CALLED).read_text()
    (here.ctl.runtime / rundir.CALLED).write_text("1 1\n")
    assert look().is_installed
    # the package is removed, and its file in /etc stays: it does nothing, whoever has called it
    (here.ctl.runtime / rundir.CALLED).write_text(called)
    (here.directory / "hook").unlink()
    found = look()
    assert (found.is_installed, found.is_removed) == (False, True)
    words = here.ctl.argv("check", "off")
    assert ctl.main(words[words.index("-c") :]) == WARNED
    told = " ".join(capsys.readouterr().out.split())
    assert "WARN libvirt's hook does nothing: the package nbdbackupd was removed" in told
    assert "install the package nbdbackupd" in told
    here.guest.write("vda", 3 * MIB, MIB, 0x22)
    here.save()
    here.prove_all()
