"""A throwaway machine: systemd as process 1 of a container, on an overlay of a clean root.

systemd-nspawn boots it.  It has a network, a journal, a libvirt and a host UUID of its own; of
the machine below it shares the kernel only.  Known limits: where no cgroup 2 controllers are to
be had, limits such as MemoryMax= are accepted and do nothing, and libvirt makes no machine scopes;
there is no udev, no AppArmor, no /dev/kvm.
"""

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import cgroup
from tests.lab.command import DEFAULT_TIMEOUT_SECONDS, LabError
from tests.lab.ground import BRIDGE, Ground, children
from tests.lab.process import KILL_TIMEOUT_SECONDS, ProcessHandle, wait_until

BOOT_TIMEOUT_SECONDS = 90.0
POWEROFF_TIMEOUT_SECONDS = 120.0  # longer than systemd waits for a service
APT_TIMEOUT_SECONDS = 600.0
DEVICES = ("/dev/fuse", "/dev/net/tun", "/dev/loop-control", *(f"/dev/loop{n}" for n in range(8)))
# the clock and the modules are those of the machine below
WITHHELD = "CAP_SYS_MODULE,CAP_SYS_TIME"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSpec:
    """What a host is before its first boot."""

    name: str  # also in the network
    address: str  # IPv4, in a network of 24 bits
    root: Path  # lower layer, never written to
    directory: Path  # for upper layer and console; "upper" may hold files already
    group: str  # control group
    binds: Mapping[str, Path]  # path in the host -> file or directory outside, to be written to
    readonly_binds: Mapping[str, Path]


class Host:
    """One host; ``HostLab.host`` makes it and ends it."""

    def __init__(self, ground: Ground, spec: HostSpec) -> None:
        """Lay its disk and its network; ``boot`` starts it.  Raises ``LabError``."""
        self.spec = spec
        self._ground = ground
        self._tree = Path("/run/hosts") / spec.name
        self._process: subprocess.Popen[bytes] | None = None
        self._leader: ProcessHandle | None = None
        self._lay_disk()
        self._lay_network()

    @property
    def name(self) -> str:
        """Return the host's name, for itself and in the network."""
        return self.spec.name

    @property
    def is_running(self) -> bool:
        """Say whether the host is on."""
        return self._leader is not None and self._leader.is_running()

    @property
    def leader(self) -> int:
        """Return the pid, as seen outside, of the host's process 1; raises ``LabError``."""
        if self._leader is None or not self._leader.is_running():
            raise LabError(f"{self.name} is off")
        return self._leader.pid

    def boot(self) -> None:
        """Switch the host on and wait until systemd has started all; raises ``LabError``."""
        if self._process is not None:
            raise LabError(f"{self.name} is on already")
        with self._console_log.open("ab") as log:
            self._process = subprocess.Popen(
                [*cgroup.enter_words(self.spec.group), *self._ground.launcher, *self._nspawn()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._find_leader, f"process 1 of {self.name}", BOOT_TIMEOUT_SECONDS)
            wait_until(self._has_booted, f"boot of {self.name}", BOOT_TIMEOUT_SECONDS)
        except LabError as err:
            self.crash()
            raise LabError(f"{err}: {self.console()[-2000:]}") from err

    def crash(self) -> None:
        """Cut the power: all processes die at once, the disk stays as it is."""
        process = self._process
        if process is None:
            return
        if self._leader is not None:
            self._leader.kill()
        else:
            process.kill()  # so early there is no process 1 yet
        self._wait_off(KILL_TIMEOUT_SECONDS)

    def poweroff(self) -> None:
        """Shut the host down in order; raises ``LabError`` when it takes too long."""
        self.run("systemctl", "poweroff")
        self._wait_off(POWEROFF_TIMEOUT_SECONDS)

    def close(self) -> None:
        """Switch off and leave nothing but the directory; safe to call twice."""
        self.crash()

    def argv(self, *words: str, outer_network: bool = False) -> list[str]:
        """Return the command that runs ``words`` inside, as root in /, in a clean environment.

        With ``outer_network`` it has the network of the machine below, nothing else of it.  It
        ends with its parent here.  Raises ``LabError`` when the host is off.
        """
        namespaces = ["--mount", "--uts", "--ipc", "--pid", "--cgroup"]
        if not outer_network:
            namespaces.append("--net")
        settings = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        # "nsenter" forks; when a deadline kills it, the command must not run on
        bound = ["setpriv", "--pdeathsig", "KILL", "--"]
        # "env -C" and not "nsenter --wd": that one opens the directory before it enters
        clean = ["env", "-i", "-C", "/", *settings]
        return ["nsenter", f"--target={self.leader}", *namespaces, "--", *bound, *clean, *words]

    def call(
        self,
        *words: str,
        stdin: bytes = b"",
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        outer_network: bool = False,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command inside (see ``argv``); returns whatever its exit status is.

        Raises ``LabError`` when the host is off or the command takes too long.
        """
        argv = self.argv(*words, outer_network=outer_network)
        try:
            return subprocess.run(
                argv, input=stdin, capture_output=True, timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired as err:
            raise LabError(f"{self.name}: {words}: not done after {timeout_seconds} s") from err

    def run(
        self,
        *words: str,
        stdin: bytes = b"",
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> str:
        """Run a command inside and return its output; raises ``LabError`` if it fails."""
        done = self.call(*words, stdin=stdin, timeout_seconds=timeout_seconds)
        return self._output(words, done)

    def unit(
        self,
        *words: str,
        properties: Sequence[str] = (),
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> str:
        """Run a command as a transient service and return its output; raises ``LabError``.

        So it has the environment, the control group and the journal that services have.
        """
        options = ["--quiet", "--pipe", "--wait", "--collect", "--service-type=exec"]
        options += [f"--property={each}" for each in properties]
        return self.run("systemd-run", *options, "--", *words, timeout_seconds=timeout_seconds)

    def apt(self, *words: str) -> str:
        """Run apt-get inside, against the running system; raises ``LabError``.

        It alone has the network of the machine below.  Recommended packages are left out.
        """
        options = ["-q", "-y", "-o", "Dpkg::Use-Pty=0"]
        names = {"DEBIAN_FRONTEND": "noninteractive"}
        names |= {name: os.environ[name] for name in PROXIES if name in os.environ}
        settings = [f"{name}={value}" for name, value in names.items()]
        argv = ("env", *settings, "apt-get", *options, *words)
        done = self.call(*argv, timeout_seconds=APT_TIMEOUT_SECONDS, outer_network=True)
        return self._output(argv, done)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file inside, with the directories to it; raises ``LabError``."""
        self.run("install", "-D", "-m", f"{mode:o}", "/dev/stdin", path, stdin=text.encode())

    def copy_in(self, source: Path, directory: str) -> None:
        """Copy a file or a tree into a directory inside; it must fit into memory."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(source, source.name)
        owner = ["--no-same-owner", "--same-permissions"]
        self.run("tar", "-C", directory, *owner, "-xf", "-", stdin=buffer.getvalue())

    def copy_out(self, path: str, directory: Path) -> Path:
        """Copy a file or a tree out, into a directory; it must fit into memory."""
        parent, _, name = path.rpartition("/")
        words = ("tar", "-C", parent or "/", "-cf", "-", "--", name)
        done = self.call(*words)
        self._output(words, done)
        unpack = ["tar", "-C", os.fspath(directory), "--no-same-owner", "-xf", "-"]
        subprocess.run(unpack, input=done.stdout, timeout=DEFAULT_TIMEOUT_SECONDS, check=True)
        return directory / name

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Return the journal's entries of all boots that match, such as ``_UID=0`` or ``-b``."""
        lines = self.run("journalctl", "--no-pager", "--all", "-o", "json", *matches)
        return [json.loads(line) for line in lines.splitlines()]

    def set_link(self, *, up: bool) -> None:
        """Cut the host's network, or heal it."""
        self._ground.run("ip", "link", "set", self._port, "up" if up else "down")

    def console(self) -> str:
        """Return what the host has printed on its console, in all boots."""
        return self._console_log.read_text("utf-8", "replace")

    @property
    def _console_log(self) -> Path:
        return self.spec.directory / "console.log"

    @property
    def _port(self) -> str:
        """Return the host's interface on the bridge."""
        return f"p-{self.name}"

    def _lay_disk(self) -> None:
        layers = {
            "lowerdir": self.spec.root,
            "upperdir": self.spec.directory / "upper",
            "workdir": self.spec.directory / "work",
        }
        for path in layers.values():
            path.mkdir(exist_ok=True)
        places = [f"{key}={self._ground.outside(at)}" for key, at in layers.items()]
        # else its end would write the whole file system below to disk, for other programs, too;
        # a crash of the host keeps the kernel, and so what it has not written yet
        options = ",".join(["volatile", *places])
        self._ground.run("mkdir", self._tree)
        self._ground.run("mount", "-t", "overlay", "-o", options, self.name, self._tree)

    def _lay_network(self) -> None:
        ip, name = self._ground.run, self.name
        ip("ip", "netns", "add", name)
        ip("ip", "link", "add", self._port, "type", "veth", "peer", "eth0", "netns", name)
        ip("ip", "link", "set", self._port, "master", BRIDGE, "up")
        ip("ip", "-n", name, "address", "add", f"{self.spec.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("ip", "-n", name, "link", "set", device, "up")

    def _nspawn(self) -> list[str]:
        """Return the command that boots the host.

        It gets the control group that it is in (--keep-unit) and talks to no systemd outside.
        """
        present = [device for device in DEVICES if Path(device).exists()]
        binds = [f"--bind={device}" for device in present]
        for option, paths in (
            ("bind", self.spec.binds),
            ("bind-ro", self.spec.readonly_binds),
        ):
            for inside, outside in paths.items():
                binds.append(f"--{option}={self._ground.outside(outside)}:{inside}")
        return [
            *("env", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1"),
            *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"),
            f"--directory={self._tree}",
            f"--machine={self.name}",
            f"--network-namespace-path=/run/netns/{self.name}",
            *("--capability=all", f"--drop-capability={WITHHELD}"),
            *("--resolv-conf=off", "--timezone=off", "--link-journal=no"),
            *binds,
        ]

    def _find_leader(self) -> bool:
        """Find process 1 of the container once it is systemd; raises ``LabError`` at its end."""
        process = self._running()
        if process.poll() is not None:
            raise LabError(f"{self.name} ended with status {process.returncode}")
        for nspawn in children(process.pid):
            for pid in children(nspawn):
                if _is_systemd(pid):
                    self._leader = ProcessHandle(pid)
                    return True
        return False

    def _has_booted(self) -> bool:
        done = self.call("systemctl", "is-system-running")
        return done.stdout.decode().strip() in {"running", "degraded"}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise LabError(f"{self.name} is off")
        return self._process

    def _wait_off(self, timeout_seconds: float) -> None:
        process = self._running()
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired as err:
            raise LabError(f"{self.name} is on after {timeout_seconds} s") from err
        if self._leader is not None:
            self._leader.close()
        self._process = self._leader = None
        cgroup.remove(self.spec.group)

    def _output(self, words: Sequence[str], done: subprocess.CompletedProcess[bytes]) -> str:
        out = done.stdout.decode("utf-8", "surrogateescape")
        if done.returncode != 0:
            said = out + done.stderr.decode("utf-8", "replace")
            raise LabError(f"{self.name}: {words}: exit status {done.returncode}: {said.strip()}")
        return out


def _is_systemd(pid: int) -> bool:
    """Say whether a process is process 1 of its namespace and has become systemd."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return values["Name"].strip() == "systemd" and values["NSpid"].split()[-1] == "1"
