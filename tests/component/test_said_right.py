"""W-10: small things that were said wrong, each by its input."""

import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd import durable
from nbdbackupd.app.verbs import restore, run
from nbdbackupd.errors import RepositoryError
from nbdbackupd.model import hostpaths, unitname
from nbdbackupd.model.chain import ImageLayer, Level
from nbdbackupd.model.choice import NEWEST
from nbdbackupd.model.domain import Disk, Domain
from nbdbackupd.model.plan import BaseDisk, DiskState, why_full
from nbdbackupd.model.selection import ImageFacts, select_disks, why_whole
from nbdbackupd.ops.backup import backup
from nbdbackupd.ops.backup.request import BackupReport
from nbdbackupd.ops.domain.survey import Looked
from nbdbackupd.ops.restore.request import RestoreReport
from nbdbackupd.ops.run.request import RunReport
from nbdbackupd.ops.sets import catalog, import_set, opened
from nbdbackupd.ops.sets.import_set import ImportRequest
from nbdbackupd.ops.verify import verify
from nbdbackupd.ops.verify.verify import VerifyRequest
from nbdbackupd.qemu.image import ImageInfo
from tests.lib import points
from tests.lib.pages import TOP

pytestmark = pytest.mark.component


def test_an_image_that_was_replaced_under_its_name() -> None:
    was = BaseDisk(target="vda", size=1, layers=(ImageLayer("/i/a", "qcow2", 1, 2),), bitmap="b")
    now = DiskState(size=1, layers=(ImageLayer("/i/a", "qcow2", 1, 3),))
    assert why_full(was, now) == (
        "its image was replaced since the last point: another file is /i/a now"
    )


def test_each_of_our_units_names_its_domain() -> None:
    for kind in ("nbdbackup", "nbdbackup-verify", "nbdbackup-boot-test", "nbdbackup-prune"):
        assert unitname.domain_of(f"{kind}@vm1.timer") == "vm1"


def test_a_drive_that_may_be_empty_is_not_needed() -> None:
    xml = """<domain><devices><disk type='file' device='cdrom'>
    <source file='/iso' startupPolicy='{}'/><target dev='hda'/></disk></devices></domain>"""
    for policy in ("optional", "mandatory"):
        (use,) = hostpaths.of_xml(xml.format(policy))
        assert isinstance(use, hostpaths.PathUse)
        assert use.optional == (policy == "optional")


def test_a_directory_of_something_else_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="is no backup set"):
        catalog.list_points(Path("/etc"))
    request = VerifyRequest(path=Path("/etc"))
    with pytest.raises(RepositoryError, match="/etc is no backup set: it has no directory points"):
        verify.run(request, progress=lambda *_: None, cancelled=lambda: None)
    assert catalog.list_points(tmp_path).points == ()
    (tmp_path / "points").mkdir()
    assert catalog.list_points(tmp_path).points == ()


@pytest.mark.parametrize("output", [None, "new"])
def test_an_import_of_something_else_leaves_no_trace(tmp_path: Path, output: str | None) -> None:
    source, new = tmp_path / "etc", tmp_path / output if output else None
    source.mkdir()
    (source / "passwd").touch()
    request = ImportRequest(source=source, output=new, run_id="r")
    with pytest.raises(
        RepositoryError, match="etc holds no backup that virtnbdbackup or qmpbackup wrote"
    ):
        import_set.run(request, progress=lambda *_: None, cancelled=lambda: None)
    assert [each.name for each in tmp_path.iterdir()] == ["etc"]
    assert [each.name for each in source.iterdir()] == ["passwd"]
    with pytest.raises(RepositoryError, match="there is no backup set at"):
        opened.open_point(tmp_path / "none", NEWEST)


def test_why_a_set_was_begun_is_said_once() -> None:
    why = "set 2026-11 can't be continued: it lacks files"
    made = RunReport(
        domain="vm1", uuid="u", result="saved", reason=why, set=Path("/b/2026-11.2"),
        problems=(why,), backup=BackupReport(point=points.full_point()),
    )  # fmt: skip
    told = run.render(made)
    assert told.count(why) == 1
    assert told.splitlines()[-2:] == ["  into /b/2026-11.2", f"  warning: {why}"]
    assert run.render(replace(made, problems=())).endswith(f"  into /b/2026-11.2: {why}")


def test_no_runtime_directory_of_a_session() -> None:
    with (
        pytest.raises(RepositoryError, match="XDG_RUNTIME_DIR"),
        durable.translate_os_errors("create", Path("/run/user/4242/nbdbackup")),
    ):
        Path("/run/user/4242/nbdbackup").mkdir()


def test_a_plugin_that_may_not_look_says_unknown(tmp_path: Path) -> None:
    """Run by an account that can't read the repository, as Nagios' own."""
    home = tmp_path / "repository" / "vm1"
    (home / "2026-01").mkdir(parents=True)
    config = tmp_path / "etc"
    (config / "domains.d").mkdir(parents=True)
    (config / "nbdbackup.yaml").write_text(f"repository: {{path: {tmp_path}/repository}}\n")
    (config / "domains.d/vm1.yaml").write_text("match: {name: vm1}\n")
    above = [each for each in tmp_path.parents if each.name and each != Path(tempfile.gettempdir())]
    for path in (config / "domains.d", config, tmp_path, *above):
        path.chmod(0o755)
    home.chmod(0o700)
    done = subprocess.run(
        [
            "/usr/bin/python3", "-m", "nbdbackupd", "-c", "test:///default", "--config-dir", config,
            "--runtime-dir", tmp_path / "run", "status", "--nagios", "vm1",
        ],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"}, cwd=TOP, check=False,
        capture_output=True, text=True, timeout=60, user=65534, group=65534, extra_groups=[],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith("NBDBACKUP UNKNOWN - ")
    assert "run as root" in done.stdout


def test_a_disk_that_is_read_whole_says_why() -> None:
    """Read-only, with a raw data file, of no bytes; what converting cures is a fault of its own."""
    qcow2 = Disk(target="vda", format="qcow2", source="/i/a")
    for disk, facts, words in (
        (replace(qcow2, readonly=True), ImageFacts(format="qcow2"), "read-only"),
        (qcow2, ImageFacts(format="qcow2", has_raw_data=True), "in a raw file"),
        (qcow2, ImageFacts(format="qcow2", size=0), "no bytes"),
    ):
        why, is_fault = why_whole(disk, facts)
        assert words in why
        assert not is_fault
    why, is_fault = why_whole(replace(qcow2, format="vmdk"), ImageFacts(format="vmdk"))
    assert is_fault
    assert "convert it to qcow2" in why


def test_a_directory_that_is_shown_as_a_disk_is_not_to_be_converted() -> None:
    domain = Domain(name="vm1", uuid="u", disks=(
        Disk(target="vda", type="dir", format="fat", source="/srv/files"),
        Disk(target="vdb", format="qcow2", source="/i/b"),
    ))  # fmt: skip
    (left,) = select_disks(domain, {}, level=Level.FULL).skipped
    assert left.target == "vda"
    assert "save the directory itself" in left.reason
    assert "convert" not in left.reason


def test_a_restore_without_a_point_names_none() -> None:
    """A file of another program's set: its name is in no set's list."""
    report = RestoreReport(
        point="", domain="vm1", created="2026-11-30T12:00:00Z", disks=(), config=None, files=(),
        warnings=(), seconds=1.0,
    )  # fmt: skip
    assert "point" not in restore.render(report)
    assert "(point p1)" in restore.render(replace(report, point="p1"))


def test_what_is_encrypted_here_is_told_not_to_be_in_the_set() -> None:
    chain = (ImageInfo(filename="/i/a", format="qcow2", virtual_size=1, encrypted=True),)
    looked = Looked(
        definition=Domain(name="vm1", uuid="u"), is_active=True, infos={}, states={},
        chains={"vda": chain, "vdb": (replace(chain[0], encrypted=False),)},
    )  # fmt: skip
    assert looked.encrypted == ("vda",)
    assert "vda is encrypted, its data in the set is not" in backup.ENCRYPTED.format(disk="vda")
