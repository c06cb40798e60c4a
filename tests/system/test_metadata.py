"""What is saved beside the disks: real files of a real definition, and what can't be read."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd.model.domain import Domain as Definition
from nbdbackupd.ops.backup import metadata
from nbdbackupd.repo import layout
from nbdbackupd.repo.draft import Draft, Intent
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.virt.connection import Connection
from nbdbackupd.virt.domain import Domain
from tests.lab.daemon import DaemonLab

pytestmark = pytest.mark.system
GRAPHICS = "<graphics type='vnc' port='-1' passwd='hush'><listen type='none'/></graphics>"


@pytest.fixture(scope="module")
def domain(lab: DaemonLab, connection: Connection) -> Domain:
    guest = lab.guest("vm1")
    xml = lab.virsh("dumpxml", "vm1").replace("</devices>", f"{GRAPHICS}</devices>")
    path = lab.directory / "secret.xml"
    path.write_text(xml)
    lab.virsh("define", path)
    guest.start()
    return Domain.find(connection, "vm1")


@pytest.fixture
def definition(domain: Domain) -> Definition:
    return domain.definition()


@pytest.fixture
def draft(tmp_path: Path, domain: Domain) -> Iterator[Draft]:
    repository = SetDirectory.open(tmp_path / "set")
    intent = Intent(
        uuid=domain.uuid, domain="vm1", chain="c", checkpoint="", run_id="r", point_id="p"
    )
    with repository.lock(owner="test"), repository.draft(intent) as draft:
        yield draft


def test_definitions_with_secrets_in_private_files(
    domain: Domain, definition: Definition, draft: Draft
) -> None:
    files, warnings = metadata.save(draft, metadata.collect(domain, definition), "p")
    assert warnings == []
    assert [file.role for file in files] == ["domain-xml", "domain-xml-live"]
    inactive, live = ((draft.path / file.name).read_text() for file in files)
    assert "hush" in inactive
    assert "hush" in live
    assert "id='" in live.splitlines()[0]
    assert "id='" not in inactive.splitlines()[0]
    assert all((draft.path / file.name).stat().st_mode & 0o777 == 0o600 for file in files)


def test_firmware_and_kernel(
    domain: Domain, definition: Definition, draft: Draft, tmp_path: Path
) -> None:
    odd = tmp_path / "odd 'name' \"<&>\"\n.fd"
    odd.write_bytes(b"firmware")
    definition = replace(
        definition, loader=str(odd), nvram=str(tmp_path / "gone"), kernel="pool/kernel",
        initrd=str(tmp_path),
    )  # fmt: skip
    collected = metadata.collect(domain, definition)
    files, warnings = metadata.save(draft, collected, "p")
    loader = next(file for file in files if file.role == "loader")
    assert (draft.path / loader.name).read_bytes() == b"firmware"
    assert loader.origin == str(odd)
    assert [warning.split(":")[0] for warning in (*collected.warnings, *warnings)] == [
        "the kernel is not saved",
        "the nvram is not saved",
        "the initrd is not saved",
    ]
    # what was given up is no part of the draft any more
    assert sorted(path.name for path in draft.path.iterdir() if path.name != layout.INTENT) == (
        sorted(file.name for file in files)
    )


def test_tpm_state(domain: Domain, definition: Definition, draft: Draft, tmp_path: Path) -> None:
    state = tmp_path / "tpm" / "tpm2"
    state.mkdir(parents=True)
    (state / "tpm2-00.permall").write_bytes(b"state")
    (state / ".lock").touch()
    (state / "link").symlink_to("/etc/passwd")
    definition = replace(definition, has_tpm=True, tpm_source=str(tmp_path / "tpm"))
    collected = metadata.collect(domain, definition)
    files, warnings = metadata.save(draft, collected, "p")
    saved = [file for file in files if file.role == "tpm-state"]
    assert [layout.path_in_tree(file, "p") for file in saved] == ["tpm2/tpm2-00.permall"]
    assert (draft.path / saved[0].name).read_bytes() == b"state"
    assert (*collected.warnings, *warnings) == ()


def test_missing_tpm_state_is_a_warning(
    domain: Domain, definition: Definition, tmp_path: Path
) -> None:
    for path in (tmp_path / "gone", tmp_path):
        tpm = replace(definition, has_tpm=True, tpm_source=str(path))
        warnings = metadata.collect(domain, tpm).warnings
        assert len(warnings) == 1
        assert str(path) in warnings[0]
    by_uri = metadata.collect(domain, replace(definition, has_tpm=True)).warnings
    assert f"/var/lib/libvirt/swtpm/{domain.uuid}" in by_uri[0]
