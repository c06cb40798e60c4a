"""The backup set on disk."""

import json
import os
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from nbdbackupd.errors import (
    BusyError,
    ChainBrokenError,
    FormatError,
    IntegrityError,
    Interrupted,
    RepositoryError,
    SourceError,
)
from nbdbackupd.format import manifest
from nbdbackupd.model.chain import Level, RestorePoint, StoredFile
from nbdbackupd.model.space import own_bytes
from nbdbackupd.repo import layout, set_directory
from nbdbackupd.repo.draft import Intent
from nbdbackupd.repo.set_directory import SetDirectory
from nbdbackupd.repo.virtnbdbackup.storage import read_small
from tests.lib import chains, points


def test_missing_and_empty_sets(tmp_path: Path) -> None:
    missing = SetDirectory.open(tmp_path / "missing")
    assert not missing.exists
    assert missing.is_empty
    assert missing.load().points == ()
    missing.check_can_begin()
    assert SetDirectory.open(tmp_path).is_empty
    (tmp_path / "file").touch()
    with pytest.raises(RepositoryError, match="no directory"):
        SetDirectory.open(tmp_path / "file")


def test_chain_of_every_level(tmp_path: Path) -> None:
    made = chains.make_chain(tmp_path / "a" / "set")
    path = tmp_path / "a" / "set"
    made.append(chains.add_point(path, 4, Level.DIFF))
    made.append(chains.add_point(path, 5, Level.COPY))
    made.append(chains.add_point(path, 6, Level.INC))
    repository = SetDirectory.open(path)
    known = repository.load()
    assert list(known.points) == made
    assert [point.digest for point in known.points] == [point.digest for point in made]
    assert all(point.digest for point in made)
    repository.check_present(known.points)
    names = [f"nbdbackup-{points.CHAIN}-{number}" for number in (1, 2, 3, 6)]
    assert json.loads((path / "vm1.cpt").read_text()) == names
    assert not list(path.glob(".draft-*"))


def test_under_the_lock_a_manifest_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was changed, though its size and its times tell nothing of that."""
    made = chains.make_chain(tmp_path, 3)
    read: list[Path] = []

    def counted(path: Path, maximum: int) -> bytes:
        read.append(path)
        return read_small(path, maximum)

    monkeypatch.setattr(set_directory, "read_small", counted)
    repository = SetDirectory.open(tmp_path)
    time.sleep(0.05)  # a tick of the kernel's clock has 10 ms at most
    with repository.lock(owner="test"):
        for _ in range(3):
            repository.check_present(repository.load().points)
        assert len(read) == len(made)
        path = tmp_path / layout.POINTS / layout.manifest(2, "p2")
        was, data = path.stat(), path.read_bytes()
        with path.open("r+b") as file:
            file.write(data.replace(b'"vm1"', b'"vm2"'))
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        assert path.stat().st_size == was.st_size
        with pytest.raises(IntegrityError):
            repository.load()
        path.write_bytes(data)
        for _ in range(2):
            # it is younger than the lock: nothing tells its next change
            read.clear()
            assert list(repository.load().points) == made
            assert read == [path]
    read.clear()
    repository.load()
    repository.load()
    assert len(read) == 2 * len(made)


def test_files_of_a_point(tmp_path: Path) -> None:
    chains.make_chain(tmp_path, 1)
    name = f"nbdbackup-{points.CHAIN}-2"
    expected = {
        *(f"{disk}.full.data{suffix}" for disk in ("vda", "vdb") for suffix in SUFFIXES),
        *(f"{disk}.inc.{name}.data{suffix}" for disk in ("vda", "vdb") for suffix in SUFFIXES),
        *("points/000001-p1.json", "points/000002-p2.json", "vmconfig.p1.xml", "vmconfig.p2.xml"),
        *(f"checkpoints/nbdbackup-{points.CHAIN}-1.xml", f"checkpoints/{name}.xml"),
        "vm1.cpt",
    }
    assert set(chains.tree(tmp_path)) == expected
    stream = tmp_path / "vda.full.data"
    assert int((tmp_path / "vda.full.data.chksum").read_text()) == zlib.adler32(stream.read_bytes())
    for path in tmp_path.rglob("*"):
        assert path.name == layout.LOCK or path.stat().st_mode & 0o077 == 0, path


SUFFIXES = ("", ".index", ".chksum")


def test_second_run_is_busy(tmp_path: Path) -> None:
    with (
        SetDirectory.open(tmp_path).lock(owner="backup of vm1"),
        pytest.raises(BusyError, match="backup of vm1"),
        SetDirectory.open(tmp_path).lock(owner="other"),
    ):
        pass
    with SetDirectory.open(tmp_path).lock(owner="other"):
        pass


def test_changes_need_the_lock(tmp_path: Path) -> None:
    repository = SetDirectory.open(tmp_path)
    with pytest.raises(RuntimeError, match="lock"):
        repository.sweep()
    with pytest.raises(RuntimeError, match="lock"), repository.draft(chains.intent_for(1)):
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_draft_is_removed_on_every_path(tmp_path: Path, error: type[BaseException]) -> None:
    repository = SetDirectory.open(tmp_path)
    seen: list[str] = []

    def fail() -> None:
        with repository.lock(owner="x"), repository.draft(chains.intent_for(1)) as draft:
            draft.add_bytes("a", b"x", "nvram")
            seen.extend(path.name for path in draft.path.iterdir())
            raise error(2)

    with pytest.raises(error):
        fail()
    assert sorted(seen) == ["a", "intent.json"]
    assert chains.tree(tmp_path) == {}


def test_foreign_files_refuse_a_full(tmp_path: Path) -> None:
    (tmp_path / "vda.full.data").write_bytes(b"peer")
    repository = SetDirectory.open(tmp_path)
    with (
        pytest.raises(RepositoryError, match=r"vda\.full\.data.*virtnbdbackup.*-o"),
        repository.lock(owner="x"),
        repository.draft(chains.intent_for(1)),
    ):
        pass
    (tmp_path / "vda.full.data").rename(tmp_path / "letter.txt")
    with pytest.raises(RepositoryError, match=r"files of others \(letter\.txt\)"):
        repository.check_can_begin()
    (tmp_path / "letter.txt").rename(tmp_path / ".hidden")
    for name in ("logs", "lost+found", "points"):
        (tmp_path / name).mkdir()
    repository.check_can_begin()
    with repository.lock(owner="x"), repository.draft(chains.intent_for(1)):
        pass


def test_existing_file_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains.make_chain(tmp_path, 0)
    name = f"vdb.inc.nbdbackup-{points.CHAIN}-2.data"
    (tmp_path / name).write_bytes(b"precious")
    before = chains.tree(tmp_path)

    def too_late(_source: Path, _target: Path) -> None:
        pytest.fail("found only after the first rename")

    monkeypatch.setattr(os, "rename", too_late)
    with pytest.raises(RepositoryError, match=f"{name} exists"):
        chains.add_point(tmp_path, 2)
    assert chains.tree(tmp_path) == before


def test_file_that_appears_during_the_renames_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains.make_chain(tmp_path, 0)
    before = chains.tree(tmp_path)
    name = f"vdb.inc.nbdbackup-{points.CHAIN}-2.data"
    rename = os.rename

    def disturb(source: Path, target: Path) -> None:
        rename(source, target)
        (tmp_path / name).write_bytes(b"precious")

    monkeypatch.setattr(os, "rename", disturb)
    with pytest.raises(RepositoryError, match=f"{name} exists"):
        chains.add_point(tmp_path, 2)
    assert chains.tree(tmp_path) == {**before, name: b"precious"}


def test_manifest_must_tell_all_and_only_the_truth(tmp_path: Path) -> None:
    repository = SetDirectory.open(tmp_path)
    with (
        repository.lock(owner="x"),
        repository.draft(chains.intent_for(1, level=Level.FULL)) as made,
    ):
        point = chains.fill(made, (), Level.FULL)
        bad_size = replace(point.disks[0], file_size=1)
        for wrong, message in [
            (replace(point, files=()), "forgets checkpoints/.*vmconfig"),
            (replace(point, disks=(bad_size, point.disks[1])), "not what was written"),
            (replace(point, uuid="other"), "not what this draft was made for"),
            (replace(point, id="p9"), "not what this draft was made for"),
            (replace(point, checkpoint="c9"), "not the one of the intent"),
            (replace(point, parent="p0"), "full point p1 names a parent"),
            (replace(point, created="now"), "created"),
        ]:
            with pytest.raises((RepositoryError, FormatError), match=message):
                made.publish(wrong)
            assert not made.published
            assert repository.is_empty
        (made.path / "vdb.full.data").unlink()
        with pytest.raises(RepositoryError, match=r"lacks vdb\.full\.data"):
            made.publish(point)
    assert repository.is_empty
    assert chains.tree(tmp_path) == {}


def test_names_cannot_leave_the_draft(tmp_path: Path) -> None:
    repository = SetDirectory.open(tmp_path)
    with repository.lock(owner="x"), repository.draft(chains.intent_for(1)) as draft:
        for name in ["../x", "/x", "a/b", ".lock", "", "checkpoints/", "checkpoints/.x", ".."]:
            with pytest.raises(RepositoryError, match="no name"):
                draft.add_bytes(name, b"", "nvram")


def test_copies(tmp_path: Path) -> None:
    source = tmp_path / "NVRAM of vm 1.fd"
    source.write_bytes(b"n" * 3_000_000)
    state = tmp_path / "tpm"
    (state / "tpm2").mkdir(parents=True)
    (state / "tpm2" / "tpm2-00.permall").write_bytes(b"state")
    os.mkfifo(state / "pipe")
    repository = SetDirectory.open(tmp_path / "set")
    with repository.lock(owner="x"), repository.draft(chains.intent_for(1)) as draft:
        stored = draft.copy_file(layout.copy("nvram", "p1", source.name), source, "nvram")
        assert stored.sha256 == points.sha(source.read_bytes())
        assert (stored.size, stored.origin) == (3_000_000, str(source))
        assert stored.name == "nvram.p1.NVRAM of vm 1.fd"
        inner = "tpm2/tpm2-00.permall"
        file = draft.copy_file(layout.copy("tpm-state", "p1", inner), state / inner, "tpm-state")
        assert layout.path_in_tree(file, "p1") == inner
        assert (draft.path / file.name).read_bytes() == b"state"
        for bad in (tmp_path / "absent", state / "pipe", state):
            with pytest.raises(SourceError, match=bad.name):
                draft.copy_file("x", bad, "nvram")


def kernel_of(point: RestorePoint) -> StoredFile:
    return next(each for each in point.files if each.role == "kernel")


def add_with_kernel(path: Path, number: int, content: bytes) -> RestorePoint:
    """Publish a point of a guest that boots this kernel."""
    (path.parent / chains.KERNEL).write_bytes(content)
    return chains.add_point(path, number, Level.FULL if number == 1 else Level.INC)


def test_a_boot_file_is_stored_once_per_content(tmp_path: Path) -> None:
    path = tmp_path / "set"
    contents = [b"old", b"new", b"old", b"new"]
    made = [add_with_kernel(path, number, each) for number, each in enumerate(contents, 1)]
    names = [kernel_of(point).name for point in made]
    assert names == ["kernel.p1.vmlinuz", "kernel.p2.vmlinuz"] * 2
    assert sorted(each.name for each in path.glob("kernel.*")) == sorted(set(names))
    assert own_bytes(made)["p3"] == own_bytes(made)["p4"] == own_bytes(made)["p2"] - 3
    known = SetDirectory.open(path).load()
    SetDirectory.open(path).check_present(known.points)
    assert [(path / kernel_of(point).name).read_bytes() for point in known.points] == contents


def test_a_damaged_boot_file_is_not_shared(tmp_path: Path) -> None:
    """A copy of it is stored, so that the new point is sound; what was damaged is as it was."""
    path = tmp_path / "set"
    add_with_kernel(path, 1, b"kernel")
    for number, spoil in enumerate((b"KERNEL", b"k", None), 2):
        newest = SetDirectory.open(path).load().newest
        old = path / kernel_of(newest).name
        old.unlink()
        if spoil is not None:
            old.write_bytes(spoil)
        made = add_with_kernel(path, number, b"kernel")
        assert kernel_of(made).name == f"kernel.p{number}.vmlinuz"
        assert (path / kernel_of(made).name).read_bytes() == b"kernel"
        assert (old.read_bytes() if spoil is not None else None) == spoil


def test_what_is_shared_must_be_of_a_point(tmp_path: Path) -> None:
    """A file that lies in the set and is of nobody may be swept away at any time."""
    path = tmp_path / "set"
    held = [kernel_of(add_with_kernel(path, 1, b"kernel"))]
    stray = replace(held[0], name="kernel.x.vmlinuz")
    (path / stray.name).write_bytes(b"kernel")
    repository = SetDirectory.open(path)
    with repository.lock(owner="x"), repository.draft(chains.intent_for(2)) as draft:
        shared = draft.share(path.parent / chains.KERNEL, "kernel", [stray])
        assert shared is not None
        point = chains.fill(draft, repository.load().points, Level.INC)
        files = [each for each in point.files if each.role != "kernel"]
        with pytest.raises(RepositoryError, match="of no restore point any more"):
            draft.publish(replace(point, files=(*files, shared)))


def test_discarded_file_needs_no_manifest(tmp_path: Path) -> None:
    repository = SetDirectory.open(tmp_path)
    with (
        repository.lock(owner="x"),
        repository.draft(chains.intent_for(1, level=Level.FULL)) as made,
    ):
        point = chains.fill(made, (), Level.FULL)
        made.add_bytes("extra", b"x", "nvram")
        with pytest.raises(RepositoryError, match="forgets extra"):
            made.publish(point)
        made.discard("extra")
        made.publish(point)
        assert made.published
    assert len(repository.load().points) == 1


def test_manifest_under_another_name_is_refused(tmp_path: Path) -> None:
    chains.make_chain(tmp_path, 0)
    folder = tmp_path / "points"
    (folder / "000001-p1.json").rename(folder / "000002-p1.json")
    with pytest.raises(IntegrityError, match="name of another point"):
        SetDirectory.open(tmp_path).load()


def test_damaged_manifests_are_named(tmp_path: Path) -> None:
    chains.make_chain(tmp_path, 1)
    newest = tmp_path / "points" / "000002-p2.json"
    data = bytearray(newest.read_bytes())
    data[200] ^= 1
    newest.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"damaged.*000002-p2\.json"):
        SetDirectory.open(tmp_path).load()
    newest.unlink()
    newest.symlink_to("/dev/zero")
    with pytest.raises(IntegrityError, match=r"not a regular file.*000002-p2\.json"):
        SetDirectory.open(tmp_path).load()
    newest.unlink()
    os.mkfifo(newest)
    with pytest.raises(IntegrityError, match="not a regular file"):
        SetDirectory.open(tmp_path).load()
    newest.unlink()
    assert len(SetDirectory.open(tmp_path).load().points) == 1


def test_missing_parent_and_swapped_parent_are_found(tmp_path: Path) -> None:
    made = chains.make_chain(tmp_path, 1)
    first = tmp_path / "points" / "000001-p1.json"
    data = first.read_bytes()
    first.unlink()
    with pytest.raises(ChainBrokenError, match="needs its parent p1"):
        SetDirectory.open(tmp_path).load()
    first.write_bytes(manifest.pack(replace(made[0], program="another")))
    with pytest.raises(ChainBrokenError, match="another manifest"):
        SetDirectory.open(tmp_path).load()
    first.write_bytes(data)
    assert len(SetDirectory.open(tmp_path).load().points) == 2


def test_check_present(tmp_path: Path) -> None:
    made = chains.make_chain(tmp_path, 1)
    repository = SetDirectory.open(tmp_path)
    stream = tmp_path / "vda.full.data"
    data = stream.read_bytes()
    stream.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=r"vda\.full\.data \(\d+ bytes instead"):
        repository.check_present(made)
    repository.check_present(made[1:])
    stream.unlink()
    (tmp_path / "vda.full.data.index").unlink()
    with pytest.raises(ChainBrokenError, match=r"lacks .*vda\.full\.data, vda\.full\.data\.index"):
        repository.check_present(made)
    stream.write_bytes(data)
    (tmp_path / "points" / "000001-p1.json").unlink()
    with pytest.raises(ChainBrokenError, match=r"points/000001-p1\.json"):
        repository.check_present(made)


def test_order_needs_no_times_nor_names(tmp_path: Path) -> None:
    made = chains.make_chain(tmp_path, 3)
    for number, path in enumerate(sorted(tmp_path.rglob("*"), reverse=True)):
        os.utime(path, (number, number))
    assert list(SetDirectory.open(tmp_path).load().points) == made


def test_sweep_restores_derived_files_and_removes_temporary_ones(tmp_path: Path) -> None:
    chains.make_chain(tmp_path, 1)
    before = chains.tree(tmp_path)
    (tmp_path / "vm1.cpt").unlink()
    (tmp_path / ".nbdbackup-tmp-0123456789abcdef").touch()
    (tmp_path / "points" / ".nbdbackup-tmp-0123456789abcdef").touch()
    (tmp_path / "note.txt").write_text("mine")
    (tmp_path / ".draft-of-a-letter").write_text("mine")
    repository = SetDirectory.open(tmp_path)
    with repository.lock(owner="x"):
        assert repository.sweep() == []
    expected = {**before, "note.txt": b"mine", ".draft-of-a-letter": b"mine"}
    assert chains.tree(tmp_path) == expected


def test_sweep_keeps_what_a_damaged_set_may_need(tmp_path: Path) -> None:
    chains.make_chain(tmp_path, 1)
    (tmp_path / ".draft-dead").mkdir()
    (tmp_path / ".draft-dead" / "intent.json").write_bytes(chains.intent_for(3).pack())
    path = tmp_path / "points" / "000002-p2.json"
    path.write_bytes(path.read_bytes()[:-5])
    before = chains.tree(tmp_path)
    repository = SetDirectory.open(tmp_path)
    with repository.lock(owner="x"):
        with pytest.raises(IntegrityError):
            repository.sweep()
        assert repository.dead_runs() == [chains.intent_for(3)]
    assert chains.tree(tmp_path) == before


def test_sweep_of_damaged_drafts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in [("a", b"{"), ("b", b'{"uuid": 1}'), ("c", b"[" * 9999)]:
        (tmp_path / f".draft-{name}").mkdir()
        (tmp_path / f".draft-{name}" / "intent.json").write_bytes(content)
    (tmp_path / ".draft-empty").mkdir()
    (tmp_path / ".draft-link").symlink_to(tmp_path / ".draft-empty")
    repository = SetDirectory.open(tmp_path)
    with repository.lock(owner="x"):
        assert repository.sweep() == []
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".draft-link", ".lock"]
    assert "damaged" in caplog.text


def test_intent_round_trip() -> None:
    intent = chains.intent_for(7)
    assert Intent.parse(intent.pack()) == intent


def test_failure_after_the_commit_rename_takes_the_point_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains.make_chain(tmp_path, 0)
    before = chains.tree(tmp_path)
    rename = os.rename

    def interrupt(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).parent.name == "points":
            raise Interrupted(15)

    monkeypatch.setattr(os, "rename", interrupt)
    with pytest.raises(Interrupted):
        chains.add_point(tmp_path, 2)
    assert chains.tree(tmp_path) == before


def test_files_that_cannot_be_taken_back_are_swept_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains.make_chain(tmp_path, 0)
    before = chains.tree(tmp_path)
    rename = os.rename
    count = 0

    def fail(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(RepositoryError, match="Input/output error"):
            chains.add_point(tmp_path, 2)
    assert set(chains.tree(tmp_path)) > set(before)
    repository = SetDirectory.open(tmp_path)
    with repository.lock(owner="x"):
        assert repository.sweep() == [chains.intent_for(2)]
    assert chains.tree(tmp_path) == before
