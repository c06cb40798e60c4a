"""Programs without their packages, whose services would listen on this machine.

``scripts/install-deps`` takes them out.
"""

import os
from pathlib import Path


def taken_out(name: str) -> Path:
    """The directory that the files of a program's packages were unpacked into."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "nbdbackupd", name)
