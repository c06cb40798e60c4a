"""Hosts on one network, that know each other by name and key, with a directory that they share.

Needs root, systemd-nspawn and a cache on a file system that an overlay may lie on (ext4, xfs,
not an overlay).  Whatever runs is in the namespaces of ``ground``; what is in the cache's
``hosts-*`` is removed at the end, or after a kill, by the next lab.
"""

import contextlib
import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab import cgroup
from tests.lab.base import cache_directory
from tests.lab.command import run
from tests.lab.ground import Ground
from tests.lab.host import Host, HostSpec
from tests.lab.hostroot import RootSpec, root_directory

# fixed, so that every host knows all names before the others exist
NAMES = {f"lab-{letter}": f"10.99.0.{n}" for n, letter in enumerate("abcdefgh", 1)}
SHARED = "/shared"  # the same directory in all hosts
PREFIX = "hosts-"
LOCK = "lock"
# systemd waits for nothing that would come by a time-out
FAST_STOP = "[Manager]\nDefaultTimeoutStopSec=30s\n"
SSH_CONFIG = """Host lab-*
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


class HostLab:
    """Hosts and what is between them; use it in a ``with`` statement."""

    def __init__(self) -> None:
        """Make the network and the shared directory; raises ``LabError``."""
        self._stack = contextlib.ExitStack()
        try:
            self.directory = self._stack.enter_context(_own_directory())
            self.shared = self.directory / "shared"
            self.shared.mkdir()
            self.shared.chmod(0o777)
            self._key = self.directory / "id_ed25519"
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", self._key])
            self.ground = self._stack.enter_context(Ground())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def host(
        self,
        name: str,
        root: RootSpec,
        *,
        binds: Mapping[str, Path] | None = None,
        readonly_binds: Mapping[str, Path] | None = None,
    ) -> Host:
        """Boot a host of one of ``NAMES``; it ends with the lab.  Raises ``LabError``.

        Binds are paths inside with what lies there outside; nothing of the outer /run can be.
        """
        directory = self.directory / name
        lower = root_directory(root)
        _furnish(directory / "upper", lower, name, self._key)
        host = Host(
            self.ground,
            HostSpec(
                name=name,
                address=NAMES[name],
                root=lower,
                directory=directory,
                group=f"{_group_prefix(self.directory)}{name}",
                binds={SHARED: self.shared, **(binds or {})},
                readonly_binds=readonly_binds or {},
            ),
        )
        self._stack.callback(host.close)
        host.boot()
        return host

    def close(self) -> None:
        """Cut the power of all hosts and remove everything; safe to call twice."""
        self._stack.close()


def _furnish(upper: Path, lower: Path, name: str, key: Path) -> None:
    """Write what distinguishes the host into the upper layer of its disk."""
    directories = ("etc", "root", "root/.ssh", "etc/systemd/system.conf.d")
    for directory in (*directories, *(["etc/libvirt"] if (lower / "etc/libvirt").is_dir() else [])):
        (upper / directory).mkdir(parents=True)
        if (lower / directory).is_dir():
            shutil.copystat(lower / directory, upper / directory)
    (upper / "root/.ssh").chmod(0o700)
    hosts = [f"{address} {each}" for each, address in NAMES.items()]
    # with a machine-id there is no "first boot", which would enable services by preset
    identity = hashlib.sha256(f"{key}{name}".encode()).hexdigest()[:32]
    texts = {
        "etc/hostname": f"{name}\n",
        "etc/machine-id": f"{identity}\n",
        "etc/hosts": "\n".join(["127.0.0.1 localhost", *hosts]) + "\n",
        "etc/resolv.conf": Path("/etc/resolv.conf").read_text("utf-8"),
        "etc/systemd/system.conf.d/lab.conf": FAST_STOP,
        "root/.ssh/config": SSH_CONFIG,
        "root/.ssh/id_ed25519": key.read_text("ascii"),
        "root/.ssh/authorized_keys": key.with_suffix(".pub").read_text("ascii"),
    }
    if (lower / "etc/libvirt").is_dir():
        # the firmware's UUID is the same in all hosts, and libvirt migrates between different ones
        texts["etc/libvirt/libvirtd.conf"] = 'host_uuid_source = "machine-id"\n'
        texts["etc/libvirt/qemu.conf"] = 'security_driver = "none"\nmax_core = 0\n'
    for path, text in texts.items():
        before = lower / path if path.startswith("etc/libvirt/") else None
        kept = before.read_text("utf-8") if before is not None else ""
        (upper / path).write_text(kept + text, "utf-8")
    (upper / "root/.ssh/id_ed25519").chmod(0o600)


@contextlib.contextmanager
def _own_directory() -> Iterator[Path]:
    """Make a directory that is ours as long as we hold its lock; removed at the end."""
    with _gate():
        _sweep()
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=cache_directory()))
        # children do not inherit it, so it says whether this process lives
        lock = (directory / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        try:
            yield directory
        finally:
            with _gate():
                shutil.rmtree(directory)


@contextlib.contextmanager
def _gate() -> Iterator[None]:
    """Hold the right to make and remove directories of labs."""
    with (cache_directory() / "hosts.lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield


def _sweep() -> None:
    """Remove what killed labs left: directories nobody has locked, and their control groups."""
    for directory in cache_directory().glob(f"{PREFIX}*/"):
        with (directory / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            for group in cgroup.groups(_group_prefix(directory)):
                cgroup.remove(group)
            shutil.rmtree(directory)


def _group_prefix(directory: Path) -> str:
    """Return how the names of the control groups of a lab's hosts begin."""
    return f"nbdlab-{directory.name.removeprefix(PREFIX)}-"
