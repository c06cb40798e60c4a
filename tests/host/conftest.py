"""Hosts with the installed packages, made once for all tests of a suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackupd import __version__
from tests.host.appliance import NEWER, Appliance
from tests.lab.command import run
from tests.lab.hostguest import guest_binds
from tests.lab.hostlab import HostLab
from tests.lab.hostroot import SUITES, hypervisor
from tests.lib.pages import TOP

OWN_VERSION_ONLY = f"""

import nbdbackupd as _package

if _package.__version__ != "{NEWER}":
    raise ImportError("code of another version")
"""


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("packages")
    built = run([TOP / "scripts/build-deb", directory], timeout_seconds=300)
    return without_page(built)


def without_page(built: str) -> list[Path]:
    """The packages, by their paths in lines; Cockpit is not in the containers."""
    paths = [Path(line) for line in built.splitlines()]
    return [path for path in paths if not path.name.startswith("cockpit-")]


@pytest.fixture(scope="session")
def newer_packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same of a later version, whose modules let no process of another version import them."""
    directory = tmp_path_factory.mktemp("newer")
    tree = directory / "tree"
    run([TOP / "scripts/copy-tree", tree])
    code = tree / "nbdbackupd"
    for module in code.rglob("*.py"):
        text = module.read_text()
        if module == code / "__init__.py":
            text = text.replace(f'"{__version__}"', f'"{NEWER}"')
        else:
            text += OWN_VERSION_ONLY
        module.write_text(text)
    log = tree / "packaging/debian/changelog"
    log.write_text(log.read_text().replace(f"({__version__})", f"({NEWER})", 1))
    built = run([tree / "scripts/build-deb", directory / "built"], timeout_seconds=300)
    return without_page(built)


@pytest.fixture(scope="session", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def lab(suite: str) -> Iterator[HostLab]:
    """One for each suite."""
    assert suite in SUITES
    with HostLab() as lab:
        yield lab


@pytest.fixture(scope="session")
def appliance(suite: str, lab: HostLab, packages: list[Path]) -> Appliance:
    host = lab.host("lab-a", hypervisor(suite), readonly_binds=guest_binds())
    return Appliance(lab, host, packages)


@pytest.fixture(scope="session")
def other(suite: str, lab: HostLab, packages: list[Path]) -> Appliance:
    host = lab.host("lab-b", hypervisor(suite), readonly_binds=guest_binds())
    return Appliance(lab, host, packages)
