"""Hosts with the installed packages, made once for all tests of a suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.appliance import Appliance
from tests.lab.command import run
from tests.lab.hostguest import guest_binds
from tests.lab.hostlab import HostLab
from tests.lab.hostroot import SUITES, hypervisor
from tests.lib.pages import TOP


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("packages")
    built = run([TOP / "scripts/build-deb", directory], timeout_seconds=300)
    return [Path(line) for line in built.splitlines()]


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
