"""A lab around a real libvirtd of its own, for what the embedded driver cannot show.

That is: several clients at once, a restart of the daemon during a backup, QEMU under an account
of its own.  The daemon lives in a mount namespace in which libvirt's directories are those of
the lab; a libvirtd of the machine is neither needed nor touched.  QEMU survives the daemon.
"""

import subprocess
import uuid
from pathlib import Path

from tests.lab.base import UNPRIVILEGED_USER, Lab, unix_socket_path
from tests.lab.command import LabError
from tests.lab.process import KILL_TIMEOUT_SECONDS, wait_until

START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 10.0
LAUNCHER = Path(__file__).with_name("private-libvirtd")


class DaemonLab(Lab):
    """A running private libvirtd; use it in a ``with`` statement."""

    def __init__(self, *, qemu_user: str = UNPRIVILEGED_USER, host: str = "") -> None:
        """Write the configuration and start the daemon; raises ``LabError``.

        With ``host`` it is, by name and UUID, that of another host than all others.
        """
        super().__init__(qemu_user=qemu_user)
        self._host = host
        self._daemon: subprocess.Popen[bytes] | None = None
        self.root = self.directory / "l"
        for name in ("etc", "lib", "run", "log", "cache"):
            (self.root / name).mkdir(parents=True, mode=0o755)
        (self.root / "etc" / "qemu.conf").write_text(self._qemu_conf(), "utf-8")
        (self.root / "etc" / "libvirtd.conf").write_text(
            'auth_unix_rw = "none"\n'  # the default asks polkit, which is not there
            'log_outputs = "2:file:/var/log/libvirt/libvirtd.log"\n'
            + (f'host_uuid = "{uuid.uuid4()}"\n' if host else ""),
            "utf-8",
        )
        self._restore_capabilities()
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def uri(self) -> str:
        """Return the libvirt connection URI."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def socket(self) -> Path:
        """Return the daemon's socket."""
        return unix_socket_path(self.root / "run" / "libvirt-sock")

    @property
    def launcher(self) -> list[str]:
        """Return the words before a command that bring it into the daemon's mount namespace.

        There the daemon is ``qemu:///system``, for programs that take no socket in a URI.  The
        working directory is / then, and what the host mounted later is not there.
        """
        proc = f"/proc/{self._running_daemon().pid}"
        # the root, too: in a chroot the namespace's own root is another one
        return ["nsenter", f"--mount={proc}/ns/mnt", f"--root={proc}/root", "--"]

    @property
    def _cache(self) -> Path:
        return self.root / "cache"

    @property
    def _pid_files(self) -> Path:
        return self.root / "run" / "qemu"

    @property
    def _logs(self) -> Path:
        return self.root / "log" / "qemu"

    def start(self) -> None:
        """Start the daemon and wait until it answers; raises ``LabError``."""
        if self._daemon is not None:
            raise LabError("libvirtd runs already")
        self.socket.unlink(missing_ok=True)
        # where the user may not open /dev/kvm, libvirt would probe QEMU at each call: embed.py
        hide = [] if self.qemu_user == "root" else ["hide-kvm"]
        own = ["unshare", "--mount", "--uts", "--propagation", propagation()]
        with (self.root / "log" / "stderr").open("ab") as log:
            self._daemon = subprocess.Popen(
                [*own, LAUNCHER, self.root, self._host, *hide],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, "answer from libvirtd", START_TIMEOUT_SECONDS)

    def stop(self) -> None:
        """End the daemon (SIGTERM, and as systemd does, SIGKILL if it hangs); guests run on.

        libvirtd 11.3 was seen to hang now and then when it had just started.
        """
        daemon = self._running_daemon()
        daemon.terminate()
        try:
            daemon.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill9()
        self._daemon = None

    def kill9(self) -> None:
        """Kill the daemon at once; guests run on."""
        daemon = self._running_daemon()
        self._daemon = None
        daemon.kill()
        daemon.wait(KILL_TIMEOUT_SECONDS)

    def restart(self) -> None:
        """Stop and start the daemon."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End guests and daemon, remove everything."""
        try:
            if self._daemon is not None:
                self.kill9()
        finally:
            super().close()

    def _running_daemon(self) -> subprocess.Popen[bytes]:
        if self._daemon is None:
            raise LabError("libvirtd does not run")
        return self._daemon

    def _answers(self) -> bool:
        daemon = self._running_daemon()
        if daemon.poll() is not None:
            said = (self.root / "log" / "stderr").read_text("utf-8", "replace")
            raise LabError(f"libvirtd ended with status {daemon.returncode}: {said}")
        if not self.socket.exists():
            return False
        try:
            self.virsh("list", timeout_seconds=START_TIMEOUT_SECONDS)
        except LabError:
            return False
        return True


def propagation() -> str:
    """Return how a new namespace's mounts relate to the host's, for ``unshare --propagation``.

    As slaves: what the host mounts later is seen inside, but not the other way round.  In a
    chroot whose directory is no mount point, the kernel refuses that.
    """
    lines = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    return "slave" if any(line.split()[4] == "/" for line in lines) else "unchanged"
