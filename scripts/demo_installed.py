"""The body of scripts/demo where the packages are installed: systemd, libvirtd, the hook at work.

A guest without an operating system; it "writes" through its own disk devices, by QEMU's monitor.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.demo_show import DISK_SIZE, DISKS, DemoError, Reference, Show, parse, tell
from tests.lab.command import run
from tests.lab.disks import MIB, DiskSpec
from tests.lab.domain_xml import DomainSpec, domain_xml

NAME = "nbdbackup-demo"
UUID = "0d2f6a3e-5c1b-4f7a-9a5d-3b8e6c41f0a7"
UNIT = r"nbdbackup@nbdbackup\x2ddemo"
STATE = Path("/var/lib/nbdbackup")
RUNTIME = Path("/run/nbdbackup")
WORK = STATE / "demo"
IMAGES = Path("/var/lib/libvirt/images")
SETTINGS = Path("/etc/nbdbackup/domains.d/nbdbackup-demo.yaml")
YAML = f"""\
match: {{name: {NAME}}}
repository: {{path: {WORK}/repository}}
schedule: {{calendar: daily}}
on_shutdown: yes
"""
HOOK_TIMEOUT_SECONDS = 60.0


class Demo(Show):
    """One run of the demo; ``close`` removes all of it."""

    def __init__(self) -> None:
        super().__init__({"WORK": str(WORK)})
        self.images = {target: IMAGES / f"{NAME}-{target}.qcow2" for target in DISKS}

    def run(self) -> None:
        """Tell the whole story; raises ``DemoError`` or ``LabError`` where it breaks."""
        self.make_guest()
        self.configure()
        self.full_backup()
        self.increment()
        self.end_of_the_guest()
        points = self.list_points()
        self.restore(points)

    def close(self) -> None:
        """Remove what a demo has made, this one or one that was killed."""
        quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 100}
        for words in (
            ("systemctl", "disable", "--now", f"{UNIT}.timer"),
            ("systemctl", "stop", f"{UNIT}.service"),
            ("virsh", "destroy", NAME),
        ):
            subprocess.run(words, check=False, **quiet)  # type: ignore[call-overload]
        # the hook has begun a backup of the guest's end
        offline = UNIT.replace("nbdbackup@", "nbdbackup-offline@")
        checkpoints = UNIT.replace("nbdbackup@", "nbdbackup-checkpoints@")
        for words in (
            ("systemctl", "stop", f"{offline}.service", f"{checkpoints}.service"),
            ("systemctl", "stop", "nbdbackup-notify@*@nbdbackup?x2ddemo.*"),
            ("virsh", "undefine", "--checkpoints-metadata", NAME),
        ):
            subprocess.run(words, check=False, **quiet)  # type: ignore[call-overload]
        for image in self.images.values():
            image.unlink(missing_ok=True)
        SETTINGS.unlink(missing_ok=True)
        for directory in (WORK, STATE / "state" / UUID, RUNTIME / UUID):
            shutil.rmtree(directory, ignore_errors=True)
        # how its runs ended, whom to tell of them; what is kept of its XML
        for directory in (STATE / "state", RUNTIME):
            for file in directory.glob(f"*/{NAME}.*"):
                file.unlink(missing_ok=True)
        subprocess.run(("systemctl", "daemon-reload"), check=False, **quiet)  # type: ignore[call-overload]

    # -- the story

    def make_guest(self) -> None:
        """Define and start a guest with data on its disks."""
        self.step("A guest with two disks of 256 MiB, running under this host's libvirt")
        self.say(f"WORK='{WORK}'")
        WORK.mkdir(parents=True)
        for image in self.images.values():
            run(["qemu-img", "create", "-q", "-f", "qcow2", image, f"{DISK_SIZE}"])
        disks = [(DiskSpec(target=target), path) for target, path in self.images.items()]
        xml = domain_xml(DomainSpec(name=NAME, uuid=UUID, disks=disks))
        self.run_command(["virsh"], ["define", "/dev/stdin"], stdin=xml)
        self.shown("virsh", "start", NAME)
        self.write("vda", f"write -P 0x41 0 {32 * MIB}")
        self.write("vda", f"write -P 0x42 {64 * MIB} {32 * MIB}")
        self.write("vdb", f"write -P 0x43 {100 * MIB} {16 * MIB}")
        self.note("the guest wrote 64 MiB to vda and 16 MiB to vdb")

    def configure(self) -> None:
        """Write the file for this domain and switch its timer on."""
        self.step("A file of YAML says how it is backed up, a timer when")
        self.say(f"$ cat {SETTINGS}")
        for line in YAML.splitlines():
            print(f"     {line.replace(str(WORK), '$WORK')}")
        SETTINGS.write_text(YAML.replace("$WORK", str(WORK)))
        self.shown("nbdbackupctl", "config", "check")
        self.shown("systemctl", "daemon-reload")
        self.shown("systemctl", "enable", "--now", f"{UNIT}.timer")
        self.shown("nbdbackupctl", "timers")

    def full_backup(self) -> None:
        """Save everything, as the timer would."""
        self.step("The timer's service, started now: a full backup while the guest runs")
        self.take_reference("full")
        self.shown("systemctl", "start", f"{UNIT}.service")
        self.shown("nbdbackupctl", "log", NAME)

    def increment(self) -> None:
        """Change, zero and discard, then save what changed."""
        self.step("The guest writes, zeroes and discards; an increment saves just that")
        self.write("vda", f"write -P 0x61 {10 * MIB} {2 * MIB}")
        self.write("vdb", f"write -P 0x62 0 {MIB}")
        self.write("vda", f"write -z -u {64 * MIB} {4 * MIB}")
        self.write("vdb", f"discard {100 * MIB} {8 * MIB}")
        self.note("3 MiB of new data, 4 MiB zeroed, 8 MiB discarded")
        self.take_reference("increment")
        self.shown("systemctl", "start", f"{UNIT}.service")
        self.expect_data("inc", 3 * MIB)

    def end_of_the_guest(self) -> None:
        """Switch it off: the hook has it backed up once more."""
        self.step("The guest ends; libvirt's hook has its last changes saved while it is off")
        self.write("vdb", f"write -P 0x63 {40 * MIB} {5 * MIB}")
        self.note("5 MiB of new data")
        self.take_reference("end of the guest")
        self.shown("virsh", "destroy", NAME)
        deadline = time.monotonic() + HOOK_TIMEOUT_SECONDS
        while len(self.points()) < len(self.references):
            if time.monotonic() > deadline:
                raise DemoError("the hook's backup has not come")
            time.sleep(0.2)
        self.expect_data("inc", 5 * MIB)

    def list_points(self) -> list[str]:
        """Show the restore points and return their ids, oldest first."""
        self.step("What there is")
        self.shown("nbdbackupctl", "list", NAME)
        self.shown("nbdbackupctl", "status", NAME)
        self.shown("nbdbackupctl", "verify", NAME)
        points = self.points()
        if len(points) != len(self.references):
            raise DemoError(f"{len(points)} points listed, {len(self.references)} made")
        return [point["id"] for point in points]

    def restore(self, points: list[str]) -> None:
        """Restore each point and compare it with its reference."""
        self.step("Each point is restored and compared with the disks as they were")
        for point, reference in zip(points, self.references, strict=True):
            out = WORK / "restored"
            words = ("restore", NAME, "-o", out, "--point", point, "--json")
            report = parse(self.run_command(["nbdbackupctl"], words, show=True))
            images = {disk["target"]: out / disk["path"] for disk in report["disks"]}
            for name in DISKS:
                self.compare(reference, name, images[name])
            shutil.rmtree(out)

    # -- its parts

    def shown(self, program: str, *words: str) -> None:
        """Run and show one command with its output."""
        self.show_output(self.run_command([program], words, show=True))

    def monitor(self, *words: str) -> str:
        """Ask the guest's QEMU."""
        return self.run_command(["virsh"], ["--quiet", "qemu-monitor-command", NAME, *words]).stdout

    def write(self, target: str, request: str) -> None:
        """Send a request through the guest's own disk device."""
        document = self.monitor(json.dumps({"execute": "query-block"}))
        node = str(self.images[target])
        device = next(
            each["qdev"]
            for each in json.loads(document)["return"]
            if each.get("inserted", {}).get("image", {}).get("filename") == node
        )
        said = self.monitor("--hmp", f'qemu-io -d {device} "{request}"').strip()
        if said:
            raise DemoError(f"{request}: {said}")

    def take_reference(self, what: str) -> None:
        """Copy both disks with qemu-img while the guest is held, to compare with later."""
        number = len(self.references)
        images = {}
        run(["virsh", "suspend", NAME])
        for name, image in self.images.items():
            images[name] = WORK / f"reference-{number}-{name}.raw"
            run(["qemu-img", "convert", "-U", "-O", "raw", image, images[name]])
        run(["virsh", "resume", NAME])
        self.references.append(Reference(what=what, images=images))

    def points(self) -> list[dict[str, Any]]:
        """Return the restore points, oldest first."""
        done = parse(self.run_command(["nbdbackupctl"], ["list", NAME, "--json"]))
        return [point for each in done["sets"] for point in each["points"]]

    def expect_data(self, level: str, size: int) -> None:
        """Raise ``DemoError`` unless the newest point holds just so many bytes of data."""
        point = self.points()[-1]
        found = sum(disk["data_bytes"] for disk in point["disks"])
        if (point["level"], found) != (level, size):
            raise DemoError(f"level {point['level']} with {found} bytes, not {level} with {size}")
        self.note(f"{level}: {size // MIB} MiB of data, no more")


def installed() -> None:
    """Tell the story on this host; raises ``DemoError`` or ``LabError``."""
    with contextlib.ExitStack() as stack:
        demo = Demo()
        remove: Callable[[], None] = demo.close
        remove()
        stack.callback(remove)
        demo.run()
    print("\nThe guest, its images and its backups are gone; the packages stay.")
    print("To remove them: apt-get purge nbdbackupd nbdbackup-restore")


if __name__ == "__main__":
    story = "The packages back up a guest of this host: by systemd, by YAML, and at its end."
    sys.exit(tell(story, installed))
