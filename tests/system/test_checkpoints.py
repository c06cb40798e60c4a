"""``checkpoints``, and what each run puts in order: libvirt, images and sets brought together."""

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd import durable
from nbdbackupd.model import naming
from nbdbackupd.ops.checkpoints import checkpoints
from nbdbackupd.virt.connection import open_connection
from nbdbackupd.virt.domain import Domain
from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import GuestOptions
from tests.lib.scene import WARNED, Saved, Scene, scene, tree

pytestmark = pytest.mark.system
KIB = 1024
USAGE, DOMAIN, REPOSITORY, BUSY = 2, 20, 50, 75
TWO = (DiskSpec(target="vda", size=8 * MIB), DiskSpec(target="vdb", size=8 * MIB))
FOREIGN = ("bitmap0", "nbdbackup", "nbdbackup.x", "nbdbackup2.x.y")


@pytest.fixture
def here(lab: DaemonLab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A guest with data on two disks and a full of it."""
    options = GuestOptions(uuid=str(uuid.uuid4()))
    with scene(lab, tmp_path, request.node.name, TWO, options) as here:
        here.guest.write("vda", 0, 4 * MIB, 0xEE)
        here.guest.write("vdb", 0, 4 * MIB, 0xDD)
        here.save()
        yield here


def change(here: Scene, number: int) -> None:
    """Data and zeroes on both disks."""
    for place, target in enumerate(here.guest.disks):
        here.guest.write(target, (number % 8 + place) * 64 * KIB, 64 * KIB, number)
        here.guest.write_zeroes(target, MIB + number % 16 * 64 * KIB, 64 * KIB, unmap=True)


def base(here: Scene) -> str:
    """The checkpoint that the next increment into the usual set starts from."""
    bases = [
        saved.point["checkpoint"]
        for saved in here.history
        if saved.set == here.set and saved.point["level"] in ("full", "inc")
    ]
    return str(bases[-1])


def show(here: Scene, *options: str | Path, code: int = 0) -> Any:
    """The report of the verb; that it changes nothing unless told to is proven each time."""
    changes = {"--repair", "--drop"} & {str(option) for option in options}
    before = everything(here)
    report = here.ctl("checkpoints", here.guest.name, "--json", *options, code=code).json
    if not changes or "--dry-run" in options:
        assert everything(here) == before
    assert report["changed"] == bool(changes and "--dry-run" not in options)
    return report


def everything(here: Scene) -> object:
    """All that the verb could change."""
    dumps = [
        here.lab.virsh("checkpoint-dumpxml", here.guest.name, name) for name in here.checkpoints()
    ]
    return (
        tree(here.directory),
        tree(here.ctl.state.parent),
        dumps,
        {target: stored(here, target) for target in here.guest.disks},
    )


def stored(here: Scene, target: str) -> dict[str, tuple[str, ...]]:
    """Bitmaps in the disk's top image and their flags, as qemu-img tells."""
    return flags(here.guest.image(target))


def flags(image: Path) -> dict[str, tuple[str, ...]]:
    text = run(["qemu-img", "info", "-U", "--output=json", image])
    specific = json.loads(text)["format-specific"]["data"]
    return {each["name"]: tuple(each["flags"]) for each in specific.get("bitmaps", [])}


def names_of(here: Scene, target: str) -> set[str]:
    """The bitmaps of a disk: QEMU's while the guest runs, else those that are stored."""
    return set(here.guest.bitmaps(target) if here.guest.is_running() else stored(here, target))


def steps(report: Any) -> list[tuple[str, str]]:
    assert not any(step["problem"] for step in report["steps"])
    return [(step["action"], step["checkpoint"]) for step in report["steps"]]


def states(report: Any) -> dict[str, str]:
    return {each["name"]: each["state"] for each in report["checkpoints"]}


def assert_in_order(here: Scene, *options: str | Path) -> None:
    """Nothing to do; each chain's base is all there is of ours, at libvirt and in each image."""
    report = show(here, *options)
    assert steps(report) == []
    assert states(report) == dict.fromkeys((chain["base"] for chain in report["chains"]), "base")
    assert not any(entry["problems"] for entry in report["checkpoints"])
    bases = {chain["base"] for chain in report["chains"]}
    assert {name for name in here.checkpoints() if naming.tag_of(name)} == bases
    for target in here.guest.disks:
        assert {name for name in names_of(here, target) if naming.tag_of(name)} == bases


def assert_delta(here: Scene, *options: str, into: Path | None = None, code: int = 0) -> Saved:
    saved = here.save(*options, into=into, code=code)
    assert set(saved.modes.values()) == {"delta"}
    return saved


def stop_if(here: Scene, power: str) -> None:
    if power == "off":
        here.guest.stop()


def start_if(here: Scene, power: str) -> None:
    if power == "off":
        here.guest.start()


def drop_metadata(here: Scene, name: str) -> None:
    here.guest.virsh("checkpoint-delete", "--metadata", "--domain", here.guest.name, name)


def kill_a_run(here: Scene, *options: str, into: Path | None = None) -> str:
    """A run that dies in the middle; return the checkpoint that it has left."""
    before = set(here.checkpoints())
    target = into or here.set
    with here.ctl.rigged("KILL@blocks-copied#2"):
        here.ctl("backup", here.guest.name, "-o", target, *options, code=-signal.SIGKILL)
    (left,) = set(here.checkpoints()) - before
    return left


both = pytest.mark.parametrize("power", ["running", "off"])


@both
def test_in_order(here: Scene, power: str, tmp_path: Path) -> None:
    change(here, 1)
    assert_delta(here)
    stop_if(here, power)
    for options in ((), ("-o", here.set), ("--dry-run",), ("--dry-run", "--repair")):
        assert_in_order(here, *options)
    assert steps(show(here, "--repair")) == []
    report = show(here)
    assert report["active"] == (power == "running")
    assert report["uuid"] == here.guest.options.uuid
    (chain,) = report["chains"]
    assert chain["set"] == str(here.set)
    assert chain["readable"]
    assert chain["point"] == here.history[-1].id
    text = here.ctl("checkpoints", here.guest.name).stdout
    assert text.splitlines()[0].endswith(power)
    assert text.splitlines()[-1] == "nothing to do"
    for word in (chain["id"], str(here.set), here.history[-1].id, "knows    vda, vdb"):
        assert word in text
    # neither a state nor a set: nothing is known of what is there
    empty = show(here, "--checkpoint-dir", tmp_path / "none")
    assert states(empty) == {base(here): "unknown"}
    assert steps(empty) == []
    start_if(here, power)
    change(here, 2)
    assert_delta(here)
    here.prove_all()


@both
def test_metadata_that_is_lost(here: Scene, power: str) -> None:
    name = base(here)
    change(here, 1)
    drop_metadata(here, name)
    stop_if(here, power)
    assert steps(show(here)) == [("redefine", name)]
    # from a state record alone it can be redefined, too
    away = here.directory / "away"
    here.set.rename(away)
    report = show(here, "--repair")
    assert not report["chains"][0]["readable"]
    assert "there is no set" in report["chains"][0]["problem"]
    assert steps(report) == [("redefine", name)]
    away.rename(here.set)
    assert here.checkpoints() == [name]
    assert_in_order(here)
    start_if(here, power)
    change(here, 2)
    assert_delta(here)
    assert_in_order(here)
    here.prove_all()


def test_metadata_that_is_lost_without_stored_xml(here: Scene) -> None:
    """The XML in the set is damaged, the state is lost: one of our own making does as well."""
    name = base(here)
    change(here, 1)
    drop_metadata(here, name)
    shutil.rmtree(here.ctl.state)
    (xml,) = here.set.glob("checkpoints/*.xml")
    xml.write_bytes(b"\xff" * xml.stat().st_size)
    assert steps(show(here, "-o", here.set, "--repair")) == [("redefine", name)]
    assert_in_order(here, "-o", here.set)
    # by a run itself as well
    change(here, 2)
    drop_metadata(here, name)
    assert_delta(here)
    for saved in here.history:
        here.prove(saved)


def test_a_domain_that_is_defined_anew(here: Scene) -> None:
    change(here, 1)
    here.guest.stop()
    here.guest.undefine()
    here.guest.define()
    assert here.checkpoints() == []
    assert steps(show(here, "--repair")) == [("redefine", base(here))]
    here.guest.start()
    assert_in_order(here)
    change(here, 2)
    assert_delta(here)
    here.prove_all()


def test_a_domain_that_is_renamed(lab: DaemonLab, here: Scene) -> None:
    change(here, 1)
    here.guest.stop()
    old = here.guest.name
    lab.virsh("domrename", old, f"{old}-new")
    lab.restart()
    here.guest.name = f"{old}-new"
    assert here.checkpoints() == []
    assert steps(show(here, "--repair")) == [("redefine", base(here))]
    lab.restart()
    assert_in_order(here)
    # what the lab waits for has the domain's name in it
    places = here.guest.places
    lab.virsh("domrename", here.guest.name, old)
    here.guest.name = old
    assert here.guest.places == places
    here.guest.start()
    change(here, 2)
    assert_delta(here)
    assert_in_order(here)
    here.prove_all()


def test_a_transient_domain(here: Scene) -> None:
    guest = here.guest
    change(here, 1)
    guest.stop()
    xml = guest.places.images / f"define-{guest.places.monitor.stem}.xml"
    guest.undefine()
    guest.virsh("create", xml)
    guest.adopt_process()
    assert here.checkpoints() == []
    assert steps(show(here)) == [("redefine", base(here))]
    assert_delta(here)
    change(here, 2)
    guest.destroy()
    guest.virsh("create", xml)
    guest.adopt_process()
    assert steps(show(here, "--repair")) == [("redefine", base(here))]
    assert_in_order(here)
    change(here, 3)
    assert_delta(here)
    here.prove_all()
    guest.destroy()
    guest.define()


def forget_runs(here: Scene) -> None:
    """Take away what tells of runs that died."""
    for note in here.ctl.runtime.glob("*/run.json"):
        note.unlink()
    for draft in here.set.glob(".draft-*"):
        shutil.rmtree(draft)


@both
def test_what_dead_runs_left(here: Scene, power: str, tmp_path: Path) -> None:
    change(here, 1)
    # into a set that has no point yet: what is known of its chain is this note
    lost = kill_a_run(here, into=tmp_path / "other")
    here.ctl("abort", here.guest.name)
    stop_if(here, power)
    assert states(show(here))[lost] == "dead"
    assert steps(show(here, "--repair")) == [("remove", lost)]
    assert_in_order(here)
    start_if(here, power)
    # into the chain that is there; nothing tells of the run, and libvirt forgot the checkpoint
    change(here, 2)
    left = kill_a_run(here)
    here.ctl("abort", here.guest.name)
    assert states(show(here))[left] == "dead"
    forget_runs(here)
    assert states(show(here))[left] == "stray"
    drop_metadata(here, left)
    if power == "running":
        assert left not in states(show(here)), "it is in QEMU's memory alone"
    here.guest.stop()
    start_if(here, "off" if power == "running" else "")
    for target in here.guest.disks:
        assert set(stored(here, target)) == {base(here), left}
    assert states(show(here))[left] == "stray"
    assert steps(show(here, "--repair")) == [("remove", left)]
    assert_in_order(here)
    start_if(here, power)
    change(here, 3)
    assert_delta(here)
    assert_in_order(here)
    here.prove_all()


def test_a_run_removes_what_others_left_while_the_domain_was_off(here: Scene) -> None:
    """Stored by a guest that ended, without metadata; the next run alone puts it in order."""
    change(here, 1)
    left = kill_a_run(here)
    here.ctl("abort", here.guest.name)
    old = base(here)
    change(here, 2)
    assert_delta(here)
    here.guest.stop()
    for target in here.guest.disks:
        # as if the last removals had not got through
        run(["qemu-img", "bitmap", "--add", here.guest.image(target), old])
        run(["qemu-img", "bitmap", "--add", here.guest.image(target), left])
    assert set(steps(show(here))) == {("remove", old), ("remove", left)}
    here.guest.start()
    change(here, 3)
    assert_delta(here)
    assert_in_order(here)
    here.prove_all()


@both
def test_those_of_others_stay(here: Scene, power: str) -> None:
    guest = here.guest
    guest.stop()
    for name in FOREIGN:
        run(["qemu-img", "bitmap", "--add", guest.image("vda"), name])
    guest.start()
    for name in ("theirs", "bitmap0x"):
        here.lab.virsh("checkpoint-create-as", guest.name, name)
    change(here, 1)
    left = kill_a_run(here)
    here.ctl("abort", guest.name)
    stop_if(here, power)
    report = show(here, "--repair")
    assert steps(report) == [("remove", left)]
    assert report["foreign"] == len(FOREIGN) + 2
    text = here.ctl("checkpoints", guest.name).stdout
    assert f"other programs, left alone: {report['foreign']}" in text
    for name in FOREIGN:
        here.ctl("checkpoints", guest.name, "--drop", name, code=DOMAIN)
    assert names_of(here, "vda") == {base(here), "theirs", "bitmap0x", *FOREIGN}
    assert set(here.checkpoints()) == {base(here), "theirs", "bitmap0x"}
    start_if(here, power)
    change(here, 2)
    assert_delta(here)
    assert names_of(here, "vda") == {base(here), "theirs", "bitmap0x", *FOREIGN}
    here.prove_all()


@both
def test_two_chains_and_one_that_is_dropped(here: Scene, power: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    change(here, 1)
    here.save(into=other)
    change(here, 2)
    assert_delta(here, into=other)
    assert_delta(here)
    mine, theirs = base(here), here.history[-2].point["checkpoint"]
    stop_if(here, power)
    assert_in_order(here)
    # its set is away, perhaps for good: it is known by its record, and nothing happens to it
    gone = tmp_path / "gone"
    other.rename(gone)
    for name in (mine, theirs):
        drop_metadata(here, name)
    report = show(here, "--repair")
    assert {chain["base"]: chain["readable"] for chain in report["chains"]} == {
        mine: True, theirs: False,
    }  # fmt: skip
    assert set(steps(report)) == {("redefine", mine), ("redefine", theirs)}
    # without the record: of a chain that nobody knows
    (record,) = here.ctl.state.glob(f"*/*{naming.tag_of(theirs)}.json")
    kept = record.read_bytes()
    record.unlink()
    report = show(here, "--repair")
    assert states(report) == {mine: "base", theirs: "unknown"}
    assert steps(report) == []
    assert naming.tag_of(theirs) in here.ctl("checkpoints", here.guest.name).stdout
    record.write_bytes(kept)
    drop = ("--drop", naming.tag_of(theirs))
    assert steps(show(here, *drop, "--dry-run")) == [("remove", theirs)]
    assert steps(show(here, *drop)) == [("remove", theirs)]
    assert not record.exists()
    assert (
        "no checkpoint of chain"
        in here.ctl("checkpoints", here.guest.name, *drop, code=DOMAIN).stderr
    )
    assert_in_order(here)
    for target in here.guest.disks:
        assert names_of(here, target) == {mine}
    start_if(here, power)
    change(here, 3)
    assert_delta(here)
    # the set comes back after all: its disks are read whole, with the reason
    gone.rename(other)
    saved = here.save(into=other, code=WARNED)
    assert set(saved.modes.values()) == {"full"}
    here.prove_all()


def test_all_domains_are_released(lab: DaemonLab, here: Scene, tmp_path: Path) -> None:
    """L-4: before this program is removed: libvirt and the images know nothing of it after."""
    with scene(lab, tmp_path / "more", "released", TWO, GuestOptions()) as more:
        more.directory.mkdir(exist_ok=True)
        more.ctl.state, more.ctl.runtime = here.ctl.state, here.ctl.runtime
        more.save()
        more.guest.stop()
        here.ctl("checkpoints", "--all", code=USAGE)
        here.ctl("checkpoints", here.guest.name, "--all", "--release", code=USAGE)
        here.ctl("checkpoints", code=USAGE)
        planned = here.ctl("checkpoints", "--all", "--release", "--dry-run").stdout
        assert f"{here.guest.name}:" in planned
        assert more.checkpoints()
        done = here.ctl("checkpoints", "--all", "--release", "--json").json
        assert {each["problem"] for each in done["domains"]} == {""}
        for each in (here, more):
            assert each.checkpoints() == []
            assert not any(names_of(each, target) for target in each.guest.disks)
        lab.virsh("undefine", "--domain", more.guest.name)
        more.guest.define()
        said = here.ctl("checkpoints", "--all", "--release").stdout
        assert said == "no domain carries checkpoints or bitmaps of ours\n"


@both
def test_other_chains_are_told_with_the_cure(here: Scene, power: str, tmp_path: Path) -> None:
    """L-1: a directory for each month, by hand: no bitmap stays in silence."""
    june, july = (tmp_path / "by-hand" / month for month in ("2022-06", "2022-07"))
    tag = naming.tag_of(base(here))
    state = ("--checkpoint-dir", str(here.ctl.state))
    drop = f"'nbdbackupctl checkpoints {here.guest.name} --drop {tag}'"
    (note,) = here.save(into=june).report["notes"]
    assert note.endswith(
        f"for set {here.set}; if no backup goes there any more, remove them with {drop}"
    )
    stop_if(here, power)
    found = here.ctl("check", here.guest.name, "-o", june, *state, "--json", code=None)
    assert drop in found.stdout
    shutil.rmtree(here.set)
    here.history.pop(0)
    gone = here.save(into=june, code=WARNED)
    assert gone.warnings == [
        f"the images carry bitmaps of chain {tag}, too, for set {here.set}, which is gone; "
        f"remove them with {drop}"
    ]
    refused = here.ctl("backup", here.guest.name, "-o", june, "--strict", code=DOMAIN)
    assert drop in refused.stderr
    found = here.ctl("check", here.guest.name, *state, "--json", code=WARNED).json
    assert drop in json.dumps(found)
    here.ctl("checkpoints", here.guest.name, "--drop", tag)
    assert here.save(into=june).report["notes"] == []
    both_living = here.save(into=july)
    assert [
        naming.tag_of(gone.point["checkpoint"]) in each for each in both_living.report["notes"]
    ] == [True]
    here.prove_all()


def test_a_crash_takes_the_bases_of_two_chains(lab: DaemonLab, here: Scene, tmp_path: Path) -> None:
    """libvirt is not told of them again: 'virsh undefine' works, the next runs say why."""
    other, name = tmp_path / "other", here.guest.name
    (note,) = here.save(into=other).report["notes"]
    assert "the images carry bitmaps of chain" in note
    here.guest.kill9()
    here.guest.wait_shut_off()
    assert len(steps(show(here, "--repair"))) == 2
    here.guest.start()
    assert here.ctl("checkpoints", name, "--repair").stdout == "nothing to do\n"
    told = here.ctl("checkpoints", name).stdout
    assert told.count("reads vda whole: its bitmap is missing or inconsistent") == 2
    found = here.ctl("check", name, "-o", other, code=None).stdout
    assert "carry bitmaps" not in found
    here.guest.stop()
    lab.restart()
    here.lab.virsh("undefine", name)
    here.guest.define()
    here.guest.start()
    for into in (here.set, other):
        saved = here.save(into=into, code=WARNED)
        assert set(saved.modes.values()) == {"full"}
        assert all("missing or inconsistent" in why for why in saved.reasons.values())
    change(here, 3)
    for into in (here.set, other):
        assert_delta(here, into=into)
    assert_in_order(here)


@pytest.mark.parametrize("how", ["started at once", "released", "without a record"])
def test_libvirt_does_not_keep_a_base_that_is_lost(here: Scene, how: str) -> None:
    name, options = here.guest.name, ["--repair"]
    if how == "released":
        here.ctl("checkpoints", name, "--release")
        here.guest.stop()
    else:
        here.guest.kill9()
        here.guest.wait_shut_off()
    if how == "without a record":
        here.lab.virsh("undefine", name, "--checkpoints-metadata")
        here.guest.define()
        shutil.rmtree(here.ctl.state)
        options += ["-o", str(here.set)]
    here.guest.start()
    (said,) = here.ctl("checkpoints", name, *options).stdout.splitlines()
    expected = {
        "started at once": f"done: remove {base(here)}: its bitmap is missing or inconsistent in ",
        "released": "nothing to do",
        "without a record": f"of no use: redefine {base(here)} (vda, vdb): libvirt does not know "
        f"it; the running QEMU has lost its bitmap, and the next run reads whole disks",
    }
    assert said.startswith(expected[how])
    assert here.checkpoints() == []
    # nor does a run that makes no point
    here.refuse("--strict", code=DOMAIN)
    assert set(here.save(code=WARNED).modes.values()) == {"full"}
    assert_in_order(here)


def test_one_disk_has_lost_its_bitmap(here: Scene) -> None:
    """libvirt is told of the base for the other, whose changes are read as before."""
    here.guest.stop()
    name = base(here)
    run(["qemu-img", "bitmap", "--remove", here.guest.image("vdb"), name])
    here.lab.virsh("undefine", here.guest.name, "--checkpoints-metadata")
    here.guest.define()
    here.guest.start()
    (step,) = show(here, "--repair")["steps"]
    assert (step["action"], step["disks"], step["lost"]) == ("redefine", ["vda", "vdb"], ["vdb"])
    assert here.checkpoints() == [name]
    change(here, 1)
    assert here.save(code=WARNED).modes == {"vda": "delta", "vdb": "full"}
    change(here, 2)
    assert_delta(here)
    assert_in_order(here)
    here.prove_all()


@both
def test_a_state_that_is_older_or_lost(here: Scene, power: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(here.ctl.state, old)
    for number in (1, 2):
        change(here, number)
        assert_delta(here)
    for restored in (True, False):
        shutil.rmtree(here.ctl.state)
        if restored:
            shutil.copytree(old, here.ctl.state)
        change(here, 3 + restored)
        if power == "off":
            here.guest.stop()
            assert_in_order(here, "-o", here.set)
            here.guest.start()
        assert_delta(here)
        assert_in_order(here)
    # damaged: named, and replaced by the next run
    (record,) = here.ctl.state.glob("*/*.json")
    record.write_bytes(record.read_bytes()[:100])
    change(here, 6)
    assert "is ignored" in assert_delta(here, code=WARNED).stderr
    assert_in_order(here)
    # a state that can't be written costs a warning in the log, not the point
    shutil.rmtree(here.ctl.state)
    here.ctl.state.write_text("in the way")
    change(here, 7)
    assert "not noted" in assert_delta(here, code=WARNED).stderr
    here.prove_all()


def test_a_copy_of_the_set(here: Scene, tmp_path: Path) -> None:
    """What the copy does not know may be the base of the original, which its record tells."""
    copy = tmp_path / "copy"
    shutil.copytree(here.set, copy)
    change(here, 1)
    assert_delta(here)
    report = show(here, "-o", copy, "--repair")
    assert states(report) == {
        here.history[0].point["checkpoint"]: "base", base(here): "elsewhere",
    }  # fmt: skip
    # that its own base is gone can only be seen when it is known again
    assert steps(report) == [("redefine", here.history[0].point["checkpoint"])]
    report = show(here, "-o", copy)
    assert steps(report) == []
    # by name, not by place: two runs within a second have ids in any order
    (own,) = (each for each in report["checkpoints"] if each["state"] == "base")
    assert set(own["problems"]) == {"vda", "vdb"}
    # the original is put back to the older state: then the newer point is gone
    shutil.rmtree(here.set)
    copy.rename(here.set)
    assert states(show(here))[base(here)] == "stray"
    assert steps(show(here, "--repair")) == [("remove", base(here))]
    here.history.pop()
    change(here, 2)
    saved = here.save(code=WARNED)
    assert set(saved.modes.values()) == {"full"}
    here.prove_all()


def test_another_host_of_a_cluster(here: Scene, tmp_path: Path) -> None:
    """The images and the state directory are shared, the checkpoints of libvirt are not."""
    change(here, 1)
    assert_delta(here)
    here.guest.stop()
    here.guest.virsh("undefine", "--checkpoints-metadata", "--domain", here.guest.name)
    xml = here.guest.places.images / f"define-{here.guest.places.monitor.stem}.xml"
    with DaemonLab() as second:
        text = xml.read_text().replace(str(here.lab.directory), str(second.directory))
        for disk in ("vda", "vdb"):
            image = str(here.guest.image(disk))
            text = text.replace(
                image.replace(str(here.lab.directory), str(second.directory)), image
            )
        there = tmp_path / "there.xml"
        there.write_text(text)
        second.virsh("define", there)
        here.ctl.uri = second.uri
        report = here.ctl("checkpoints", here.guest.name, "--repair", "--json").json
        assert steps(report) == [("redefine", base(here))]
        second.virsh("start", here.guest.name)
        # one of its own: the lock file of the first host is not there
        here.ctl.runtime = second.directory / "run"
        saved = here.ctl.backup(here.guest.name, here.set)
        assert {disk["mode"] for disk in saved["point"]["disks"]} == {"delta"}
        second.virsh("destroy", here.guest.name)
    here.ctl("verify", here.set)


@both
def test_bitmaps_that_a_killed_qemu_left(here: Scene, power: str) -> None:
    guest = here.guest
    guest.stop()
    guest.start()
    change(here, 1)
    name = base(here)
    guest.kill9()
    guest.wait_shut_off()
    assert stored(here, "vda")[name] == ("in-use", "auto")
    start_if(here, "off" if power == "running" else "")
    report = show(here)
    (entry,) = report["checkpoints"]
    assert set(entry["problems"]) == {"vda", "vdb"}
    assert "whole" in here.ctl("checkpoints", guest.name).stdout
    if power == "off":
        assert all("inconsistent" in why for why in entry["problems"].values())
        assert steps(report) == [("remove", name)]
        assert steps(show(here, "--repair")) == [("remove", name)]
        assert here.checkpoints() == []
        assert stored(here, "vda") == {}
        guest.start()
    change(here, 2)
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "full"}
    change(here, 3)
    assert_delta(here)
    assert_in_order(here)
    here.prove_all()


def break_bitmaps(image: Path) -> None:
    """Leave an image as a writer leaves it that is killed."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"write -P 9 0 4k\n")
        writer.stdin.flush()
        # the answer comes when the image is open and written to
        assert b"wrote" in os.read(writer.stdout.fileno(), 4096) + os.read(
            writer.stdout.fileno(), 4096
        )
        writer.kill()


@pytest.mark.parametrize("how", ["missing", "inconsistent"])
def test_a_lower_layer(here: Scene, how: str) -> None:
    guest = here.guest
    lower = guest.image("vda")
    change(here, 1)
    guest.virsh(
        "snapshot-create-as", "--disk-only", "--atomic", "--no-metadata", "--domain", guest.name,
        "--diskspec", f"vda,file={lower.with_name(f'over-{lower.name}')}",
        "--diskspec", "vdb,snapshot=no",
    )  # fmt: skip
    change(here, 2)
    name = base(here)
    assert_in_order(here)
    guest.stop()
    guest.use_image("vda", lower.with_name(f"over-{lower.name}"))
    assert_in_order(here)
    if how == "missing":
        run(["qemu-img", "bitmap", "--remove", lower, name])
        why = "has lost bitmap"
    else:
        break_bitmaps(lower)
        why = "is inconsistent"
    for power in ("off", "running"):
        (entry,) = show(here)["checkpoints"]
        assert list(entry["problems"]) == ["vda"], power
        assert why in entry["problems"]["vda"]
        assert str(lower) in entry["problems"]["vda"]
        if power == "off":
            guest.start()
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "delta"}
    assert why in saved.reasons["vda"]
    # nothing of the old base is left anywhere
    guest.stop()
    assert name not in flags(lower)
    if how == "inconsistent":
        guest.start()
        change(here, 3)
        assert_delta(here)
    here.prove_all()


def test_a_broken_lower_layer_is_cleaned_up_while_off(here: Scene) -> None:
    guest = here.guest
    lower = guest.image("vda")
    guest.virsh(
        "snapshot-create-as", "--disk-only", "--atomic", "--no-metadata", "--domain", guest.name,
        "--diskspec", f"vda,file={lower.with_name(f'over-{lower.name}')}",
        "--diskspec", "vdb,snapshot=no",
    )  # fmt: skip
    guest.stop()
    guest.use_image("vda", lower.with_name(f"over-{lower.name}"))
    break_bitmaps(lower)
    name = base(here)
    (step,) = show(here, "--repair")["steps"]
    assert (step["images"], step["metadata"], step["problem"]) == ([str(lower)], False, "")
    assert flags(lower) == {}
    assert here.checkpoints() == [name]
    assert steps(show(here)) == []
    guest.start()
    saved = here.save(code=WARNED)
    assert saved.modes == {"vda": "full", "vdb": "delta"}
    here.prove_all()


def test_an_image_that_somebody_has_open(here: Scene) -> None:
    """What can't be removed now is named, the rest is done, and the next one does it."""
    change(here, 1)
    left = kill_a_run(here)
    here.ctl("abort", here.guest.name)
    here.guest.stop()
    with subprocess.Popen(
        ["qemu-io", "-r", "-f", "qcow2", here.guest.image("vdb")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as reader:  # fmt: skip
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(b"read 0 4k\n")
        reader.stdin.flush()
        os.read(reader.stdout.fileno(), 1)
        result = here.ctl("checkpoints", here.guest.name, "--repair", code=WARNED)
        assert f"NOT done: remove {left}" in result.stdout
        assert str(here.guest.image("vdb")) in result.stdout
        reader.kill()
    assert left in stored(here, "vdb")
    assert left in here.checkpoints()
    assert steps(show(here, "--repair")) == [("remove", left)]
    assert_in_order(here)
    here.guest.start()
    change(here, 2)
    assert_delta(here)
    here.prove_all()


def test_a_guest_is_reverted_to_a_snapshot(here: Scene, tmp_path: Path) -> None:
    """G-5: QEMU ends a guest with active bitmaps at that; so all of ours are let go of before."""
    change(here, 1)
    here.save()
    other = here.save("-l", "full", into=tmp_path / "other")
    name = here.guest.name
    here.lab.virsh("snapshot-create-as", name, "before")
    report = here.ctl("check", name, "-o", here.set, "--json", code=None).json
    (told,) = [each for each in report["findings"] if "would end the guest" in each["text"]]
    assert told["advice"] == f"before reverting: 'nbdbackupctl checkpoints {name} --release'"
    change(here, 2)
    plan = here.ctl("checkpoints", name, "--release", "--dry-run").stdout
    assert plan.count("remove ") == len(here.checkpoints()) == 2
    here.ctl("checkpoints", name, "--release")
    assert here.checkpoints() == []
    assert here.guest.bitmaps("vda") == here.guest.bitmaps("vdb") == {}
    here.lab.virsh("snapshot-revert", name, "before")
    assert here.lab.virsh("domstate", name).strip() == "running"
    here.guest.adopt_process()  # libvirt 9.0 starts another QEMU for that
    # each chain goes on, whole once and with the reason
    for into in (here.set, tmp_path / "other"):
        saved = here.save("-l", "inc", into=into, code=WARNED)
        assert saved.modes == {"vda": "full", "vdb": "full"}
        for reason in saved.reasons.values():
            assert "'checkpoints --release' let go of it at " in reason
    change(here, 3)
    assert here.save().modes == here.save(into=other.set).modes == {"vda": "delta", "vdb": "delta"}
    here.prove_all()


def test_a_run_that_lives_is_named_and_not_disturbed(here: Scene) -> None:
    change(here, 1)
    with here.held() as process:
        report = show(here)
        assert f"process {process.pid} (backup of" in report["busy"]
        assert "busy: " in here.ctl("checkpoints", here.guest.name).stdout
        for option in (("--repair",), ("--drop", naming.tag_of(base(here)))):
            here.ctl("checkpoints", here.guest.name, *option, code=BUSY)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    assert show(here)["busy"] == ""


def test_sets_of_others_and_domains_that_are_not_there(here: Scene, tmp_path: Path) -> None:
    here.ctl("checkpoints", "nobody", code=DOMAIN)
    none = tmp_path / "none"
    for options in ((), ("--repair",)):
        result = here.ctl("checkpoints", here.guest.name, "-o", none, *options, code=REPOSITORY)
        assert "there is no set" in result.stderr
    assert not none.exists()
    with scene(here.lab, tmp_path / "b", "other", TWO[:1]) as other:
        result = other.ctl(
            "checkpoints", other.guest.name, "-o", here.set, "--repair", code=REPOSITORY
        )
        assert "belongs to domain" in result.stderr
        assert "no checkpoints of ours" in other.ctl("checkpoints", other.guest.name).stdout


PLANT = """
import sys
import libvirt
domain = libvirt.open(sys.argv[1]).lookupByName(sys.argv[2])
for name in sys.stdin.read().split():
    domain.checkpointCreateXML(
        f"<domaincheckpoint><name>{name}</name><creationTime>1</creationTime><disks>"
        "<disk name='vda' checkpoint='bitmap'/></disks></domaincheckpoint>",
        libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE,
    )
"""


@pytest.mark.timeout(300)
def test_a_thousand_checkpoints(here: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt is asked once for all of them, and for each that something is done about."""
    name, tag = base(here), naming.tag_of(base(here))
    here.guest.stop()
    old = [f"nbdbackup.{tag}.old{number}" for number in range(10)]
    others = [f"other.{number}" for number in range(900)]
    unknown = [f"nbdbackup.0f0f0f0f.p{number}" for number in range(90)]
    subprocess.run(
        ["/usr/bin/python3", "-c", PLANT, here.lab.uri, here.guest.name],
        input="\n".join([*old, *others, *unknown]), text=True, check=True,
        env={"LIBVIRT_DEBUG": "error"},
    )  # fmt: skip
    drop_metadata(here, name)
    calls = []
    real = Domain.call

    def counted(self: Domain, what: str, function: Any) -> Any:
        calls.append(what)
        return real(self, what, function)

    monkeypatch.setattr(Domain, "call", counted)
    request = checkpoints.CheckpointsRequest(
        domain=here.guest.name, runtime_dir=here.ctl.runtime, state_dir=here.ctl.state, run_id="r"
    )
    with open_connection(here.lab.uri) as connection:
        report = checkpoints.run(request, connection)
        shown = len(calls)
        assert len(report.steps) == len(old) + 1
        assert report.plan.foreign == len(others)
        calls.clear()
        report = checkpoints.run(replace(request, repair=True), connection)
    assert not report.problems
    # of each of ours: does it run, is the checkpoint there, delete it
    assert shown < 20
    assert len(calls) < shown + 10 + 5 * (len(old) + 1)
    assert set(here.checkpoints()) == {name, *others, *unknown}
    here.guest.start()
    change(here, 1)
    drop_metadata(here, name)
    begun = time.monotonic()
    assert_delta(here)
    assert time.monotonic() - begun < 60
    assert set(here.checkpoints()) == {base(here), *others, *unknown}
    here.prove_all()


@pytest.mark.parametrize(("owner", "code"), [("backup of vm", 0), ("restore of vm", BUSY)])
def test_after_a_start_only_a_backup_reconciles_instead(here: Scene, owner: str, code: int) -> None:
    """S-8: 75 was a success of the unit, so whoever held the lock kept checkpoints away."""
    (lock,) = here.ctl.runtime.glob("*-*/lock")
    with durable.Lock(lock, owner=owner):
        done = here.ctl("checkpoints", here.guest.name, "--repair", "--started", code=code)
        here.ctl("checkpoints", here.guest.name, "--repair", code=BUSY)
    assert (done.stdout == "nothing to do\n") == (code == 0)
