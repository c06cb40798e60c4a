"""An sshd in a mount namespace, as that of a lab's libvirtd, which makes a host of the two.

The program is taken out of its package (``scripts/install-deps``): that one would have it listen
on the machine. The host has a machine-id and a /run/nbdbackup of its own.
"""

import os
import socket
import subprocess
from pathlib import Path
from typing import Final, Self

from tests.lab.command import LabError, run
from tests.lab.process import wait_until
from tests.lab.taken_out import taken_out

ROOT: Final = taken_out("sshd")
SCRIPT: Final = """\
mkdir -p /run/nbdbackup /run/sshd
mount -t tmpfs none /run/nbdbackup
mount --bind "$1/passwd" /etc/passwd
test -e /etc/machine-id || : >/etc/machine-id
mount --bind "$1/machine-id" /etc/machine-id
if test -d "$2/usr/lib/openssh"; then mount --bind "$2/usr/lib/openssh" /usr/lib/openssh; fi
LD_LIBRARY_PATH=$(dirname "$2"/usr/lib/*/libwrap.so.0) exec "$2/usr/sbin/sshd" -D -e -f "$1/config"
"""
CONFIG: Final = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""
CLIENT: Final = """\
Host {name}
    HostName 127.0.0.1
    Port {port}
    User root
    HostKeyAlias {name}
    IdentityFile {directory}/user
    IdentitiesOnly yes
    UserKnownHostsFile {directory}/known
    GlobalKnownHostsFile /dev/null
"""


class Sshd:
    """Runs while the body does; ``launcher`` are the words that bring it there.

    ``config`` is for ssh, which knows the host by ``name``.
    """

    def __init__(self, launcher: list[str], directory: Path, name: str) -> None:
        self.directory = directory
        self.config = directory / "client"
        self.name = name
        self._launcher = launcher
        self._program: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        directory = self.directory
        directory.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for key in ("host", "user"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key])
        (directory / "known").write_text(f"{self.name} {(directory / 'host.pub').read_text()}")
        names = {"port": self.port, "directory": directory, "name": self.name}
        (directory / "config").write_text(CONFIG.format(**names))
        self.config.write_text(CLIENT.format(**names))
        (directory / "machine-id").write_text("0123456789abcdef" * 2 + "\n")
        users = Path("/etc/passwd").read_text().splitlines()
        users = [each for each in users if not each.startswith("sshd:")]
        users.append("sshd:x:64999:65534::/run/sshd:/usr/sbin/nologin")
        (directory / "passwd").write_text("\n".join(users) + "\n")
        words = (os.fspath(each) for each in (directory, ROOT))
        argv = [*self._launcher, "sh", "-euc", SCRIPT, "sh", *words]
        with (directory / "log").open("wb") as log:
            self._program = subprocess.Popen(argv, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(self._answers, "answer from sshd", 20)
        return self

    def __exit__(self, *_: object) -> None:
        if self._program is not None:
            self._program.terminate()
            self._program.wait(20)

    def run(self, *words: str | Path) -> str:
        """Run a program on the host."""
        return run([*self._launcher, *words])

    def _answers(self) -> bool:
        assert self._program is not None
        if self._program.poll() is not None:
            raise LabError((self.directory / "log").read_text())
        with socket.socket() as made:
            return made.connect_ex(("127.0.0.1", self.port)) == 0
