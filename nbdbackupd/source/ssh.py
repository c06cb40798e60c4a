"""Another host with guests, by one ssh connection: its files, its programs, its sockets.

The OpenSSH program does it, one master for each run, so that there is one login, and one place
where the host's key is proven: a key that is not known is never accepted. libvirt is reached
through the same master, by a forward of its socket, and proves that it sees what we do
(virt/same_host.py): so no file is ever that of another host than the domain.

Who comes by the master's socket can't get elsewhere: where the master is gone, ssh would make a
connection of its own, by another way perhaps; its proxy command is one that fails.

A kill of ours ends the master with us, and the other end lets go of the guest. If the network is
lost, that end does not hear of it for hours, and QEMU hangs for good if a job is ended while a
client is in its handshake (source/kept_connections.py). So each run notes there which process
serves it, and who clears up after a dead run ends that first (``cut``).
"""

import hashlib
import os
import re
import shlex
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, quote, unquote, urlsplit

from nbdbackupd import durable, proc, rundir
from nbdbackupd.errors import (
    BusyError,
    ConfigError,
    NbdbackupError,
    NotSupportedError,
    ProcessError,
    SourceError,
)
from nbdbackupd.virt.connection import Connection, open_connection
from nbdbackupd.where import Facts

CONNECT_SECONDS: Final = 60.0
"""For a login by way of other hosts."""

CALL_SECONDS: Final = 60.0
FETCH_SECONDS: Final = 600.0
POLL_SECONDS: Final = 0.05
MAX_FILE: Final = 512 << 20
"""Bytes of a firmware, a kernel, a state of a TPM."""

PREFIX: Final = "ssh-"
LOCK: Final = ".lock"
ID_LENGTH: Final = 12
LIBVIRT: Final = ("/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock")
PARAMETERS: Final = frozenset({"socket", "keyfile"})
"""Of a URI; others ask for ways that we do not go."""

NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]*", re.ASCII)
SHELL: Final = ("-T", "--", "there", "exec /bin/sh -s")
HEAD: Final = "LC_ALL=C; export LC_ALL; PATH=$PATH:/usr/sbin:/sbin; umask 077; set -e"

OPTIONS: Final = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
    # with AES in the processor a third less work than the default
    "Ciphers=^aes128-gcm@openssh.com",
    "ConnectTimeout=20",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=6",
    "ExitOnForwardFailure=yes",
    "StreamLocalBindUnlink=yes",
    "StreamLocalBindMask=0177",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RequestTTY=no",
    "ControlMaster=yes",
    "ControlPersist=no",
)

# what follows runs there, by sh, with its arguments in $1, $2, …

WHO: Final = """
id -u; cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id
for each; do if test -S "$each"; then echo "$each"; exit; fi; done
"""
FACTS: Final = """
if mode=$(stat -L -c %f -- "$1" 2>/dev/null); then
    printf %d "0x$mode"; stat -L -c ' %d %i %s' -- "$1"
fi
"""
REMOVE: Final = 'if test -e "$1" || test -L "$1"; then rm -f -- "$1"; echo removed; fi'
MAKE: Final = 'test -d "$1" || install -d -m "$2" -- "$1"'
NAMES: Final = 'if test -d "$1"; then find "$1" -mindepth 1 -maxdepth 1 -printf \'%f\\0\'; fi'
TOUCH: Final = 'test -d "$1" || install -d -m 755 -- "$1"; set -C; : >"$2"'
SPACE: Final = "stat -f -c '%a %S' -- \"$1\""
TREE: Final = "find \"$1\" -type f -printf '%p\\0'"
FETCH: Final = 'test -f "$1"; exec head -c "$2" -- "$1"'
BIRTH: Final = """
birth() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }
"""
LEAD: Final = f"""{BIRTH}
install -d -m 700 -- "$1"
echo "$PPID $(birth "$PPID")" >"$1/$2"
install -d -m 700 -o "$4" -g "$5" -- "$3"
rm -f -- "$6"
"""
CUT: Final = f"""{BIRTH}
if test -f "$1"; then
    read -r pid born <"$1"
    read -r name <"/proc/$pid/comm" || name=
    if test "$pid" != "$PPID" && test "$(birth "$pid")" = "$born"; then
        case $name in sshd*) kill "$pid" || :; kill -CONT "$pid" || :;; esac
    fi 2>/dev/null
fi
left=100
while grep -F -- " $2" /proc/net/unix | grep -qv ' 00010000 '; do
    left=$((left - 1))
    if test $left -eq 0; then echo held; exit; fi
    sleep 0.1
done
rm -f -- "$1"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a URI says of the way; empty fields: as ssh's configuration has it."""

    host: str
    user: str
    port: str
    keyfile: str
    libvirt: tuple[str, ...]


def leads(uri: str) -> bool:
    """Whether a URI is of a way that we go by ourselves."""
    parts = urlsplit(uri)
    wanted = set(parse_qs(parts.query, keep_blank_values=True))
    return parts.scheme == "qemu+ssh" and parts.path == "/system" and wanted <= PARAMETERS


def target_of(uri: str) -> Target:
    """Take a URI apart for which ``leads`` is true. Raises ConfigError."""
    parts = urlsplit(uri)
    found = parse_qs(parts.query)
    user, _, place = parts.netloc.rpartition("@")
    matched = re.fullmatch(r"(?:\[([^]]*)\]|([^:]*))(?::(\d+))?", place)
    host = (matched[1] or matched[2] or "") if matched else ""
    user = unquote(user)
    if not matched or not NAME.fullmatch(host) or (user and not NAME.fullmatch(user)):
        raise ConfigError(f"{uri} names no host and user that ssh could take: see -c, --connect")
    socket = found.get("socket", [""])[0]
    return Target(
        host=host, user=user, port=matched[3] or "", keyfile=found.get("keyfile", [""])[0],
        libvirt=(socket,) if socket else LIBVIRT,
    )  # fmt: skip


def script(text: str, words: Sequence[str]) -> bytes:
    """A text for sh, with words that nothing in it can be taken for anything else.

    Here alone words are quoted for a shell, and it is always sh: it reads this from its standard
    input, so that the account's login shell sees nothing of it. Raises SourceError.
    """
    if any("\0" in each for each in words):
        raise SourceError(f"a name with a zero byte is none: {words!r}")
    return os.fsencode(f"set -- {shlex.join(words)}\n{HEAD}\n{text}\n")


class There:
    """A host at the other end of a master, see ``where.Where``; made by ``connected``."""

    is_here: Final = False

    def __init__(self, uri: str, directory: Path, master: proc.Process, config: str) -> None:
        self.name = urlsplit(uri).netloc.rpartition("@")[2]
        self.id = ""
        self.boot = ""
        self.config = config
        self.runtime_dir = directory.parent
        self._uri = uri
        self._directory = directory
        self._master = master
        self._machine = ""

    def is_lost(self) -> bool:
        """See ``Where``."""
        return self._master.poll() is not None

    def why_lost(self) -> SourceError:
        """What to say of it."""
        said = self._master.complaints.strip().splitlines()
        why = f": {said[-1]}" if said else ""
        return SourceError(
            f"the connection to {self._uri} by ssh was lost{why}; nothing was saved, run again",
            uri=self._uri,
        )

    def look(self, target: Target) -> str:
        """Learn which machine it is; returns the path of its libvirt's socket there.

        Raises NotSupportedError, SourceError.
        """
        found = self._sh(WHO, *target.libvirt).splitlines()
        if len(found) < 3 or not found[1].isalnum():
            raise SourceError(f"{self._uri}: the host does not tell its machine-id(5)")
        if found[0] != "0":
            raise NotSupportedError(
                f"{self._uri}: ssh leads to an account that is not root's: only root can make a "
                f"directory for QEMU's sockets there; give root@ in the URI",
                uri=self._uri,
            )
        self._machine, self.boot = found[1], found[2]
        if len(found) < 4:
            looked = " or ".join(target.libvirt)
            raise SourceError(
                f"{self._uri}: libvirt has no socket there, {looked}: start virtqemud or libvirtd, "
                f"or give ?socket= in the URI"
            )
        return found[3]

    def know(self, uuid: str) -> None:
        """Note libvirt's UUID of the host: cloned machines may differ in that alone."""
        self.id = _digest(self._machine, uuid)

    def output(self, argv: Sequence[str], *, timeout: float) -> str:
        """See ``Where``."""
        return self._sh('exec "$@" </dev/null', *argv, timeout=timeout)

    def facts(self, path: str) -> Facts | None:
        """See ``Where``."""
        if not path.startswith("/") or "\0" in path:
            return None
        said = self._sh(FACTS, path)
        if not said:
            return None
        mode, device, inode, size = self._numbers(said, 4)
        return Facts(mode, device, inode, size)

    @contextmanager
    def near(self, path: Path) -> Iterator[Path]:
        """See ``Where``: a copy, which is gone afterwards."""
        before = self.facts(os.fspath(path))
        if before is None or not stat.S_ISREG(before.mode):
            raise SourceError(f"can't read {path} of {self.name}: no file is to be seen there")
        if before.size > MAX_FILE:
            raise SourceError(f"{path} of {self.name} has {before.size} bytes: too many")
        copy = self._directory / "near"
        try:
            self._fetch(path, copy)
            after = self.facts(os.fspath(path))
            if after != before or copy.stat().st_size != before.size:
                raise SourceError(f"{path} of {self.name} was changed while it was read")
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def tree(self, directory: Path) -> list[Path]:
        """See ``Where``."""
        return [Path(each) for each in sorted(_parts(self._sh(TREE, os.fspath(directory))))]

    def make_directory(self, path: Path, mode: int) -> None:
        """See ``Where``."""
        self._sh(MAKE, os.fspath(path), f"{mode:o}")

    def free_bytes(self, directory: Path) -> int:
        """See ``Where``."""
        blocks, size = self._numbers(self._sh(SPACE, os.fspath(directory)), 2)
        return blocks * size

    def names(self, directory: Path) -> list[str]:
        """See ``Where``."""
        return sorted(_parts(self._sh(NAMES, os.fspath(directory))))

    def remove(self, file: Path) -> bool:
        """See ``Where``."""
        return bool(self._sh(REMOVE, os.fspath(file)).strip())

    def touch(self, file: Path) -> None:
        """Make an empty file that is not there yet."""
        self._sh(TOUCH, os.fspath(file.parent), os.fspath(file))

    def scratch_dir(self, directory: Path) -> Path:
        """See ``Where``: apart from what that host's own runs have, which sweep theirs."""
        return directory / self._own

    def server_socket(self, socket: Path) -> Path:
        """See ``Where``: in the directory that the domain's confinement may allow its QEMU."""
        return rundir.DEFAULT / socket.parent.name / f"{self._own}.sock"

    def lead(self, socket: Path, owner: tuple[int, int] | None) -> None:
        """See ``Where``."""
        server = self.server_socket(socket)
        notes, name = self._note(socket)
        uid, gid = owner or (0, 0)
        words = (os.fspath(notes), name, os.fspath(server.parent), str(uid), str(gid))
        self.make_directory(rundir.DEFAULT, rundir.MODE)
        self._sh(LEAD, *words, os.fspath(server))
        self.forward(socket, os.fspath(server))

    def leave(self, socket: Path) -> None:
        """See ``Where``."""
        notes, name = self._note(socket)
        self._sh('rm -f -- "$@"', os.fspath(notes / name), os.fspath(self.server_socket(socket)))

    def cut(self, socket: Path) -> None:
        """See ``Where``."""
        notes, name = self._note(socket)
        said = self._sh(CUT, os.fspath(notes / name), os.fspath(self.server_socket(socket)))
        if said.strip():
            raise BusyError(
                f"{self.name}: somebody is still connected to the NBD server of an earlier run, "
                f"{self.server_socket(socket)}: try later"
            )

    def forward(self, here: Path, there: str) -> None:
        """Lead what connects to a socket here, which only we may, to one there."""
        if ":" in f"{here}{there}":
            raise ConfigError(f"the path {here} has a colon: give another --runtime-dir")
        argv = [*self._client(), "-O", "forward", "-L", f"{here}:{there}", "--", "there"]
        proc.output(argv, timeout=CALL_SECONDS)

    def _note(self, socket: Path) -> tuple[Path, str]:
        return rundir.DEFAULT / self._own, socket.parent.name

    @property
    def _own(self) -> str:
        """What tells us from others who save guests of that host."""
        directory = os.fspath(self.runtime_dir)
        with suppress(OSError):
            directory += Path("/etc/machine-id").read_text()
        return PREFIX + _digest(directory, os.uname().nodename)[:ID_LENGTH]

    def _client(self) -> list[str]:
        way = ["-F", "none", "-S", os.fspath(self._directory / "c"), "-o", "BatchMode=yes"]
        return ["ssh", *way, "-o", "ControlMaster=no", "-o", "ProxyCommand=false"]

    def _sh(self, text: str, *words: str, timeout: float = CALL_SECONDS) -> str:
        try:
            return proc.output(
                [*self._client(), *SHELL], timeout=timeout, input=script(text, words)
            )
        except ProcessError as err:
            if self.is_lost():
                raise self.why_lost() from err
            raise

    def _numbers(self, said: str, count: int) -> list[int]:
        words = said.split()
        if len(words) != count or not all(re.fullmatch("[0-9]{1,20}", each) for each in words):
            raise SourceError(f"{self.name} says {said[:80]!r} where numbers should be")
        return [int(each) for each in words]

    def _fetch(self, path: Path, copy: Path) -> None:
        argv = [*self._client(), *SHELL]
        with ExitStack() as stack:
            words = stack.enter_context(os.fdopen(os.memfd_create("script"), "w+b"))
            words.write(script(FETCH, (os.fspath(path), str(MAX_FILE + 1))))
            words.seek(0)
            target = durable.create_exclusive(copy)
            stack.callback(os.close, target)
            running = stack.enter_context(proc.spawn(argv, stdin=words.fileno(), stdout=target))
            running.wait(FETCH_SECONDS)


@contextmanager
def connected(
    uri: str, runtime_dir: Path, config: str = "", *, user: str = "", password: str = ""
) -> Iterator[Connection]:
    """A connection to the libvirt of another host, which it is proven to be, for the body.

    ``config`` is a file for ssh, instead of the usual ones. The body's errors are told as such
    of the way if that is lost. Raises ConfigError, SourceError, and as ``open_connection``.
    """
    target = target_of(uri)
    with ExitStack() as stack:
        directory = stack.enter_context(_directory(runtime_dir))
        there = stack.enter_context(_master(uri, target, directory, config))
        socket = directory / "l"
        there.forward(socket, there.look(target))
        via = f"qemu+unix:///system?socket={quote(os.fspath(socket))}"
        connection = stack.enter_context(
            open_connection(uri, user=user, password=password, via=via, where=there)
        )
        there.know(connection.host_uuid())
        try:
            yield connection
        except NbdbackupError as err:
            if there.is_lost():
                raise there.why_lost() from err
            raise


@contextmanager
def _directory(runtime_dir: Path) -> Iterator[Path]:
    """A directory for sockets, ours alone; what killed processes left goes."""
    path = runtime_dir / f"{PREFIX}{os.urandom(4).hex()}"
    # ssh adds 17 characters to the name while it makes the socket
    if fault := rundir.socket_fault(path / "c.1234567890123456"):
        raise ConfigError(f"{fault}: give a shorter --runtime-dir")
    with ExitStack() as stack:
        with durable.translate_os_errors("write", runtime_dir):
            durable.make_directory(runtime_dir, rundir.MODE)
            for each in runtime_dir.glob(f"{PREFIX}*{LOCK}"):
                if not durable.is_locked(each, shared=False):
                    shutil.rmtree(each.with_suffix(""), ignore_errors=True)
                    each.unlink(missing_ok=True)
            lock = path.with_suffix(LOCK)
            stack.callback(lock.unlink, missing_ok=True)
            stack.enter_context(durable.Lock(lock, owner="a connection by ssh"))
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            path.mkdir(rundir.CLOSED)
        yield path


@contextmanager
def _master(uri: str, target: Target, directory: Path, config: str) -> Iterator[There]:
    argv = ["ssh", "-N", "-S", os.fspath(directory / "c")]
    for option in OPTIONS:
        argv += ["-o", option]
    for letter, value in (
        ("-F", config), ("-l", target.user), ("-p", target.port), ("-i", target.keyfile),
    ):  # fmt: skip
        argv += [letter, value] if value else []
    deadline = time.monotonic() + CONNECT_SECONDS
    with proc.spawn([*argv, "--", target.host]) as master:
        while not (directory / "c").exists():
            status = master.poll()
            if status is not None or time.monotonic() > deadline:
                master.stop()
                raise _no_way(uri, target, master.complaints)
            time.sleep(POLL_SECONDS)
        yield There(uri, directory, master, config)


def _no_way(uri: str, target: Target, complaints: str) -> SourceError:
    lines = [each.strip() for each in complaints.splitlines() if each.strip()]
    text = lines[-1] if lines else f"no answer within {CONNECT_SECONDS:g} s"
    cure = f"try 'ssh {target.host}' as this account"
    if "Host key verification failed" in complaints:
        cure = "put the host's key into known_hosts, once it is known to be the right one"
    elif "Permission denied" in complaints:
        cure = "let this account in by a key that needs no password"
    return SourceError(f"can't reach {uri} by ssh: {text}; {cure}", uri=uri)


def _parts(text: str) -> list[str]:
    return [each for each in text.split("\0") if each]


def _digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode(errors="surrogateescape")).hexdigest()[:32]
