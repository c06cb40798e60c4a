"""System tests on the release of Debian that this machine is not: another libvirt and QEMU."""

import platform
from collections.abc import Iterator

import pytest

from tests.lab.agent_guest import BOOT_VARIABLE, boot_files
from tests.lab.host import Host
from tests.lab.hostlab import HostLab
from tests.lab.hostroot import BOOKWORM, TRIXIE, hypervisor
from tests.lib import matrix
from tests.lib.pages import TOP

pytestmark = [
    pytest.mark.host,
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # a root file system may have to be made first
]

SOURCE = "/src"
BOOT = "/boot-files"
# beside what every hypervisor has
TOOLS = (
    *("python3-jinja2", "python3-lz4", "python3-pytest", "python3-pytest-timeout", "python3-yaml"),
    *("e2fsprogs", "fdisk", "fuse2fs", "fuse3", "kmod", "libdeflate0", "xfsprogs"),
)
ALL_TOOLS = (
    *("cpio", "dosfstools", "ca-certificates", "debian-archive-keyring", "mmdebstrap", "mtools"),
    *("ntfs-3g", "python3-fusepy", "python3-hypothesis", "virtnbdbackup", "xz-utils", "zstd"),
)
NOT_THERE = frozenset({"lab_peer", "model", "peer", "peer_continue", "peer_define", "peer_sets"})
"""They need both releases' peers, or are a matter of hours."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each file: the chosen ones, or all."""
    names = list(matrix.OTHER_RELEASE)
    if metafunc.config.getoption("--other-release") == "all":
        found = {path.stem.removeprefix("test_") for path in (TOP / "tests/system").glob("test_*")}
        names = sorted(found - NOT_THERE)
    metafunc.parametrize("name", names)


@pytest.fixture(scope="module")
def suite() -> str:
    return BOOKWORM if platform.freedesktop_os_release()["VERSION_CODENAME"] == TRIXIE else TRIXIE


@pytest.fixture(scope="module")
def host(suite: str, request: pytest.FixtureRequest) -> Iterator[Host]:
    is_all = request.config.getoption("--other-release") == "all"
    with HostLab() as lab:
        binds = {SOURCE: TOP, BOOT: boot_files().kernel.parent}
        host = lab.host("lab-a", hypervisor(suite), readonly_binds=binds)
        host.apt("update")
        host.apt("install", *TOOLS, *(ALL_TOOLS if is_all else ()))
        yield host


def test_file(host: Host, name: str, request: pytest.FixtureRequest) -> None:
    """G-1: those of its kind on QEMU 7.2 and 10, with iothreads and without."""
    wanted = request.config.getoption("--iothreads")
    # what had some here has none there
    option = {"rule": "other", "other": "rule"}.get(wanted, wanted)
    pytest_words = (
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp=/var/tmp/t"),
        *(f"--iothreads={option}", matrix.path_of(name)),
    )
    shell = f'cd {SOURCE} && exec "$@"'
    variables = ("PYTHONDONTWRITEBYTECODE=1", f"{BOOT_VARIABLE}={BOOT}")
    words = ("sh", "-c", shell, "sh", "env", *variables, "python3", *pytest_words)
    done = host.call(*words, timeout_seconds=1500)
    said = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, said[-20_000:] + done.stderr.decode("utf-8", "replace")
    assert " passed" in said
