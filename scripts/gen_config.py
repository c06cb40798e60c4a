"""The body of scripts/gen-config: files that are made from the configuration's schema."""

import sys
from collections.abc import Mapping
from pathlib import Path

from nbdbackupd.config import manpage, sample
from scripts.generated import TOP, main


def generated() -> Mapping[Path, str]:
    """Each file and what must stand in it."""
    return {
        TOP / "etc/nbdbackup/nbdbackup.yaml": sample.render(),
        TOP / "docs/man/nbdbackup.yaml.5": manpage.render(),
    }


if __name__ == "__main__":
    sys.exit(main("gen-config", generated(), sys.argv[1:]))
