"""Clean root file systems of Debian suites, made once and kept in the lab's cache.

They are the lower layers of hosts and are never written to.  A cached one is as old as the day
on which it was made; a host that installs packages begins with ``apt update``.  The directories
``root-*`` of the cache may be deleted whenever no test runs.
"""

import fcntl
import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.lab.base import cache_directory
from tests.lab.command import LabError, run
from tests.lab.daemon import propagation

MAKE_TIMEOUT_SECONDS = 900.0
RECIPE = 1  # raise it when the commands below change what they make

BOOKWORM = "bookworm"
TRIXIE = "trixie"
SUITES = (BOOKWORM, TRIXIE)

SYSTEM = ("systemd", "systemd-sysv", "dbus")
HYPERVISOR = (
    *SYSTEM,
    "iproute2",
    "libnbd-bin",
    "libvirt-clients",
    "libvirt-daemon-system",
    "netcat-openbsd",  # libvirt's ssh transport
    "nbdkit",
    "openssh-client",
    "openssh-server",
    "python3-libnbd",
    "python3-libvirt",
    "python3-systemd",
    "qemu-system-x86",
    "qemu-utils",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RootSpec:
    """What a root file system is made of; its dependencies come along, what is recommended not.

    ``BARE`` holds systemd and nothing of libvirt or Python, so that a package which installs
    there names all that it needs.
    """

    suite: str
    kind: str
    packages: tuple[str, ...]

    @property
    def key(self) -> str:
        """Return the name in the cache: another suite, list or recipe is another directory."""
        words = "\n".join((self.suite, str(RECIPE), *self.packages))
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        return f"root-{self.suite}-{self.kind}-{digest}"


def bare(suite: str) -> RootSpec:
    """Return the root with systemd only (150 MB)."""
    return RootSpec(suite=suite, kind="bare", packages=SYSTEM)


def hypervisor(suite: str) -> RootSpec:
    """Return the root with libvirt, QEMU, nbdkit, ssh (550 MB)."""
    return RootSpec(suite=suite, kind="hypervisor", packages=HYPERVISOR)


def root_directory(spec: RootSpec) -> Path:
    """Return the root file system, made now unless the cache has it; raises ``LabError``."""
    made = cache_directory() / spec.key
    with (cache_directory() / f"{spec.key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            _make(spec, made)
    return made


def _make(spec: RootSpec, made: Path) -> None:
    # one that was killed in the middle; nobody else makes this key while we hold its lock
    for left in cache_directory().glob(f".{spec.key}-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{spec.key}-", dir=cache_directory()))
    try:
        tree = work / "tree"
        run(_maker(spec, tree), timeout_seconds=MAKE_TIMEOUT_SECONDS)
        tree.chmod(0o755)
        tree.rename(made)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _maker(spec: RootSpec, tree: Path) -> list[str | Path]:
    """Return the command; documentation is left out, and fsync, in making it and later.

    It mounts /proc and /sys into the tree.  In namespaces of its own, which end when we do,
    however we end, those mounts never meet the removal of what it left.
    """
    namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    contained = ["unshare", *namespaces, "--propagation", propagation()]
    return [
        *("setpriv", "--pdeathsig", "KILL", *contained, "--"),
        "mmdebstrap",
        "--quiet",
        "--variant=apt",
        "--mode=root",
        f"--include={','.join(spec.packages)}",
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=Acquire::Retries "3"',
        '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=force-unsafe-io",
        # what is installed later, into a running host, comes with its documentation
        '--customize-hook=echo force-unsafe-io >"$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap',
        spec.suite,
        tree,
        *debian_mirror(),
    ]


def debian_mirror() -> list[str]:
    """Return the mirror that this machine's apt takes Debian from, if it does from any.

    Without one mmdebstrap takes Debian's public one. That serves an Ubuntu, too, whose package
    debian-archive-keyring has the keys.
    """
    wanted = ["Created-By: Packages", "Origin: Debian"]
    try:
        uris = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]).split()
    except LabError:
        return []
    return [uri for uri in uris if "security" not in uri][:1]
