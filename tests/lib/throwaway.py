"""The host's system as a throwaway: a script changes what it likes and nothing of it remains."""

from pathlib import Path
from typing import Final

from tests.lab.command import run

PREPARE: Final = """
set -eu
top=$1 share=$2
mount --make-rprivate /
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" overlay "$top/root"
for directory in proc dev sys; do mount --rbind "/$directory" "$top/root/$directory"; done
mount -t tmpfs tmpfs "$top/root/run"
mount -t tmpfs tmpfs "$top/root/tmp"
mount -t tmpfs tmpfs "$top/root/var/tmp"
mkdir "$top/root/tmp/share"
mount --bind "$share" "$top/root/tmp/share"
exec chroot "$top/root" /bin/sh -eu /tmp/share/script
"""


def run_in_copy(script: str, share: Path, timeout_seconds: float = 120) -> str:
    """Run a shell script as root in a copy of this system, and return what it printed.

    ``share`` is /tmp/share there, the one directory whose changes remain. /run is empty, so
    there is no systemd. Raises LabError if the script fails.
    """
    (share / "script").write_text(script)
    top = share.parent / f"{share.name}-top"
    top.mkdir(exist_ok=True)
    return run(
        ["unshare", "--mount", "sh", "-c", PREPARE, "-", top, share],
        timeout_seconds=timeout_seconds,
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        cwd=Path("/"),
    )
