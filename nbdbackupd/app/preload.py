"""A long run imports all of the program first: an upgrade may replace its files in the middle.

A module of the new version beside those of the old one may lack what they need, or be gone.
"""

import importlib
import logging
import pkgutil
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)
PACKAGE: Final = __name__.partition(".")[0]


def preload() -> None:
    """Import every module of the package; those whose libraries are not installed are left out."""
    for found in pkgutil.walk_packages([str(Path(__file__).parents[1])], f"{PACKAGE}."):
        try:
            importlib.import_module(found.name)
        except ImportError as err:
            log.debug("%s is left out: %s", found.name, err)
