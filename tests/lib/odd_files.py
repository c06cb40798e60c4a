"""A directory as an odd file system shows it: what CIFS, FAT, object gateways and WORM do.

``oddities`` are words: ``fold`` (names are stored in lower case), ``short`` (long ones are cut),
``nochmod`` (modes can't be set), ``noheed`` (they can, without effect), ``open`` (all files look
readable by everybody), ``nodelete`` (nothing can be removed), ``noreplace`` (no rename onto an
existing file), ``nodirsync`` (fsync of a directory is invalid). Run as a program it serves until
unmounted.
"""

# ruff: noqa: ARG002, PTH101, PTH102, PTH104, PTH106, PTH108, PTH208
# - signatures are those of FUSE, and each call is passed on as it is

import errno
import importlib
import os
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.process import wait_until

PYTHON = "/usr/bin/python3"
LONGEST = 30


@contextmanager
def mounted(below: Path, at: Path, *oddities: str) -> Iterator[Path]:
    """Show ``below`` at ``at``; both are made."""
    for each in (below, at):
        each.mkdir(parents=True, exist_ok=True)
    argv = [PYTHON, "-m", "tests.lib.odd_files", str(below), str(at), *oddities]
    with subprocess.Popen(argv, cwd=Path(__file__).parents[2]) as server:
        try:
            wait_until(lambda: os.path.ismount(at) or server.poll() is not None, "the mount", 20)
            assert server.poll() is None
            yield at
        finally:
            # mount namespaces of others may hold copies, so it would not end by itself
            subprocess.run(["umount", "--lazy", at], check=False, capture_output=True)
            server.kill()


def serve(below: str, at: str, oddities: set[str]) -> None:
    """Serve in the foreground."""
    fuse: Any = importlib.import_module("fusepy")

    def stored(path: str) -> str:
        if "fold" in oddities:
            path = path.lower()
        if "short" in oddities:
            path = "/".join(
                f"{each[:20]}~{zlib.crc32(each.encode()):x}" if len(each) > LONGEST else each
                for each in path.split("/")
            )
        return below + path

    class Odd(fuse.Operations):  # type: ignore[misc]
        """Passes all on, but for the oddities."""

        def __call__(self, op: str, path: str, *rest: Any) -> Any:
            return super().__call__(op, stored(path), *rest)

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            found = os.lstat(path)
            names = ("st_atime", "st_ctime", "st_mtime", "st_gid", "st_uid", "st_mode", "st_nlink",
                     "st_size", "st_blocks", "st_ino")  # fmt: skip
            shown = {name: getattr(found, name) for name in names}
            if "open" in oddities:
                shown["st_mode"] |= 0o755 if stat.S_ISDIR(found.st_mode) else 0o644
            return shown

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *os.listdir(path)]

        def chmod(self, path: str, mode: int) -> None:
            if "nochmod" in oddities:
                raise fuse.FuseOSError(errno.EPERM)
            if "noheed" not in oddities:
                os.chmod(path, mode)

        def rename(self, path: str, new: str) -> None:
            new = stored(new)
            if "noreplace" in oddities and os.path.lexists(new):
                raise fuse.FuseOSError(errno.EPERM)
            os.rename(path, new)

        def unlink(self, path: str) -> None:
            if "nodelete" in oddities:
                raise fuse.FuseOSError(errno.EPERM)
            os.unlink(path)

        def rmdir(self, path: str) -> None:
            if "nodelete" in oddities:
                raise fuse.FuseOSError(errno.EPERM)
            os.rmdir(path)

        def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
            if "nodirsync" in oddities:
                raise fuse.FuseOSError(errno.EINVAL)

        def mkdir(self, path: str, mode: int) -> None:
            os.mkdir(path, mode)

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

        def open(self, path: str, flags: int) -> int:
            return os.open(path, flags & ~os.O_CREAT)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> None:
            os.truncate(path if fh is None else fh, length)

        def fsync(self, path: str, datasync: int, fh: int) -> None:
            os.fsync(fh)

        def flush(self, path: str, fh: int) -> None:
            pass

        def release(self, path: str, fh: int) -> None:
            os.close(fh)

        def statfs(self, path: str) -> dict[str, int]:
            found = os.statvfs(path)
            names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_files", "f_ffree", "f_frsize",
                     "f_namemax")  # fmt: skip
            return {name: getattr(found, name) for name in names}

        def utimens(self, path: str, times: tuple[float, float] | None = None) -> None:
            os.utime(path, times)

    os.umask(0)
    fuse.FUSE(Odd(), at, foreground=True, nothreads=True, default_permissions=True, big_writes=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], set(sys.argv[3:]))
