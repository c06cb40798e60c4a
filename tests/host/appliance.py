"""The installed appliance in a host of the container lab, and guests that it protects."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nbdbackupd.model import unitname
from tests.lab.agent_guest import make_ext4
from tests.lab.command import run
from tests.lab.host import Host
from tests.lab.hostguest import HostGuest
from tests.lab.hostlab import SHARED, HostLab
from tests.lab.process import wait_until

IMAGES = "/var/lib/libvirt/images"
CONFIGURATION = "/etc/nbdbackup"
RUN_SECONDS = 60.0
DATA_MIB = 32
NEWER = "9.0"
PUNCTUAL = "[Timer]\nAccuracySec=100ms\n"  # a minute, else
BOOT_ID = "/proc/sys/kernel/random/boot_id"
OWN_PROC = "[Service]\nProtectControlGroups=no\nProtectKernelTunables=no\n"


def service(name: str, kind: str = "nbdbackup") -> str:
    """Name the service of a domain."""
    return unitname.unit(kind, name, "service")


def data(*points: dict[str, Any]) -> int:
    """Bytes that points hold as data of the disk that tests write to."""
    return sum(
        disk["data_bytes"] for each in points for disk in each["disks"] if disk["target"] == "vdb"
    )


class Appliance:
    """A host that has the packages."""

    def __init__(self, lab: HostLab, host: Host, packages: Iterable[Path]) -> None:
        """Install them as the manual says, with their dependencies; raises ``LabError``."""
        self.lab = lab
        self.host = host
        host.apt("update")
        self.install(packages)
        # as the package says: it had no hooks when it started
        host.run("systemctl", "start", "nbdbackup-load-hook")
        host.write("/etc/systemd/system/nbdbackup@.timer.d/lab.conf", PUNCTUAL)
        # systemd 252 hides what a container has for its own from such units: they would see the id
        # of the machine below, and so the same one at each boot
        if host.unit("cat", BOOT_ID, properties=["ProtectKernelTunables=yes"]) != host.run(
            "cat", BOOT_ID
        ):
            for kind in ("@", "-offline@", "-notify@", "-pending"):
                host.write(f"/etc/systemd/system/nbdbackup{kind}.service.d/lab.conf", OWN_PROC)
        host.run("systemctl", "daemon-reload")

    def install(self, packages: Iterable[Path]) -> str:
        """Give them to apt, and return what it says."""
        paths = list(packages)
        for path in paths:
            self.host.copy_in(path, "/root")
        options = ("--reinstall", "--allow-downgrades")
        return self.host.apt("install", *options, *(f"/root/{path.name}" for path in paths))

    def configure(self, name: str, **settings: Any) -> None:
        """Write the file for one domain; section and key are parted by two underscores."""
        document: dict[str, Any] = {"match": {"name": name}}
        for key, value in settings.items():
            section, _, last = key.rpartition("__")
            (document.setdefault(section, {}) if section else document)[last] = value
        path = f"{CONFIGURATION}/domains.d/{unitname.escape(name)}.yaml"
        # JSON is YAML
        self.host.write(path, json.dumps(document, indent=1) + "\n")
        done = self.host.call("nbdbackupctl", "config", "check")
        # files of other tests name domains that are gone
        assert done.returncode in (0, 3), done
        assert b"sound" in done.stdout

    def ctl(self, *words: str) -> str:
        """Run the command as an administrator does; raises ``LabError`` if it fails."""
        return self.host.run("nbdbackupctl", *words, timeout_seconds=RUN_SECONDS)

    def json(self, *words: str) -> Any:
        """Run the command and return its document."""
        return json.loads(self.ctl(words[0], "--json", *words[1:]))

    def points(self, name: str) -> list[dict[str, Any]]:
        """Return the points of a domain, of all sets, oldest first."""
        done = self.host.call("nbdbackupctl", "list", "--json", "--", name)
        # a repository is made by the first run
        none = (b"neither a directory nor a domain with sets", b"there is no repository")
        if any(each in done.stderr for each in none):
            return []
        assert done.returncode == 0, done
        return [point for each in json.loads(done.stdout)["sets"] for point in each["points"]]

    def levels(self, name: str) -> list[str]:
        """Return the levels of a domain's points."""
        return [point["level"] for point in self.points(name)]

    def wait_points(self, name: str, number: int) -> list[dict[str, Any]]:
        """Wait until there are so many points and no run, and return them."""

        def there() -> bool:
            return len(self.points(name)) >= number and self.is_idle()

        wait_until(there, f"{number} points of {name}", RUN_SECONDS)
        return self.points(name)

    def is_idle(self) -> bool:
        """Say whether no unit of ours is at work or about to be."""
        units = self.host.run("systemctl", "list-units", "--plain", "--no-legend",
                              "--state=activating,deactivating", "nbdbackup*.service")  # fmt: skip
        jobs = self.host.run("systemctl", "list-jobs", "--plain", "--no-legend", "nbdbackup*")
        return not units.strip() and "nbdbackup" not in jobs

    def failed(self) -> list[str]:
        """Return the units of ours that have failed."""
        told = self.host.run("systemctl", "list-units", "--plain", "--no-legend",
                             "--state=failed", "nbdbackup*")  # fmt: skip
        return [line.split()[0] for line in told.splitlines()]

    def save(self, name: str) -> dict[str, Any]:
        """Start the service as the timer does, and return the point that it has made."""
        before = len(self.points(name))
        self.host.run("systemctl", "start", service(name), timeout_seconds=RUN_SECONDS)
        points = self.points(name)
        assert len(points) == before + 1
        return points[-1]

    def begin(self, protected: "Protected", mib: int = 8) -> None:
        """Have a slow run at work on so much that has changed, a megabyte a second."""
        name = protected.name
        self.configure(name, limits__bandwidth="1M")
        protected.change(mib)
        reading = "MESSAGE=disk vdb: reading changes"
        before = len(self.events(name, reading))
        self.host.run("systemctl", "start", "--no-block", service(name))
        wait_until(lambda: len(self.events(name, reading)) > before, "the run", RUN_SECONDS)
        self.configure(name)

    def assert_nothing_is_left(self, name: str) -> None:
        """The guest runs on, without a job, an export or a scratch file of ours."""
        assert self.host.run("virsh", "domstate", "--", name) == "running\n\n"
        assert "None" in self.host.run("virsh", "domjobinfo", "--", name)
        jobs = ("virsh", "qemu-monitor-command", "--", name, '{"execute": "query-block-jobs"}')
        assert json.loads(self.host.run(*jobs))["return"] == []
        exports = (
            "virsh",
            "qemu-monitor-command",
            "--",
            name,
            '{"execute": "query-block-exports"}',
        )
        assert json.loads(self.host.run(*exports))["return"] == []
        assert self.host.run("find", "/var/lib/nbdbackup/scratch", "-type", "f") == ""

    def events(self, name: str, *matches: str) -> list[dict[str, Any]]:
        """Return what the journal knows of a domain, oldest first."""
        return self.host.journal(f"NBDBACKUP_DOMAIN={name}", *matches)


class Protected:
    """A guest with a mounted disk, ``vda``, and one of plain data, ``vdb``.

    ``vdb`` changes only when a test says so: it can be compared bit by bit with a point that was
    made while the guest ran, and a mounted file system, which is frozen and thawed, can't.
    """

    def __init__(
        self, appliance: Appliance, name: str, directory: str = IMAGES, *, iothreads: int = 0
    ) -> None:
        """Define it (not started); raises ``LabError``."""
        self.appliance = appliance
        self.name = name
        self.images = {target: f"{directory}/{name}-{target}.qcow2" for target in ("vda", "vdb")}
        host, here = appliance.host, appliance.lab.directory
        file_system = make_ext4(here / f"{name}-vda.qcow2")
        if directory == SHARED:
            file_system.rename(appliance.lab.shared / file_system.name)
        else:
            host.copy_in(file_system, directory)
            file_system.unlink()
        host.run("qemu-img", "create", "-q", "-f", "qcow2", self.images["vdb"], f"{DATA_MIB}M")
        self.guest = HostGuest(host, name, self.images, iothreads=iothreads)
        self.references: dict[str, dict[str, str]] = {}
        self._writes = 0

    @property
    def host(self) -> Host:
        """Return the host where it is."""
        return self.guest.host

    def change(self, mib: int = 1) -> None:
        """Write random data to ``vdb`` and a file to ``vda``, and have both on the disks."""
        at = self._writes % (DATA_MIB - mib)
        self._writes += mib
        self.guest.exec(
            f"dd if=/dev/urandom of=/dev/vdb bs=1M seek={at} count={mib} conv=fsync,notrunc"
            f" 2>/dev/null && echo {self._writes} >/mnt/vda/writes && sync"
        )

    def digests(self) -> dict[str, str]:
        """Return sums of what the guest sees on its disks now, read by qemu-img.

        Of ``vdb`` only if the guest runs; it is held meanwhile.
        """
        running = self.guest.state() == "running"
        if running:
            self.guest.virsh("suspend", "--", self.name)
        try:
            return {
                target: self._digest(path)
                for target, path in self.images.items()
                if target == "vdb" or not running
            }
        finally:
            if running:
                self.guest.virsh("resume", "--", self.name)

    def _digest(self, path: str) -> str:
        copy = "/var/tmp/reference.raw"
        self.host.run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, copy)
        digest = self.host.run("sha256sum", copy).split()[0]
        self.host.run("rm", copy)
        return digest

    def note(self, point: Mapping[str, Any]) -> None:
        """Take what is on the disks now as what the point must hold."""
        self.references[point["id"]] = self.digests()

    def prove(self, appliance: Appliance | None = None) -> None:
        """Restore every point of a reference: disks are equal, file systems are clean."""
        appliance = appliance or self.appliance
        assert self.references
        for point, wanted in self.references.items():
            directory = f"/var/tmp/restored-{point}"
            words = ("--point", point, "--format", "raw", "-o", directory)
            report = appliance.json("restore", *words, "--", self.name)
            paths = {disk["target"]: disk["path"] for disk in report["disks"]}
            assert sorted(paths) == ["vda", "vdb"]
            for target, digest in wanted.items():
                found = appliance.host.run("sh", "-c", 'sha256sum <"$1"', "-", paths[target])
                assert found.split()[0] == digest, f"{target} of {point}: {paths[target]}"
            copy = appliance.host.copy_out(paths["vda"], appliance.lab.directory)
            run(["e2fsck", "-f", "-n", copy])
            copy.unlink()
            appliance.host.run("rm", "-r", directory)
        assert appliance.json("verify", "--", self.name)["sound"]
