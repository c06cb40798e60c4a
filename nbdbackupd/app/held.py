"""A long run holds all of its program: an upgrade may replace the files in the middle.

A module of the new version beside those of the old one may lack what they need, or be gone. So
the files of all modules that are not imported yet are read, and imports are served from there.
Reading them takes a hundredth of a second, importing them all over a tenth.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import cache_from_source, spec_from_file_location
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = __name__.partition(".")[0]


class _Loader(SourceFileLoader):
    """As Python's own, but all that it reads was read before, and it writes nothing."""

    def __init__(self, name: str, file: str) -> None:
        super().__init__(name, file)
        self._stats = super().path_stats(file)
        self._contents = {file: super().get_data(file)}
        compiled = cache_from_source(file)
        with suppress(OSError):
            self._contents[compiled] = super().get_data(compiled)

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        """Of the source; no other file is asked about."""
        return self._stats if path == self.path else {}

    def get_data(self, path: Any) -> bytes:
        """What the file held."""
        found = self._contents.get(path)
        if found is None:
            raise FileNotFoundError(path)
        return found

    def set_data(self, path: Any, data: Any, *, _mode: int = 0o666) -> None:
        """Nothing: that place may be another version's by now."""


class _Finder:
    """Finds the modules of this package among those that were read, and nowhere else."""

    def __init__(self, loaders: dict[str, _Loader]) -> None:
        self._loaders = loaders

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder, which is not imported since that takes long."""
        if not name.startswith(f"{PACKAGE}."):
            return None
        loader = self._loaders.get(name)
        if loader is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec_from_file_location(name, loader.path, loader=loader)


def hold() -> None:
    """Read every module of the package that is not imported yet."""
    top = str(Path(__file__).parents[1])
    loaders = {}
    for folder, _, files in os.walk(top):
        package = PACKAGE + folder[len(top) :].replace(os.sep, ".")
        for file in files:
            stem, _, suffix = file.rpartition(".")
            name = package if stem == "__init__" else f"{package}.{stem}"
            if suffix == "py" and name not in sys.modules:
                loaders[name] = _Loader(name, f"{folder}/{file}")
    sys.meta_path.insert(0, _Finder(loaders))
