"""The labs of system tests, and which guests have iothreads: see tests/lib/matrix.py.

A file of tests has one lab. Constants of the file say what is special about it: ``LAB`` is its
class, where that is not ``DaemonLab``; ``SMALL_MIB`` is the size of a small file system.
"""

import itertools
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from nbdbackupd.virt.connection import Connection, open_connection
from tests.lab.agent_guest import AgentGuest, agent_guest, make_ext4
from tests.lab.base import Lab
from tests.lab.command import run
from tests.lab.daemon import DaemonLab
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest
from tests.lib import matrix
from tests.lib.rigged import RiggedCtl
from tests.lib.witness import Witness

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is run with and without iothreads."""
    for item in items:
        name = item.path.stem.removeprefix("test_")
        if item.path == HERE / f"test_{name}.py" and name in matrix.ENDS:
            item.add_marker("ends")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: one of a module makes the guests of all of its tests."""
    Lab.iothreads = matrix.iothreads_of(item.path.stem, item.config.getoption("--iothreads"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure, the last that libvirtd, the QEMUs and the sshd of the lab have said."""
    report = yield
    lab = getattr(item, "funcargs", {}).get("lab")
    if report.failed and isinstance(lab, Lab):
        logs = (lab.directory.glob(each) for each in ("l/log/**/*.log", "sshd/log"))
        for path in sorted(itertools.chain(*logs)):
            lines = path.read_text("utf-8", "backslashreplace").splitlines()
            report.sections.append((str(path), "\n".join(line[:300] for line in lines[-12:])))
    return report


@pytest.fixture(scope="module")
def small(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system.

    Not among pytest's directories, where only root gets through: QEMU has another user here.
    """
    path = Path(tempfile.mkdtemp(prefix="nbs-", dir="/tmp"))
    path.chmod(0o711)
    size = f"size={request.module.SMALL_MIB}M,mode=711"
    run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", path])
    yield path
    run(["umount", path])
    path.rmdir()


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The one of a file."""
    if hasattr(request.module, "SMALL_MIB"):
        # mounted before libvirtd begins, or QEMU might not see it
        request.getfixturevalue("small")
    kind = getattr(request.module, "LAB", DaemonLab)
    with kind() as lab:
        yield lab


@pytest.fixture(scope="module")
def ctl(lab: Lab) -> RiggedCtl:
    return RiggedCtl(lab.uri, lab.directory / "ctl")


@pytest.fixture(scope="module")
def connection(lab: Lab) -> Iterator[Connection]:
    with open_connection(lab.uri) as connection:
        yield connection


@pytest.fixture(scope="module")
def linux(lab: DaemonLab) -> AgentGuest:
    """A guest with a system, its agent, and two disks with ext4."""
    disks = [DiskSpec(target=name, path=make_ext4(lab.images / name)) for name in ("vda", "vdb")]
    linux = agent_guest(lab, disks=disks)
    linux.start()
    return linux


@pytest.fixture
def witness(
    ctl: RiggedCtl, guest: Guest, tmp_path: Path, request: pytest.FixtureRequest
) -> Witness:
    """A set of its own, of a guest with data; the checkpoints of earlier ones are gone."""
    witness = Witness(ctl, guest, tmp_path, f"set{abs(hash(request.node.name)) % 1000}")
    witness.delete_checkpoints()
    witness.fill()
    return witness
