"""A set that somebody has changed, with digests that are right: what a stranger may hand over."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nbdbackupd.format import manifest
from nbdbackupd.model.chain import StoredFile
from tests.lib.scene import Scene


def altered(
    scene: Scene, into: Path, change: Callable[[str], str], *added: tuple[StoredFile, bytes]
) -> Path:
    """A copy of the set in which the newest point was saved with another definition.

    ``added`` are files that it holds beside its own.
    """
    shutil.copytree(scene.set, into)
    (path,) = (into / "points").glob(f"*-{scene.history[-1].id}.json")
    point = manifest.parse(path.read_bytes())
    (old,) = [file for file in point.files if file.role == "domain-xml"]
    text = (into / old.name).read_text()
    data = change(text).encode()
    assert data.decode() != text
    (into / old.name).write_bytes(data)
    new = replace(old, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    files = [new if file is old else file for file in point.files]
    for stored, content in added:
        (into / stored.name).write_bytes(content)
        files.append(stored)
    path.write_bytes(manifest.pack(replace(point, files=tuple(files))))
    return into
