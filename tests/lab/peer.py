"""The peer's programs, virtnbdbackup in the versions of Debian 12 and 13, to run beside ours.

Neither works with the embedded driver, since they run no event loop, and the older one asks for
a password with ``qemu+unix:``.  ``DaemonLab.launcher`` gives them a ``qemu:///system``.

Nothing of it is read or copied: it is under the GPL.  This Debian's version comes from the
installed package; the other one's is downloaded from the same mirror and unpacked in the cache.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.base import cache_directory
from tests.lab.command import LabError, run
from tests.lab.virsh import run_libvirt_client

PACKAGE = "virtnbdbackup"
BOOKWORM = "bookworm"  # version 1.9.15: no verify
TRIXIE = "trixie"
DOWNLOAD_TIMEOUT_SECONDS = 300.0
RUN_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One version of the peer; ``launcher`` and ``environment`` are needed to run it."""

    backup_program: Path
    restore_program: Path
    environment: dict[str, str] = field(default_factory=dict)
    launcher: Sequence[str] = ()

    def version(self) -> str:
        """Return what ``--version`` says, such as "1.9.15"."""
        return self.backup("--version").split()[-1]

    def backup(self, *words: str | Path, timeout_seconds: float = RUN_TIMEOUT_SECONDS) -> str:
        """Run ``virtnbdbackup`` and return its output; raises ``LabError``."""
        return self._run(self.backup_program, words, timeout_seconds)

    def restore(self, *words: str | Path, timeout_seconds: float = RUN_TIMEOUT_SECONDS) -> str:
        """Run ``virtnbdrestore`` and return its output; raises ``LabError``."""
        return self._run(self.restore_program, words, timeout_seconds)

    def argv(self, program: Path, *words: str | Path) -> list[str | Path]:
        """Return the command that runs one of the programs."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return [*self.launcher, "env", *settings, "/usr/bin/python3", program, *words]

    def _run(self, program: Path, words: Sequence[str | Path], timeout_seconds: float) -> str:
        return run_libvirt_client(self.argv(program, *words), timeout_seconds)


def peer(suite: str, launcher: Sequence[str] = ()) -> Peer:
    """Return the peer of a Debian suite; raises ``LabError`` when it cannot be had."""
    if suite == host_suite():
        programs = Path("/usr/bin")
        if not (programs / PACKAGE).exists():
            raise LabError(f"{PACKAGE} is not installed")
        return Peer(
            backup_program=programs / PACKAGE,
            restore_program=programs / "virtnbdrestore",
            launcher=launcher,
        )
    tree = _unpacked(suite)
    return Peer(
        backup_program=tree / "usr/bin" / PACKAGE,
        restore_program=tree / "usr/bin/virtnbdrestore",
        environment={"PYTHONPATH": os.fspath(tree / "usr/lib/python3/dist-packages")},
        launcher=launcher,
    )


def host_suite() -> str:
    """Return this Debian's code name."""
    for line in Path("/etc/os-release").read_text("utf-8").splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    raise LabError("this system has no code name")


def _unpacked(suite: str) -> Path:
    made = cache_directory() / f"peer-{suite}"
    with (cache_directory() / "peer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            work = Path(tempfile.mkdtemp(prefix=".peer-", dir=cache_directory()))
            try:
                tree = work / "tree"
                run(["dpkg-deb", "-x", _download(suite, work), tree])
                tree.rename(made)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return made


def _download(suite: str, work: Path) -> Path:
    """Download the package of another suite with an apt that has its own lists and sources."""
    for name in ("lists/partial", "cache/archives/partial", "debs", "none"):
        (work / name).mkdir(parents=True)
    # no package is installed there, or apt would want the installed version
    status = work / "status"
    status.touch()
    sources = work / "sources.list"
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources.write_text(f"deb [signed-by={keyring}] {_mirror()} {suite} main\n", "utf-8")
    options = [
        f"Dir::Etc::SourceList={sources}",
        f"Dir::Etc::SourceParts={work / 'none'}",
        f"Dir::Etc::Preferences={work / 'none/file'}",
        f"Dir::Etc::PreferencesParts={work / 'none'}",
        f"Dir::State::Status={status}",
        f"Dir::State::Lists={work / 'lists'}",
        f"Dir::Cache={work / 'cache'}",
        "APT::Sandbox::User=root",  # apt's own account may not write here
    ]
    apt: list[str | Path] = ["apt-get", "-qq"]
    for option in options:
        apt += ["-o", option]
    run([*apt, "update"], timeout_seconds=DOWNLOAD_TIMEOUT_SECONDS)
    run([*apt, "download", PACKAGE], timeout_seconds=DOWNLOAD_TIMEOUT_SECONDS, cwd=work / "debs")
    return next((work / "debs").glob(f"{PACKAGE}_*.deb"))


def _mirror() -> str:
    """Return the mirror that this machine's apt takes Debian itself from."""
    wanted = ["Created-By: Packages", "Origin: Debian", f"Codename: {host_suite()}"]
    uris = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]).split()
    if not uris:
        raise LabError("apt knows no Debian mirror")
    return uris[0]
