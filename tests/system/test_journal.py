"""Records in a real journal: what systemd-journald keeps, and what journalctl makes of it."""

import json
import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from nbdbackupd import events
from tests.lab.daemon import DaemonLab
from tests.lab.disks import MIB, DiskSpec
from tests.lab.guest import Guest, GuestOptions
from tests.lib.pages import TOP
from tests.lib.scene import scene
from tests.lib.sets import SetBuilder

pytestmark = pytest.mark.system
TWO = (DiskSpec(target="vda", size=8 * MIB), DiskSpec(target="vdb", size=8 * MIB))

CATALOG: Final = TOP / "packaging/common/nbdbackup.catalog"
PRIVATE: Final = TOP / "tests/lab/private-journald"

# systemd sets JOURNAL_STREAM for services; systemd-cat does so only since version 254 or so
AS_SERVICE: Final = (
    "exec systemd-cat -t nbdbackupctl sh -c 'JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2);"
    ' export JOURNAL_STREAM; exec "$@"\' - "$@"'
)


@dataclass(frozen=True)
class Step:
    """A command in the journal's namespace; ``as_service``: its output goes to the journal."""

    argv: Sequence[str]
    as_service: bool = False


def play(tmp_path: Path, *steps: Step) -> list[tuple[int, str]]:
    """Run commands one after the other beside one journald; their statuses and outputs."""
    script = [
        "import json, subprocess, sys",
        "found = []",
        "for argv in json.load(sys.stdin):",
        "    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,",
        "        timeout=100)",
        "    subprocess.run(['journalctl', '--sync'], check=True, capture_output=True, timeout=60)",
        "    found.append((done.returncode, done.stdout + done.stderr))",
        "json.dump(found, open(sys.argv[1], 'w'))",
    ]
    argvs = [
        ["sh", "-c", AS_SERVICE, "-", *step.argv] if step.as_service else list(step.argv)
        for step in steps
    ]
    result = tmp_path / "steps.json"
    done = subprocess.run(
        [PRIVATE, CATALOG, sys.executable, "-c", "\n".join(script), result],
        input=json.dumps(argvs), capture_output=True, text=True, timeout=110, check=False, cwd=TOP,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(code, text) for code, text in json.loads(result.read_text())]


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


JSON: Final = ("journalctl", "--no-pager", "--all", "-o", "json")


def remove_bitmap(guest: Guest, target: str, name: str) -> None:
    """Remove a bitmap behind libvirt's back."""
    image = str(guest.image(target))
    node = next(
        node["node-name"]
        for node in guest.qmp("query-named-block-nodes")
        if node["file"] == image and node["drv"] == "qcow2"
    )
    guest.qmp("block-dirty-bitmap-remove", {"node": node, "name": name})


def ours(record: dict[str, Any]) -> dict[str, str]:
    """The fields of ours in a record, without their prefix."""
    return {
        name.removeprefix("NBDBACKUP_"): value
        for name, value in record.items()
        if name.startswith("NBDBACKUP_")
    }


def test_a_run_in_the_journal(lab: DaemonLab, tmp_path: Path) -> None:
    """An increment that reads one disk in full, and a run that fails, told by journalctl."""
    with scene(lab, tmp_path, "journal", TWO, GuestOptions(uuid=str(uuid.uuid4()))) as here:
        full = here.save()
        remove_bitmap(here.guest, "vdb", full.point["checkpoint"])
        name, ctl = here.guest.name, here.ctl
        found = play(
            tmp_path,
            Step(ctl.argv("backup", name, "-o", here.set), as_service=True),
            Step(ctl.argv("backup", "no such", "-o", here.set), as_service=True),
            Step((*JSON, f"MESSAGE_ID={events.DISK_DEMOTED.id}")),
            Step((*JSON, f"NBDBACKUP_DOMAIN={name}")),
            Step((*JSON, f"MESSAGE_ID={events.BACKUP_FAILED.id}")),
            Step(("journalctl", "--no-pager", "-x", f"MESSAGE_ID={events.DISK_DEMOTED.id}")),
            Step(ctl.argv("log", name, "--json")),
            Step(ctl.argv("log", name)),
            Step(ctl.argv("log", "-n", "1")),
            Step(ctl.argv("log", "--since", "sometime")),
            Step((*JSON, "-p", "err")),
        )
        point = here.ctl.points(here.set)[-1]
    assert [code for code, _ in found] == [3, 20, 0, 0, 0, 0, 0, 0, 0, 2, 0], found
    texts = [text for _, text in found]

    (demoted,) = records(texts[2])
    reason = next(disk["reason"] for disk in point["disks"] if disk["target"] == "vdb")
    assert reason
    assert demoted["PRIORITY"] == "4"
    assert demoted["SYSLOG_IDENTIFIER"] == "nbdbackupctl"
    assert demoted["_TRANSPORT"] == "journal"
    assert ours(demoted) == {
        "DOMAIN": name, "UUID": point["uuid"], "RUN": point["id"], "SET": os.fspath(here.set),
        "DISK": "vdb", "REASON": reason,
    }  # fmt: skip

    run = records(texts[3])
    ids = [each.get("MESSAGE_ID") for each in run]
    assert ids[0] == events.BACKUP_STARTED.id
    assert ids[-1] == events.BACKUP_WARNED.id
    assert {events.CHECKPOINT_REMOVED.id, events.DISK_DEMOTED.id} < set(ids)
    assert {each["NBDBACKUP_RUN"] for each in run} == {point["id"]}
    warned = ours(run[-1])
    assert (warned["POINT"], warned["LEVEL"]) == (point["id"], "inc")
    assert warned["CHECKPOINT"] == point["checkpoint"]
    files = [*here.set.glob(f"*{point['id']}*.data"), *here.set.glob(f"*{point['id']}*.index")]
    assert len(files) == 4
    assert int(warned["BYTES"]) == sum(each.stat().st_size for each in files)
    assert 0 < int(warned["DURATION_USEC"]) < 100_000_000

    (failed,) = records(texts[4])
    assert (failed["PRIORITY"], failed["NBDBACKUP_DOMAIN"]) == ("3", "no such")
    # W-9: a failure is told once
    assert [each["MESSAGE"] for each in records(texts[10])] == [failed["MESSAGE"]]

    assert "Defined-By: nbdbackupd" in texts[5]
    explained = " ".join(texts[5].replace("\N{LIGHT SHADE}", "").split())
    assert f"'nbdbackupctl checkpoints {name}'" in explained

    entries = json.loads(texts[6])["entries"]
    assert [each["event"] for each in entries if each["event"]] == [
        next(event.name for event in events.ALL if event.id == each) for each in ids if each
    ]
    assert entries[-1]["fields"]["point"] == point["id"]
    assert f"warning   {name}  disk vdb is read in full: {reason}" in texts[7]
    assert len(texts[8].splitlines()) == 1
    assert "does not understand --since sometime" in texts[9]


def test_following(tmp_path: Path) -> None:
    """What comes while the command waits is shown at once; SIGTERM ends it, successfully."""
    entry, out = tmp_path / "entry", tmp_path / "out"
    entry.write_text(
        f"MESSAGE=hello\nMESSAGE_ID={events.BACKUP_STARTED.id}\nPRIORITY=6\n"
        "NBDBACKUP_DOMAIN=vm x\nNBDBACKUP_LEVEL=inc\n"
    )
    log = shlex.join([sys.executable, "-m", "nbdbackupd", "log", "--follow", "--json", "vm x"])
    script = (
        f"{log} >{out} & sleep 2; logger --journald <{entry}; n=0;"
        f" until [ -s {out} ] || [ $((n += 1)) -gt 300 ]; do sleep 0.1; done;"
        " kill -TERM $!; wait $!"
    )
    (done,) = play(tmp_path, Step(["sh", "-c", script]))
    assert done == (0, "")
    (line,) = out.read_text().splitlines()
    shown = json.loads(line)
    assert (shown["message"], shown["event"]) == ("hello", "backup-started")
    assert shown["fields"] == {"domain": "vm x", "level": "inc"}


def test_verify_and_restore_in_the_journal(tmp_path: Path) -> None:
    """Sound, restored; then a byte is damaged, and both say so."""
    made = SetBuilder(tmp_path / "set", disks={"vda": bytearray(b"some bytes " * 20000)})
    made.full()
    (stream,) = made.path.glob("vda*.data")
    damage = f"printf X | dd of={shlex.quote(str(stream))} bs=1 seek=9000 conv=notrunc"
    ctl = [sys.executable, "-m", "nbdbackupd"]
    restore = [*ctl, "restore", str(made.path), "-o"]
    ids = [
        events.VERIFY_SOUND.id, events.RESTORE_DONE.id,
        events.VERIFY_DAMAGED.id, events.RESTORE_FAILED.id,
    ]  # fmt: skip
    *found, (code, text) = play(
        tmp_path,
        Step([*ctl, "verify", str(made.path)], as_service=True),
        Step([*restore, str(tmp_path / "one")], as_service=True),
        Step(["sh", "-c", damage]),
        Step([*ctl, "verify", str(made.path)], as_service=True),
        Step([*restore, str(tmp_path / "two")], as_service=True),
        Step((*JSON, *(f"MESSAGE_ID={each}" for each in ids))),
    )
    # 3: this set has no XML of its domain
    assert [code for code, _ in found] == [0, 3, 0, 40, 40], found
    assert code == 0
    told = records(text)
    assert [each["MESSAGE_ID"] for each in told] == ids
    sound, restored, damaged, failed = map(ours, told)
    assert {each["SET"] for each in (sound, restored, damaged, failed)} == {str(made.path)}
    assert (restored["POINT"], restored["DOMAIN"]) == ("point1", "vm1")
    assert stream.name in damaged["REASON"]
    assert "vda" in failed["REASON"]
    assert told[2]["PRIORITY"] == "2"


def test_without_the_python_package_of_systemd(tmp_path: Path) -> None:
    """Lines with their priorities, and who wrote them; no fields."""
    stub = tmp_path / "stub/systemd"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('not installed')\n")
    ctl = ["env", f"PYTHONPATH={stub.parent}", sys.executable, "-m", "nbdbackupd"]
    (tmp_path / "set/points").mkdir(parents=True)
    (tmp_path / "set/points/000001-x.json").write_text("{}")
    *found, (_, text), (_, shown) = play(
        tmp_path,
        Step([*ctl, "verify", str(tmp_path / "set")], as_service=True),
        Step([*ctl, "verify", str(tmp_path / "none")], as_service=True),
        Step((*JSON, "SYSLOG_IDENTIFIER=nbdbackupctl")),
        Step([*ctl, "log"]),
    )
    assert [code for code, _ in found] == [40, 50]
    lines = {each["MESSAGE"]: each["PRIORITY"] for each in records(text)}
    assert all(each["_TRANSPORT"] == "stdout" for each in records(text))
    told = next(line for line in lines if line.startswith(f"backup set {tmp_path / 'set'} is dam"))
    assert lines[told] == "2"
    ended = next(line for line in lines if str(tmp_path / "none") in line)
    assert lines[ended] == "3"
    assert f"critical  {told}" in shown
