"""What ``checkpoints`` prints for people."""

from dataclasses import replace

from nbdbackupd.app.verbs.checkpoints import render
from nbdbackupd.model.chain import ImageLayer
from nbdbackupd.model.plan import BaseDisk, DiskState
from nbdbackupd.model.reconcile import KnownChain, View, reconcile
from nbdbackupd.ops.checkpoints.checkpoints import CheckpointsReport
from nbdbackupd.ops.checkpoints.reconcile import Done

TAG = "0a1b2c3d"
CHAIN = f"20261121T101500-{TAG}"
OLD, BASE, NEW = (f"nbdbackup.{TAG}.p{number}" for number in (1, 2, 3))
STRANGE = "nbdbackup.77777777.p9"


def layer(target: str) -> ImageLayer:
    return ImageLayer(f"/img/{target}", "qcow2", 1, ord(target[-1]))


def report(*, active: bool = False, whole: bool = True) -> CheckpointsReport:
    disks = {
        target: DiskState(
            size=1,
            layers=(layer(target),),
            bitmaps={f"/img/{target}": {BASE: target == "vda", OLD: True, STRANGE: True}},
            is_live=active,
        )
        for target in ("vda", "vdb")
    }
    chain = KnownChain(
        id=CHAIN,
        base=BASE,
        disks=tuple(
            BaseDisk(target=target, size=1, layers=(layer(target),), bitmap=BASE)
            for target in disks
        ),
        committed=frozenset({OLD, BASE}),
        elsewhere=frozenset({NEW}),
        is_whole=whole,
        set="/backup/vm",
    )
    seen = View(is_active=active, checkpoints=frozenset({OLD, BASE, NEW, "theirs"}), disks=disks)
    plan = reconcile(seen, [chain])
    return CheckpointsReport(
        domain="vm1",
        uuid="u",
        is_active=active,
        chains=(chain,),
        missing={} if whole else {CHAIN: "there is no set /backup/vm"},
        plan=plan,
        steps=tuple(Done(step) for step in plan.steps),
        changed=False,
    )


def test_a_domain_that_is_off() -> None:
    assert render(report()).splitlines() == [
        "domain vm1 (u), off",
        "",
        f"chain {CHAIN}",
        "  set   /backup/vm",
        "  point  state       libvirt  bitmaps",
        "  p1     superseded  knows    vda, vdb",
        "  p2     base        knows    vda, vdb inconsistent",
        "  p3     elsewhere   knows    none",
        "  elsewhere: the base of another copy of its set; left alone",
        f"  next increment reads vdb whole: bitmap {BASE} in image /img/vdb is inconsistent",
        "",
        "chains that are not known here (--drop removes them):",
        "  point        state    libvirt  bitmaps",
        "  77777777 p9  unknown  -        vda, vdb",
        "",
        "checkpoints and bitmaps of other programs, left alone: 1",
        "",
        "to do, by --repair or by the next backup into the set:",
        f"  remove {OLD} (vda, vdb): a newer point of its chain is the base",
        f"  remove {BASE} (vdb): inconsistent",
    ]


def test_a_domain_that_runs_and_is_busy() -> None:
    lines = render(replace(report(active=True), holder="process 7 (backup of vm1)")).splitlines()
    assert lines[0] == "domain vm1 (u), running"
    assert lines[1].startswith("busy: process 7 (backup of vm1)")
    assert "  p2     base        knows    vda, vdb" in lines
    assert "  p1     superseded  knows    in QEMU" in lines


def test_a_set_that_is_away() -> None:
    lines = render(report(whole=False)).splitlines()
    assert "        not readable: there is no set /backup/vm" in lines
    assert "  unsure: its set is not at hand; left alone" in lines
    assert lines[-1] == "nothing to do"


def test_what_was_done() -> None:
    seen = report()
    steps = (seen.steps[0], Done(seen.steps[1].step, "the image is in use"))
    done = replace(seen, changed=True, steps=steps)
    assert render(done).splitlines() == [
        f"done: remove {OLD} (vda, vdb): a newer point of its chain is the base",
        f"NOT done: remove {BASE} (vdb): inconsistent",
        "  the image is in use",
    ]
    assert done.problems == (f"{BASE}: the image is in use",)
    assert render(replace(done, steps=())) == "nothing to do"


def test_nothing() -> None:
    none = reconcile(View(is_active=False, checkpoints=frozenset(), disks={}), [])
    empty = replace(report(), chains=(), plan=none, steps=())
    assert render(empty).splitlines() == [
        "domain vm1 (u), off",
        "no checkpoints of ours",
        "",
        "nothing to do",
    ]
