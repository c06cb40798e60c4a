"""Files that survive a power cut, and locks that survive their holder.

The primitives raise ``OSError``; ``translate_os_errors`` turns it into the typed errors at the
border of a package.
"""

import errno
import fcntl
import logging
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from nbdbackupd import plain
from nbdbackupd.errors import BusyError, NoSpaceError, RepositoryError

log = logging.getLogger(__name__)
_told: set[int] = set()

TEMPORARY_PREFIX: Final = ".nbdbackup-tmp-"
"""How unfinished files of ``write_atomic`` begin; a killed writer leaves one behind."""

LOCK_POLL_SECONDS: Final = 0.1
BRIEF_SECONDS: Final = 60.0
TELL_SECONDS: Final = 0.5
NAMELESS: Final = "another process"
LOCK_MODE: Final = 0o600
MAX_HOLDER: Final = 256
MAX_HOST: Final = 64

_NO_MODES: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
"""What chmod answers where there are no modes: we own what we make, so it is never about us."""

_CAUTIOUS: Final = os.O_NOFOLLOW | os.O_NONBLOCK
"""A lock lies where others may write: no link is followed, and no pipe is waited for."""

_DIRECTORY: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY

RUN_USER: Final = "/run/user/"
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ADVICE: Final = {
    errno.EROFS: "the file system is mounted read-only",
    errno.EIO: "the storage reports errors, see the kernel's log",
    errno.EACCES: "check owner and mode",
    errno.EPERM: "check owner and mode",
    errno.ESTALE: "the network file system lost it",
}


@contextmanager
def translate_os_errors(action: str, path: Path | str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a typed error that says what was done and where.

    Raises NoSpaceError for ENOSPC, EDQUOT and EFBIG, RepositoryError for every other OSError.
    """
    try:
        yield
    except OSError as err:
        place = os.fspath(err.filename) if isinstance(err.filename, str | Path) else path
        reason = err.strerror or type(err).__name__
        if err.errno in _FULL:
            message = f"can't {action} {place}: {reason}; free space on the target and run again"
            raise NoSpaceError(message) from err
        advice = _ADVICE.get(err.errno or 0)
        if os.fspath(place).startswith(RUN_USER):
            advice = "log in so that XDG_RUNTIME_DIR is made and set, or give --runtime-dir"
        message = f"can't {action} {place}: {reason}" + (f"; {advice}" if advice else "")
        raise RepositoryError(message) from err


def fsync_file(file: Path | int) -> None:
    """Wait until a file's data and metadata are on the device.

    ``file`` is a path or an open descriptor. NFS reports late write errors here, as OSError.
    """
    if isinstance(file, int):
        os.fsync(file)
        return
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_directory(path: Path | int) -> None:
    """Wait until the names in a directory, a path or a held one, are on the device.

    File systems that know no such thing (some FUSE and SMB mounts answer EINVAL) are let pass:
    there is nothing better to ask of them.
    """
    fd = path if isinstance(path, int) else os.open(path, _DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        if fd != path:
            os.close(fd)


def create_exclusive(path: Path, mode: int = 0o600, *, at: int | None = None) -> int:
    """Create a file that must not exist and return its descriptor, open for reading and writing.

    The mode holds whatever the umask is, as ``set_mode`` says. ``at`` is its directory, held by
    ``hold_directory``. Raises FileExistsError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(_in(at, path), flags, mode, dir_fd=at)
    try:
        set_mode(path, mode, fd)
    except BaseException:
        os.close(fd)
        with suppress(OSError):
            os.unlink(_in(at, path), dir_fd=at)
        raise
    return fd


def _in(at: int | None, path: Path) -> str:
    """What a path is called from its directory, if that is held."""
    return os.fspath(path) if at is None else path.name


def set_mode(path: Path, mode: int, fd: int | None = None) -> None:
    """Give a file of ours its mode, by its descriptor if there is one.

    File systems without modes of their own (CIFS, FAT, some FUSE) refuse that or don't heed it.
    Then a file that others could read is let be, with one warning for all, only where a
    directory above shuts them out. Raises RepositoryError where none does, OSError.
    """
    file = path if fd is None else fd
    if stat.S_IMODE(os.stat(file).st_mode) == mode:  # noqa: PTH116 - of a descriptor, too
        return
    reason = "it has no effect"
    try:
        os.chmod(file, mode)  # noqa: PTH101 - of a descriptor, too
    except OSError as err:
        if err.errno not in _NO_MODES:
            raise
        reason = err.strerror or "refused"
    found = os.stat(file)  # noqa: PTH116 - as above
    more = stat.S_IMODE(found.st_mode) & ~mode & (0o077 if found.st_gid else 0o007)
    if not more:
        return
    above = _private_directory(path)
    if above is None:
        raise RepositoryError(
            f"can't give {path} mode {mode:o}: {reason}; others could read it, so mount the file "
            f"system with modes that shut them out (CIFS: file_mode=0600,dir_mode=0700; FAT: "
            f"umask=077), or choose a place below a directory of mode 700"
        )
    if found.st_dev not in _told:
        _told.add(found.st_dev)
        log.warning(
            "modes of files can't be set on the file system of %s (%s): only %s, which nobody "
            "else may enter, protects them",
            path.parent,
            reason,
            above,
        )


def _private_directory(path: Path) -> Path | None:
    """The nearest directory above a file that only its owner may enter, one that we trust."""
    for above in path.absolute().parents:
        found = above.stat()
        if not found.st_mode & 0o011 and found.st_uid in (0, os.geteuid()):
            return above
    return None


def admit(directory: Path, uid: int, gid: int) -> None:
    """Let one more account into a private directory of ours, to make files there.

    By an access control list (linux/posix_acl_xattr.h): so the directory stays ours, and a unit
    need not be able to give files away. Where there are none it is given to that account.
    Raises OSError.
    """
    directory.chmod(0o700)
    nobody = 0xFFFFFFFF
    entries = ((1, 7, nobody), (2, 7, uid), (4, 0, nobody), (16, 7, nobody), (32, 0, nobody))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)
    try:
        os.setxattr(directory, "system.posix_acl_access", acl)
    except OSError as err:
        if err.errno not in (errno.ENOTSUP, errno.EINVAL):
            raise
        os.chown(directory, uid, gid)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte at the descriptor's position, however many calls it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def rename(source: Path, target: Path) -> None:
    """Give a file or directory another name: all renames of published things go through here.

    Raises OSError.
    """
    source.rename(target)


def write_atomic(path: Path, data: bytes, mode: int = 0o600, *, at: int | None = None) -> None:
    """Replace or create a file: readers and a power cut see the old content or all of the new.

    Durable on return. ``at`` is its directory, held by ``hold_directory``. Raises OSError; the
    temporary file is removed then.
    """
    # A random name of fixed length: the final name may already be as long as names can be.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}")
    fd = create_exclusive(temporary, mode, at=at)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(_in(at, temporary), _in(at, path), src_dir_fd=at, dst_dir_fd=at)
    except BaseException:
        with suppress(OSError):
            os.unlink(_in(at, temporary), dir_fd=at)
        raise
    fsync_directory(path.parent if at is None else at)


def make_directory(path: Path, mode: int = 0o700) -> None:
    """Create a directory and its missing parents, durably; one that exists is left as it is.

    Others may pass through the parents, not list them: what is private is the directory itself,
    and QEMU has to get to its scratch files below the same parent.
    The mode holds whatever the umask is, but where file systems have none of their own: what
    lies in it is protected by itself.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_directory(path.parent, mode | 0o111)
    with suppress(FileExistsError):
        path.mkdir(mode)
        if stat.S_IMODE(path.stat().st_mode) != mode:
            with _without_modes():
                path.chmod(mode)
        fsync_directory(path.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """How long somebody else's lock is waited for; ``cancelled`` raises to end that.

    A holder whose owner contains ``brief`` is waited for a minute at least: its work is short.
    ``told`` gets a line about whom we wait for, once, if it takes longer than half a second.
    ``option`` is what makes it longer on the command line, for the one who waited in vain.
    """

    seconds: float = 0.0
    cancelled: Callable[[], None] = lambda: None
    brief: str = ""
    told: Callable[[str], None] = lambda _: None
    option: str = ""

    @property
    def cure(self) -> str:
        """What can be done if it was too short."""
        return f"try later, or use {self.option}" if self.option else "try later"

    def limit(self, who: str) -> float:
        """So many seconds for this holder."""
        if not self.brief:
            return self.seconds
        if who == NAMELESS:
            return max(self.seconds, TELL_SECONDS)
        return max(self.seconds, BRIEF_SECONDS) if self.brief in who else self.seconds


NO_WAIT: Final = Wait()


def refuse_links(root: Path, *paths: Path) -> None:
    """Refuse directories that are, or lie behind, a symbolic link below ``root``.

    Who may write there could choose with it where we read and write. What is missing is fine, and
    ``root`` may be a link itself: the user named it. Raises RepositoryError.
    """
    for path in paths:
        for part in (path, *path.parents):
            if part == root:
                break
            if part.is_symlink():
                raise _refused(part)


def _refused(link: Path) -> RepositoryError:
    return RepositoryError(
        f"{link} is a symbolic link, and may lead anywhere: put a directory there"
    )


@contextmanager
def hold_directory(root: Path, path: Path, *, make: bool = False) -> Iterator[int]:
    """Hold ``path``, ``root`` or below it, open; gives its descriptor, for ``dir_fd`` and ``at``.

    Whoever swaps a directory below ``root`` for a link meanwhile leads nothing elsewhere: what is
    done with the descriptor happens in the directory that was found without following one.
    ``root`` may be a link itself, and must exist. ``make`` creates what is missing below it,
    durably, with mode 0700. An OSError of the block tells the path of what it names.

    Raises RepositoryError for a link, OSError.
    """
    fd = os.open(root, _DIRECTORY)
    try:
        part = root
        for name in path.relative_to(root).parts:
            part /= name
            inner = _enter(fd, part, make=make)
            os.close(fd)
            fd = inner
        try:
            yield fd
        except OSError as err:
            if isinstance(err.filename, str) and "/" not in err.filename:
                err.filename = os.fspath(path / err.filename)
            raise
    finally:
        os.close(fd)


def _enter(outer: int, path: Path, *, make: bool) -> int:
    """Open a directory that lies in an open one, and is no link."""
    is_made = False
    if make:
        with suppress(FileExistsError):
            os.mkdir(path.name, 0o700, dir_fd=outer)
            is_made = True
    try:
        fd = os.open(path.name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=outer)
    except OSError as err:
        # that it is a link is told as ENOTDIR
        with suppress(FileNotFoundError):
            if stat.S_ISLNK(os.stat(path.name, dir_fd=outer, follow_symlinks=False).st_mode):
                raise _refused(path) from err
        err.filename = os.fspath(path)
        raise
    try:
        if is_made:
            if stat.S_IMODE(os.fstat(fd).st_mode) != 0o700:
                with _without_modes():
                    os.fchmod(fd, 0o700)
            fsync_directory(outer)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def _without_modes() -> Iterator[None]:
    """Let pass that a file system has no modes of its own."""
    try:
        yield
    except OSError as err:
        if err.errno not in _NO_MODES:
            raise


def remove_staged(path: Path, last: str) -> None:
    """Remove a directory of unfinished work, the file ``last`` in it last. Raises OSError.

    Raises RepositoryError if a link has its name.
    """
    with hold_directory(path.parent, path) as at:
        with os.scandir(at) as found:
            entries = sorted(found, key=lambda entry: entry.name == last)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.name, dir_fd=at)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(entry.name, dir_fd=at)
    path.rmdir()


def make_private_directory(path: Path, top: Path) -> None:
    """Create a directory at ``top`` or below it for ourselves; all may pass those above ``top``.

    Beside it lies what QEMU's account must get to.
    """
    make_directory(top.parent, 0o755)
    make_directory(top)
    make_directory(path)


class Lock:
    """An exclusive lock of the kernel on a file; a context manager.

    The kernel drops the lock when its holder dies, so no lock is ever stale. The file stays:
    removing it would let two processes hold locks on two files of one name.
    """

    def __init__(
        self,
        path: Path,
        *,
        owner: str,
        wait: Wait = NO_WAIT,
    ) -> None:
        """Name the file and what the lock is for; ``with`` acquires it.

        ``owner`` is what others are told who find it locked ("backup of vm1"). The directory
        must exist.
        """
        self.path = path
        self._owner = owner
        self._wait = wait
        self._fd = -1

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock now."""
        return self._fd >= 0

    def __enter__(self) -> Self:
        """Acquire the lock.

        Raises BusyError that names the holder when the wait is over, what its ``cancelled``
        raises, RepositoryError if something else has its name, OSError if it can't be made.
        """
        begun = time.monotonic()
        limit = 0.0
        is_told = False
        while not self._try():
            who, waited = holder(self.path), time.monotonic() - begun
            # one who has just come, or is leaving, is without a name for a moment
            limit = max(limit, self._wait.limit(who))
            left = limit - waited
            if left <= 0:
                after = f" after {waited:.1f} s" if waited >= TELL_SECONDS else ""
                raise BusyError(f"{self.path} is locked{after} by {who}; {self._wait.cure}")
            if not is_told and waited >= TELL_SECONDS:
                is_told = True
                self._wait.told(f"waiting for {who}")
            self._wait.cancelled()
            time.sleep(min(LOCK_POLL_SECONDS, left))
        return self

    def __exit__(self, *_: object) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                with suppress(OSError):
                    os.ftruncate(fd, 0)
            finally:
                os.close(fd)

    def _try(self) -> bool:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _CAUTIOUS
        # who may open a file for reading may lock it, and so stop us for good
        fd = os.open(self.path, flags, LOCK_MODE)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise RepositoryError(f"{self.path} is no regular file, and no lock: remove it")
            _close_to_others(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not self._is_current(fd):
                return False
            self._fd, fd = fd, -1
        finally:
            if fd >= 0:
                os.close(fd)
        # Only a courtesy to others: a full disk must not keep prune from locking and freeing it.
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
            text = f"{os.getpid()} {self._owner}".encode(errors="backslashreplace")
            host = f"\n{_host()}".encode(errors="backslashreplace")
            os.pwrite(self._fd, text[: MAX_HOLDER - len(host)] + host, 0)
        return True

    def _is_current(self, fd: int) -> bool:
        """Whether the locked file is still the one of that name (an administrator may remove)."""
        mine = os.fstat(fd)
        try:
            named = os.lstat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(mine, named)


def _close_to_others(fd: int) -> None:
    """Take a lock's file away from other accounts; earlier versions made it readable."""
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077 and found.st_uid == os.geteuid():
        # some network file systems have no modes
        with suppress(OSError):
            os.fchmod(fd, LOCK_MODE)


def is_locked(path: Path, *, shared: bool = True) -> bool:
    """Whether somebody holds a lock on a file that forbids a ``shared`` one, or else any lock.

    It is tried, and held for that moment. A file that is missing is not locked. Raises OSError.
    """
    try:
        access = os.O_RDONLY if shared else os.O_RDWR  # NFS wants that
        fd = os.open(path, access | os.O_CLOEXEC | _CAUTIOUS)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def holder(path: Path) -> str:
    """Who holds a lock, as "process 123 (backup of vm1)", for messages.

    One on another host is "process 123 on host b (backup of vm1)".
    """
    pid, what, host = _holder(path)
    if not pid.isascii() or not pid.isdigit():
        return NAMELESS
    where = f" on host {host}" if host not in ("", _host()) else ""
    return f"process {pid}{where} ({what})"


def is_foreign(path: Path) -> bool:
    """Whether it was another host that wrote into a lock last, by what it wrote."""
    return _holder(path)[2] not in ("", _host())


def _holder(path: Path) -> tuple[str, str, str]:
    """Process id, purpose, host as they stand in a lock, safe to print."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | _CAUTIOUS), "rb") as file:
            text = (file.read(MAX_HOLDER) or b"").decode(errors="backslashreplace")
    except OSError:
        text = ""
    line, _, host = text.partition("\n")
    pid, _, what = line.partition(" ")
    return pid, plain.line(what), plain.line(host)


def _host() -> str:
    return os.uname().nodename[:MAX_HOST]
