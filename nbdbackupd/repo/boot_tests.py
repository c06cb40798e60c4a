"""The newest boot test of each point, kept in the set beside its manifests.

``boot-tests/<point>.json`` with the result, and ``boot-tests/<point>.png`` (or ``.ppm``) with the
last screen. They belong to no manifest: what is missing or damaged there takes nothing from the
point, and programs that do not know them leave them alone.
"""

import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from nbdbackupd import documents, durable
from nbdbackupd.errors import IntegrityError, RepositoryError
from nbdbackupd.files import open_untrusted
from nbdbackupd.repo import layout

log = logging.getLogger(__name__)
VERSION: Final = 1
MAX_SIZE: Final = 64 << 10
# a screen may show what is nobody's business
MODE: Final = 0o600


@dataclass(frozen=True, kw_only=True, slots=True)
class BootTest:
    """How a point did when it was booted. ``tested`` is RFC 3339 UTC, ``seconds`` until the end.

    ``waited_for`` is ``agent``, ``console REGEX`` or ``command PROGRAM``; ``reason`` says why it
    has failed; ``picture`` is the name of a file beside the result, or empty.
    """

    point: str
    tested: str
    passed: bool
    waited_for: str
    seconds: float
    reason: str = ""
    picture: str = ""

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "point": self.point,
            "tested": self.tested,
            "passed": self.passed,
            "waited_for": self.waited_for,
            "seconds": self.seconds,
            "reason": self.reason,
            "picture": self.picture,
        }


def write(set_path: Path, test: BootTest, picture: bytes) -> Path:
    """Replace the point's test, durably; return the path of its result.

    Raises RepositoryError or NoSpaceError.
    """
    path = set_path / layout.boot_test(test.point)
    data = json.dumps({"version": VERSION, **test.to_json()}, indent=1).encode() + b"\n"
    with (
        durable.translate_os_errors("write", path),
        durable.hold_directory(set_path, path.parent, make=True) as at,
    ):
        for old in _pictures(path):
            if old.name != test.picture:
                with suppress(FileNotFoundError):
                    os.unlink(old.name, dir_fd=at)
        if test.picture:
            durable.write_atomic(path.with_name(test.picture), picture, MODE, at=at)
        durable.write_atomic(path, data, MODE, at=at)
    return path


def picture_name(point: str, suffix: str) -> str:
    """What the picture of a point's test is called."""
    return PurePosixPath(layout.boot_test(point, suffix)).name


def read(set_path: Path) -> dict[str, BootTest]:
    """The tests of a set by point; what can't be read is as if it were not there."""
    found = {}
    try:
        durable.refuse_links(set_path, set_path / layout.BOOT_TESTS)
        paths = sorted((set_path / layout.BOOT_TESTS).glob(f"*{layout.MANIFEST_SUFFIX}"))
    except (OSError, RepositoryError) as err:
        log.info("boot tests of %s can't be read: %s", set_path, err)
        return {}
    for path in paths:
        if path.name.startswith("."):
            continue
        test = _read(path)
        if test is not None:
            found[test.point] = test
    return found


def _read(path: Path) -> BootTest | None:
    try:
        with os.fdopen(open_untrusted(path), "rb") as file:
            document = documents.parse_json(file.read(MAX_SIZE))
        if document.pop("version") != VERSION:
            return None
        kinds: dict[str, set[type]] = {"passed": {bool}, "seconds": {int, float}}
        sound = all(type(each) in kinds.get(name, {str}) for name, each in document.items())
        return BootTest(**document) if sound else None
    except (IntegrityError, OSError, ValueError, AttributeError, KeyError, TypeError) as err:
        log.info("boot test %s can't be read: %s", path, err)
        return None


def _pictures(path: Path) -> list[Path]:
    stem = path.name.removesuffix(layout.MANIFEST_SUFFIX)
    return [path.with_name(f"{stem}.{suffix}") for suffix in ("png", "ppm", "img")]
