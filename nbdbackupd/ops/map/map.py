"""``map``: the disks of a restore point as NBD servers, without restoring anything.

The point is opened and proven here, all but its blocks; then each disk gets an nbdkit with our
plugin (``app/nbdkit_plugin.py``), which inherits the open files: what happens to their names
afterwards does not matter. Each map has a directory of its own, see ``ops/map/mapped.py``.
"""

import ipaddress
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

from nbdbackupd import durable, proc, rundir
from nbdbackupd.errors import ConfigError, ProcessError, RepositoryError, UsageError
from nbdbackupd.model.choice import NEWEST
from nbdbackupd.ops.map import kernel_nbd, mapped, plan
from nbdbackupd.ops.map.mapped import Home, Mapping, ServedDisk
from nbdbackupd.ops.map.plan import Found, Handover, MapRequest

__all__ = ["MapRequest", "Mapping", "ServedDisk", "Serving", "detach", "serve", "serving"]

log = logging.getLogger(__name__)

PACKAGE: Final = Path(proc.__file__).parent
START_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.003
THREADS: Final = 4
"""For each connection; more of them only wait for one another."""

NO_PLUGIN: Final = (
    "nbdkit can't run Python: install the package nbdkit-plugin-python (Debian) or "
    "nbdkit-python-plugin (Fedora, EL)"
)
SELINUX: Final = Path("/sys/fs/selinux/enforce")
SOCKET_LABEL: Final = "system_u:object_r:svirt_socket_t:s0"
"""What QEMU of libvirt may connect to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """A map that is up. ``check`` raises ProcessError if a server has ended.

    It also logs what the servers have said of damaged blocks since the last call, and returns the
    number of those that were met so far.
    """

    mapping: Mapping
    warnings: tuple[str, ...]
    check: Callable[[], int]

    @property
    def disks(self) -> tuple[ServedDisk, ...]:
        """What is served."""
        return self.mapping.disks


@contextmanager
def serve(
    request: MapRequest, *, cancelled: Callable[[], None]
) -> Iterator[tuple[ServedDisk, ...]]:
    """Serve while the block runs; as ``serving``."""
    with serving(request, cancelled=cancelled) as up:
        yield up.disks


@contextmanager
def _explained() -> Iterator[None]:
    """Tell of a plugin that is not installed: nbdkit's last words are about something else."""
    try:
        yield
    except ProcessError as err:
        try:
            proc.output(["nbdkit", "python", "--dump-plugin"], timeout=START_SECONDS)
        except ProcessError as other:
            if "not found" not in str(other):
                raise ProcessError(NO_PLUGIN) from err
        raise


@contextmanager
def serving(request: MapRequest, *, cancelled: Callable[[], None]) -> Iterator[Serving]:
    """Serve while the block runs: one nbdkit for each disk, all gone at the end with their files.

    The servers die with this process, or with the thread that calls this. ``cancelled`` is polled
    until all are ready. Raises UsageError, ConfigError, RepositoryError, ChainBrokenError,
    FormatError, IntegrityError, BusyError, ProcessError.
    """
    check_request(request)
    with ExitStack() as stack:
        found = plan.find(request, cancelled)
        home = mapped.make_home(request.runtime_dir)
        stack.callback(mapped.discard, home)
        running = [
            _start(request, found, home, place, stack, cancelled=cancelled)
            for place in _places(request, found, home)
        ]
        served = []
        for each in running:
            with _explained():
                _await(each.place, cancelled, each.process.check)
            pid = each.process.pid
            served.append(_opened_up(request, each.place, each.size, pid, stack))
        mapping = _noted(request, found, home, served, keeper=os.getpid())

        def check() -> int:
            for each in running:
                each.process.check()
            return sum(each.report.read() for each in running)

        yield Serving(mapping=mapping, warnings=found.warnings, check=check)


def detach(request: MapRequest, *, cancelled: Callable[[], None]) -> Serving:
    """Serve until ``mapped.end``: the servers go on without us. Otherwise as ``serving``."""
    check_request(request)
    with ExitStack() as stack:
        found = plan.find(request, cancelled)
        home = mapped.make_home(request.runtime_dir)
        stack.callback(mapped.discard, home)
        served: list[ServedDisk] = []
        for place in _places(request, found, home):
            stack.callback(mapped.remove_socket, place.socket)
            with plan.handover(request, found, place.target, cancelled) as given:
                stack.callback(mapped.stop, place.pid_file, home)
                # it goes into the background, writes its id, and is ready
                with _explained():
                    proc.output(
                        ["nbdkit", *_argv(request, place, given)],
                        timeout=START_SECONDS,
                        pass_fds=(*given.fds, home.lock),
                        env=_environment(),
                        must_finish=True,
                    )
                _await(place, cancelled, lambda: None)
                pid = int(place.pid_file.read_text())
                served.append(_opened_up(request, place, given.size, pid, stack))
            cancelled()
        mapping = _noted(request, found, home, served, keeper=0)
        stack.pop_all()
        os.close(home.lock)
    return Serving(mapping=mapping, warnings=found.warnings, check=lambda: 0)


def check_request(request: MapRequest) -> None:
    """Raise UsageError for what contradicts itself, ConfigError for what this host lacks."""
    if bool(request.sequence) == (request.source is not None):
        raise UsageError("give either a backup set or a sequence of stream files")
    if request.sequence and (request.choice != NEWEST or request.disks):
        raise UsageError("a sequence of stream files is one point of one disk: choose none")
    if request.tcp and (request.socket or request.device):
        raise UsageError("--tcp goes without --socket and --device")
    _check_clients(request)
    if request.device:
        kernel_nbd.check(request.device)


def _check_clients(request: MapRequest) -> None:
    """See that a port is open to those only whom the user means, or that the user says so."""
    ways = sum(map(bool, (request.certificates, request.psk, request.insecure)))
    if not request.tcp:
        if ways:
            raise UsageError("--tls-certificates, --tls-psk and --insecure are for --tcp only")
        return
    if ways > 1:
        raise UsageError("give one of --tls-certificates, --tls-psk and --insecure")
    if not ways:
        raise UsageError(
            f"{readers(request.tcp[0])} could read the disks: give --tls-certificates or "
            f"--tls-psk, or --insecure if that is meant, or serve on a socket instead"
        )
    if request.psk:
        with durable.translate_os_errors("read", request.psk):
            found = request.psk.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
            raise ConfigError(f"keys in {request.psk} can be read by others: chmod 600 it")


def readers(address: str) -> str:
    """Who can connect to a port of this address."""
    if ipaddress.ip_address(address).is_loopback:
        return "every account of this host"
    return f"everybody who reaches {address}, and all on the way,"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where one disk is served: on a socket, or on a port."""

    target: str
    pid_file: Path
    socket: Path | None
    port: int = 0


def _places(request: MapRequest, found: Found, home: Home) -> list[_Place]:
    places = []
    is_file = len(found.targets) == 1 and request.socket and not request.socket.is_dir()
    if request.socket and not is_file:
        with durable.translate_os_errors("create", request.socket):
            durable.make_directory(request.socket)
    for number, target in enumerate(found.targets):
        is_plain = target.isascii() and target.isalnum() and len(target) <= 16
        name = target if is_plain else f"disk{number}"
        pid_file = home.path / f"{name}.pid"
        if request.tcp:
            port = request.tcp[1] + number
            places.append(_Place(target=target, pid_file=pid_file, socket=None, port=port))
            continue
        directory = request.socket or home.path
        socket = directory if is_file else directory / f"{name}.sock"
        _check_socket(socket)
        places.append(_Place(target=target, pid_file=pid_file, socket=socket))
    return places


def _check_socket(socket: Path) -> None:
    if fault := rundir.uri_fault(socket):
        raise ConfigError(f"{fault}: give another with --socket, or another --runtime-dir")
    if os.path.lexists(socket):
        raise RepositoryError(f"{socket} exists: remove it, or give another --socket")


def _environment() -> dict[str, str]:
    """Where nbdkit's Python finds our package; and one heap.

    With one for each thread, what unpacked blocks leave in them came to half the cache again.
    """
    return {"PYTHONPATH": str(PACKAGE.parent), "MALLOC_ARENA_MAX": "1"}


def _argv(request: MapRequest, place: _Place, given: Handover) -> list[str]:
    argv = ["-t", str(THREADS), "-P", str(place.pid_file)]
    if place.socket is not None:
        argv += ["-U", str(place.socket)]
        if SELINUX.exists():
            argv.append(f"--selinux-label={SOCKET_LABEL}")
    elif request.tcp:
        argv += ["-i", request.tcp[0], "-p", str(place.port)]
    if request.certificates:
        # without the last one a client need not show a certificate
        argv += [f"--tls-certificates={request.certificates}", "--tls-verify-peer"]
    if request.psk:
        argv.append(f"--tls-psk={request.psk}")
    if request.has_tls:
        argv.append("--tls=require")
    argv.append("--filter=cow" if request.writable else "-r")
    script = PACKAGE / "app" / "nbdkit_plugin.py"
    return [*argv, "python", str(script), f"plan={given.plan}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    """A server of ours that was started; ``size`` of its disk in bytes."""

    place: _Place
    process: proc.Process
    report: "_Report"
    size: int


def _start(
    request: MapRequest,
    found: Found,
    home: Home,
    place: _Place,
    stack: ExitStack,
    *,
    cancelled: Callable[[], None],
) -> _Running:
    """Start a server that ends with the stack; it inherits what it needs, we keep nothing."""
    stack.callback(mapped.remove_socket, place.socket)
    with (
        plan.handover(request, found, place.target, cancelled) as given,
        _Report(place.target, stack) as report,
    ):
        words = ["-f", "--exit-with-parent", *_argv(request, place, given)]
        process = stack.enter_context(
            proc.spawn(
                ["nbdkit", *words, f"report={report.writer}"],
                pass_fds=(*given.fds, home.lock, report.writer),
                # asked kindly, it would wait for its clients; it has nothing to lose
                env=_environment(),
                grace_seconds=0,
            )
        )
        return _Running(place=place, process=process, report=report, size=given.size)


def _await(place: _Place, cancelled: Callable[[], None], check: Callable[[], None]) -> None:
    """Wait until the server writes its id, which it does when it is ready."""
    deadline = time.monotonic() + START_SECONDS
    while not place.pid_file.exists() or not place.pid_file.read_bytes().endswith(b"\n"):
        cancelled()
        check()
        if time.monotonic() > deadline:
            raise ProcessError(f"nbdkit was not ready within {START_SECONDS:g} s")
        time.sleep(POLL_SECONDS)


def _opened_up(
    request: MapRequest, place: _Place, size: int, pid: int, stack: ExitStack
) -> ServedDisk:
    """What a server that is ready still lacks: rights of its socket, the kernel's device."""
    if place.socket is not None:
        with durable.translate_os_errors("change", place.socket):
            place.socket.chmod(0o600)
            if request.owner:
                os.chown(place.socket, *request.owner)
                place.pid_file.parent.chmod(0o711)
    if request.device and place.socket is not None:
        stack.callback(kernel_nbd.detach, request.device)
        kernel_nbd.attach(request.device, place.socket)
    return ServedDisk(
        target=place.target,
        size=size,
        uri=_uri(request, place),
        socket=place.socket,
        pid=pid,
        device=request.device,
    )


def _uri(request: MapRequest, place: _Place) -> str:
    if place.socket is not None:
        return f"nbd+unix:///?socket={quote(str(place.socket))}"
    address = request.tcp[0] if request.tcp else ""
    host = f"[{address}]" if ":" in address else address
    return f"{'nbds' if request.has_tls else 'nbd'}://{host}:{place.port}"


def _noted(
    request: MapRequest, found: Found, home: Home, disks: list[ServedDisk], *, keeper: int
) -> Mapping:
    mapping = Mapping(
        id=home.path.name,
        purpose=request.purpose,
        source=str(request.source or request.sequence[-1]),
        point=found.name,
        domain=found.domain,
        created=found.created,
        writable=request.writable,
        keeper=keeper,
        disks=tuple(disks),
    )
    mapped.note(home, mapping)
    return mapping


class _Report:
    """What a server says of damage, on a socket that it inherits (it closes its output).

    When our end is gone, the server ends at once, with or without clients. A context manager,
    while which the server's end is open here, too; ours is closed with the stack.
    """

    def __init__(self, target: str, stack: ExitStack) -> None:
        self._target = target
        self._rest = b""
        self._damaged = 0
        ours, self._theirs = socket.socketpair()
        self._ours = stack.enter_context(ours)
        self._ours.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._theirs.close()

    @property
    def writer(self) -> int:
        """The server's end."""
        return self._theirs.fileno()

    def read(self) -> int:
        """Log what was said since the last call; how many blocks were damaged so far."""
        try:
            said = self._ours.recv(1 << 16)
        except BlockingIOError:
            said = b""
        *lines, self._rest = (self._rest + said).split(b"\n")
        self._damaged += len(lines)
        for line in lines:
            log.error("disk %s of a map: %s", self._target, line.decode(errors="replace"))
        return self._damaged
