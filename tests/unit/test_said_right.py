"""W-10: small things that were said wrong, each by its input."""

import os
import subprocess
from pathlib import Path

import pytest

from nbdbackupd import durable
from nbdbackupd.errors import RepositoryError
from nbdbackupd.model import hostpaths, unitname
from nbdbackupd.model.chain import ImageLayer
from nbdbackupd.model.plan import BaseDisk, DiskState, why_full
from nbdbackupd.ops.sets import catalog
from tests.lib.pages import TOP


def test_an_image_that_was_replaced_under_its_name() -> None:
    was = BaseDisk(target="vda", size=1, layers=(ImageLayer("/i/a", "qcow2", 1, 2),), bitmap="b")
    now = DiskState(size=1, layers=(ImageLayer("/i/a", "qcow2", 1, 3),))
    assert why_full(was, now) == (
        "its image was replaced since the last point: another file is /i/a now"
    )


def test_each_of_our_units_names_its_domain() -> None:
    for kind in ("nbdbackup", "nbdbackup-verify", "nbdbackup-boot-test"):
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
    assert catalog.list_points(tmp_path).points == ()
    (tmp_path / "points").mkdir()
    assert catalog.list_points(tmp_path).points == ()


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
    for path in (config / "domains.d", config, tmp_path, *tmp_path.parents[:2]):
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
