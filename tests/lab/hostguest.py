"""The tiny guest with an agent, as a domain of the libvirtd in a host."""

from collections.abc import Mapping
from pathlib import Path

from tests.lab.agent_guest import MEMORY_MIB, AgentGuestBase, boot_files
from tests.lab.command import LabError
from tests.lab.disks import DiskSpec
from tests.lab.domain_xml import BootFiles, DomainSpec, domain_xml
from tests.lab.host import Host
from tests.lab.process import wait_until

GUEST_FILES = "/lab/guest"  # kernel and initramfs, in the host
SHUTDOWN_SECONDS = 60.0
MIGRATE_TIMEOUT_SECONDS = 120.0


def guest_binds() -> Mapping[str, Path]:
    """Return the ``readonly_binds`` that a host needs to boot such guests."""
    return {GUEST_FILES: boot_files().kernel.parent}


class HostGuest(AgentGuestBase):
    """A domain in a host; the host's end is its end."""

    def __init__(
        self, host: Host, name: str, disks: Mapping[str, str], *, iothreads: int = 0
    ) -> None:
        """Define it (not started): target -> path of a qcow2 image in the host.

        The disks share ``iothreads`` threads. Raises ``LabError``.
        """
        self.host = host
        self.name = name
        files = boot_files()
        inside = Path(GUEST_FILES)
        spec = DomainSpec(
            name=name,
            disks=[(DiskSpec(target=target), Path(path)) for target, path in disks.items()],
            memory_mib=MEMORY_MIB,
            iothreads=iothreads,
            boot=BootFiles(
                kernel=inside / files.kernel.name,
                initrd=inside / files.initrd.name,
                cmdline=files.cmdline,
            ),
            has_agent=True,
            console_log=Path(self._console_log),
        )
        self.virsh("define", "/dev/stdin", stdin=domain_xml(spec).encode())

    def virsh(self, *words: str, stdin: bytes = b"", timeout_seconds: float = 60.0) -> str:
        """Run one virsh command in the guest's host; raises ``LabError``."""
        argv = ("virsh", "--quiet", *words)
        return self.host.run(*argv, stdin=stdin, timeout_seconds=timeout_seconds)

    def start(self) -> None:
        """Boot and wait until the agent answers; raises ``LabError``."""
        self.virsh("start", "--", self.name)
        self.wait_ready()

    def shutdown(self) -> None:
        """Have the agent shut it down, and wait until it is off; raises ``LabError``."""
        try:
            self.virsh("shutdown", "--mode", "agent", "--", self.name)
        except LabError as err:
            # seen with libvirt 9.0: the guest was faster than the answer
            if "End of file from agent socket" not in str(err):
                raise
        wait_until(lambda: self.state() == "shut off", f"shutdown of {self.name}", SHUTDOWN_SECONDS)

    def destroy(self) -> None:
        """Switch it off; raises ``LabError``."""
        self.virsh("destroy", "--", self.name)

    def state(self) -> str:
        """Return libvirt's word for the domain's state, such as "shut off"."""
        return self.virsh("domstate", "--", self.name).strip()

    def migrate(self, to: Host, *, mib_per_second: int = 0) -> None:
        """Move it, running, to another host that sees the same images; raises ``LabError``.

        At most so fast, unless that is 0.  libvirt is told not to worry (``--unsafe``): it does
        not take a bind mount for shared.
        """
        options = ["--live", "--unsafe", "--persistent", "--undefinesource"]
        if mib_per_second:
            options += ["--bandwidth", str(mib_per_second)]
        words = ("migrate", *options, "--", self.name, f"qemu+ssh://root@{to.name}/system")
        self.virsh(*words, timeout_seconds=MIGRATE_TIMEOUT_SECONDS)
        self.host = to

    def console(self) -> str:
        """Return what the guest's serial console has printed, on the host where it is."""
        return self.host.run("cat", self._console_log)

    @property
    def _console_log(self) -> str:
        return f"/var/log/libvirt/qemu/{self.name}-console.log"

    def _ask(self, request: str) -> str:
        return self.virsh("qemu-agent-command", "--", self.name, request)
