"""A lab around libvirt's embedded QEMU driver, ``qemu:///embed?root=DIR``.

What was found out by experiment (libvirt 9.0):

* The driver runs inside the client's process and needs an event loop there: a client must
  call ``virEventRegisterDefaultImpl`` and run it, or the open fails.
* One process at a time: the second one that opens the same root fails at once with "Failed to
  acquire pid file".  Hence no connection is held here; each call is a short ``virsh``.
* QEMU, and a running backup job, outlive the client; the next client that opens the root takes
  them up again (state "running", job listed, abortable).
* A ``destroy`` right after the open may report "domain is not running" although it has just
  ended QEMU: the driver's own re-attachment noticed first.
* ``abortJob`` returns early.  A client that leaves before the job is really gone breaks the
  domain: the next one finds the job in the root's books, but not in QEMU, and every call that
  changes something waits 30 s for a lock "held by monitor=init-NAME" and fails.
* The guest agent is reachable 30 to 110 ms after the open, not before.
* Right after QEMU died, the first client may still see the domain "running".
* Probing QEMU's capabilities takes 4 s per root, unless the root has a cache of them.  It takes
  4 s at each call wherever there is a /dev/kvm that can't be used, or not by QEMU's user: libvirt
  then throws its cache away at every look.  So both kinds of labs hide the device.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Final

from tests.lab.base import Lab, cache_directory
from tests.lab.command import LabError, run

KVM: Final = Path("/dev/kvm")
CLONE_NEWNS: Final = 0x00020000


@functools.cache
def hide_kvm() -> None:
    """Have a file without use as /dev/kvm in this process and all that it starts from now on.

    The driver runs in whatever process opens it, so there is no other one to hide it from.
    """
    if not KVM.exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        raise LabError(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
    run(["mount", "--make-rslave", "/"])
    nothing = cache_directory() / "no-kvm"
    nothing.touch(0o600)
    run(["mount", "--bind", nothing, KVM])


class EmbeddedLab(Lab):
    """A libvirt that exists only while somebody has it open."""

    def __init__(self, *, qemu_user: str = "root") -> None:
        """Make the root and its qemu.conf."""
        hide_kvm()
        super().__init__(qemu_user=qemu_user)
        self.root = self.directory / "l"
        configuration = self.root / "etc" / "qemu.conf"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(self._qemu_conf(), "utf-8")
        self._restore_capabilities()

    @property
    def uri(self) -> str:
        """Return the libvirt connection URI."""
        return f"qemu:///embed?root={self.root}"

    @property
    def _cache(self) -> Path:
        return self.root / "cache"

    @property
    def _pid_files(self) -> Path:
        return self.root / "run" / "qemu"

    @property
    def _logs(self) -> Path:
        return self.root / "log" / "qemu"
