"""The packages, built, looked into, and installed into a copy of this system."""

import gzip
import os
import random
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from nbdbackupd import __version__, proc
from scripts import gen_changelog, generated
from tests.lab.command import LabError, run
from tests.lib import sets
from tests.lib.pages import TOP
from tests.lib.sets import SetBuilder
from tests.lib.throwaway import run_in_copy

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(300)]

HOOK = "etc/libvirt/hooks/qemu.d/nbdbackup"
# what a stand-in for systemctl is asked; as if systemd ran
SYSTEMD = """
mkdir -p /run/systemd/system
rm /usr/bin/systemctl
cat >/usr/bin/systemctl <<'END'
#!/bin/sh
echo "$@" >>/tmp/share/systemctl
END
chmod +x /usr/bin/systemctl
"""


def built(tree: Path, script: str, directory: Path) -> dict[str, Path]:
    told = run([tree / "scripts" / script, directory], timeout_seconds=120).split()
    found = {re.split(r"[-_]\d", Path(each).name)[0]: Path(each) for each in told}
    assert sorted(found) == ["cockpit-nbdbackup", "nbdbackup-restore", "nbdbackupd"]
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without git: the tree itself may be worked on meanwhile."""
    path = tmp_path_factory.mktemp("copy") / "tree"
    run([TOP / "scripts/copy-tree", path])
    return path


@pytest.fixture(scope="module")
def debs(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return built(tree, "build-deb", tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def rpms(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return built(tree, "build-rpm", tmp_path_factory.mktemp("rpm"))


@pytest.fixture
def share(tmp_path: Path, debs: dict[str, Path], rpms: dict[str, Path]) -> Path:
    """What a script in a copy of this system finds: all packages."""
    path = tmp_path / "share"
    path.mkdir()
    for each in (*debs.values(), *rpms.values()):
        shutil.copy(each, path)
    return path


def unpacked(package: Path, directory: Path) -> dict[str, tuple[str, bytes]]:
    """Mode and content, or target, of each file and directory, by path; without the docs.

    Paths as on a system with one /usr; manual pages without compression.
    """
    directory.mkdir()
    if package.suffix == ".deb":
        run(["dpkg-deb", "-x", package, directory])
    else:
        run(["sh", "-c", 'rpm2cpio "$1" | (cd "$2" && cpio -id --quiet)', "-", package, directory])
    found = {}
    for path in sorted(directory.rglob("*")):
        name = os.fspath(path.relative_to(directory))
        if re.match(r"usr/share/(doc|licenses|python3)\b", name):
            continue
        name = re.sub(r"^lib\b", "usr/lib", name)
        # Debian keeps packages' completions apart
        name = name.replace("zsh/vendor-completions", "zsh/site-functions")
        mode = f"{path.lstat().st_mode:o}"
        if path.is_symlink():
            found[name] = (mode, os.fsencode(path.readlink()))
        elif path.is_dir():
            found[name + "/"] = (mode, b"")
        elif name.endswith(".gz"):
            found[name.removesuffix(".gz")] = (mode, gzip.decompress(path.read_bytes()))
        else:
            found[name] = (mode, path.read_bytes())
    return found


def files(found: dict[str, tuple[str, bytes]]) -> dict[str, tuple[str, bytes]]:
    return {name: value for name, value in found.items() if not name.endswith("/")}


def test_versions_agree() -> None:
    """Said twice: by the program and by CHANGELOG.md, which the packages are made from."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    newest = gen_changelog.releases((TOP / "CHANGELOG.md").read_text())[0]
    assert newest.version == __version__
    assert generated.stale(gen_changelog.generated()) == [], "run scripts/gen-changelog"


def test_a_changelog_becomes_that_of_packages() -> None:
    heading = "# Log\n\n## [1.2.3] - 2026-01-31\n\n"
    text = f"{heading}### Added\n\n- One `a`\n  more.\n- Two.\n\n### Fixed\n\n- B.\n"
    (release,) = gen_changelog.releases(text)
    assert release.entries == ("One a more.", "Two.", "B.")
    assert (release.version, f"{release.day:%d %m}") == ("1.2.3", "31 01")
    with pytest.raises(ValueError, match="Unreleased"):
        gen_changelog.releases("## Unreleased\n")


def test_lintian(debs: dict[str, Path]) -> None:
    assert run(["lintian", "--allow-root", "--fail-on", "error,warning", *debs.values()]) == ""


def test_rpmlint(tree: Path, rpms: dict[str, Path]) -> None:
    directory = tree / "packaging/rpm"
    told = run(["rpmlint", "-c", directory / "rpmlint.toml", directory / "nbdbackupd.spec",
                *rpms.values()])  # fmt: skip
    assert re.search(r"\b0 errors, 0 warnings\b", told), told


@pytest.mark.parametrize("package", ["nbdbackup-restore", "nbdbackupd", "cockpit-nbdbackup"])
def test_both_packagings_hold_the_same(
    package: str, debs: dict[str, Path], rpms: dict[str, Path], tmp_path: Path
) -> None:
    deb = files(unpacked(debs[package], tmp_path / "deb"))
    rpm = files(unpacked(rpms[package], tmp_path / "rpm"))
    # the RPM's distributions have SELinux
    deb.pop("etc/apparmor.d/abstractions/libvirt-qemu.d/nbdbackup", None)
    assert sorted(deb) == sorted(rpm)
    assert deb == rpm


def test_nothing_is_forgotten(tree: Path, debs: dict[str, Path], tmp_path: Path) -> None:
    restore = unpacked(debs["nbdbackup-restore"], tmp_path / "restore")
    appliance = unpacked(debs["nbdbackupd"], tmp_path / "appliance")
    page = unpacked(debs["cockpit-nbdbackup"], tmp_path / "page")
    tracked = [os.fspath(each.relative_to(tree)) for each in tree.rglob("*") if each.is_file()]
    assert "nbdbackupd/app/ctl.py" in tracked
    for path in tracked:
        content = (tree / path).read_bytes()
        if path.startswith("nbdbackupd/"):
            assert restore[f"usr/lib/nbdbackup/{path}"] == ("100644", content)
        elif path.startswith("docs/man/"):
            name = Path(path).name
            assert restore[f"usr/share/man/man{name[-1]}/{name}"] == ("100644", content)
        elif path == "packaging/completion/_nbdbackupctl":
            assert restore["usr/share/zsh/site-functions/_nbdbackupctl"] == ("100644", content)
        elif path.startswith("units/"):
            assert appliance[f"usr/lib/systemd/system/{path[6:]}"] == ("100644", content)
        elif path.startswith("cockpit/") and not path.startswith("cockpit/po/"):
            assert page[f"usr/share/cockpit/nbdbackup/{path[8:]}"] == ("100644", content)
        elif path.startswith("etc/"):
            assert appliance[path] == ("100644", content)
    assert appliance[HOOK] == ("100755", (tree / "hooks/qemu.d/nbdbackup").read_bytes())
    assert appliance["usr/lib/nbdbackup/hook"] == ("100755", (tree / "hooks/qemu").read_bytes())
    assert appliance["etc/nbdbackup/domains.d/"][0] == "40755"
    modules = [each for each in restore if each.startswith("usr/lib/nbdbackup/nbdbackupd/")]
    assert not [each for each in modules if "__pycache__" in each or each.endswith(".pyc")]
    for name in ("nbdbackup-generator", "nbdbackup.catalog"):
        there = [each for each in appliance if Path(each).name == name]
        source = [each for each in tracked if Path(each).name in (name, f"{name}.in")]
        assert len(there) == len(source), name


def test_a_restore_needs_no_libvirt(debs: dict[str, Path]) -> None:
    needs = run(["dpkg-deb", "-f", debs["nbdbackup-restore"], "Depends", "Recommends"])
    assert "python3-libnbd" in needs
    assert "libvirt" not in needs
    assert "systemd" not in needs


def test_what_the_code_calls_is_named() -> None:
    """By both packagings: each program that the code can do without a message about."""
    control = (TOP / "packaging/debian/control").read_text()
    spec = (TOP / "packaging/rpm/nbdbackupd.spec").read_text()
    debian = re.split(r"[\s,]+", control)
    fedora = re.findall(r"^(?:Requires|Recommends|Suggests): +(\S+)", spec, re.MULTILINE)
    everywhere = {"systemd", "tar", "util-linux"}
    for program, told in proc.PACKAGES.items():
        if program == "sendmail":  # of whichever mail system there is
            continue
        first, _, second = told.partition(" or ")
        name = first.removesuffix(" (Debian)")
        assert name in {*debian, *everywhere}, program
        name = second.removesuffix(" (Fedora, EL)") or name
        found = {name, f"/usr/bin/{program}"} & {*fedora, *everywhere}
        assert found, program


def test_a_clean_clone_builds(tmp_path: Path) -> None:
    """With what is committed."""
    run(
        [
            "git",
            "-c",
            f"safe.directory={TOP}",
            "-C",
            TOP,
            "archive",
            "-o",
            tmp_path / "a.tar",
            "HEAD",
        ]
    )
    (tmp_path / "clone").mkdir()
    run(["tar", "-xf", tmp_path / "a.tar", "-C", tmp_path / "clone"])
    told = run([tmp_path / "clone/scripts/build-deb", tmp_path / "out"], timeout_seconds=120)
    names = {Path(each).name.partition("_")[0] for each in told.split()}
    assert names == {"cockpit-nbdbackup", "nbdbackup-restore", "nbdbackupd"}
    # the tree was copied, not written into
    assert not (tmp_path / "clone/debian").exists()
    assert not (tmp_path / "clone/packaging/debian/files").exists()


def test_debian_package_lives_and_dies(share: Path) -> None:
    told = run_in_copy(
        f"""
        export DEBIAN_FRONTEND=noninteractive
        list() {{
            find /etc /usr /var/lib /var/cache -xdev -path /var/lib/dpkg -prune -o -print |
                grep -e nbdbackup -e /libvirt/hooks -e /apparmor.d/ | sort
        }}
        rm -rf /var/lib/nbdbackup /etc/nbdbackup # of this host
        list >/tmp/share/before
        dpkg -i /tmp/share/nbdbackup-restore_*.deb >/dev/null
        nbdbackupctl --version
        {SYSTEMD}
        dpkg -i /tmp/share/nbdbackupd_*.deb
        stat -c '%a %U %n' /run/nbdbackup/xml /var/lib/nbdbackup/* /{HOOK}
        ls /usr/lib/nbdbackup/nbdbackupd/app/__pycache__/ctl.*.pyc
        apparmor_parser --skip-kernel-load --skip-cache /etc/apparmor.d/libvirt/TEMPLATE.qemu
        cat /etc/apparmor.d/local/abstractions/libvirt-qemu

        echo == upgrade
        mv /tmp/share/systemctl /tmp/share/installed
        echo '# mine' >>/etc/nbdbackup/hook.conf
        echo 'no rule' >/etc/nbdbackup/domains.d/mine.yaml
        mkdir -p /var/lib/nbdbackup/repository/vm1
        dpkg -i /tmp/share/nbdbackupd_*.deb
        tail -n 1 /etc/nbdbackup/hook.conf

        echo == remove
        mv /tmp/share/systemctl /tmp/share/upgraded
        dpkg -r nbdbackupd
        grep -c nbdbackup /etc/apparmor.d/local/abstractions/libvirt-qemu || :
        rm -rf /run/nbdbackup
        /{HOOK} vm1 prepare begin - </dev/null
        test ! -e /run/nbdbackup
        mv /tmp/share/systemctl /tmp/share/removed

        echo == purge
        dpkg -P nbdbackupd nbdbackup-restore
        list >/tmp/share/after
        comm -13 /tmp/share/before /tmp/share/after
        """,
        share,
    )
    assert "static unit" not in told
    installed, _, rest = told.partition("== upgrade\n")
    upgraded, _, rest = rest.partition("== remove\n")
    _, _, purged = rest.partition("== purge\n")
    assert f"nbdbackupctl {__version__}" in installed
    assert "restart libvirt's daemon once" in installed
    for line in ("700 root /run/nbdbackup/xml", f"755 root /{HOOK}",
                 "700 root /var/lib/nbdbackup/repository", "711 root /var/lib/nbdbackup/scratch",
                 "700 root /var/lib/nbdbackup/state"):  # fmt: skip
        assert f"\n{line}\n" in installed
    assert "libvirt-qemu.d/nbdbackup>" in installed
    assert "# mine" in upgraded
    assert "restart libvirt's daemon" not in upgraded
    # nothing is stopped, and what is going on least of all
    for stage in ("installed", "upgraded"):
        asked = (share / stage).read_text()
        assert "daemon-reload" in asked
        assert not re.search(r"\b(stop|restart|try-restart|disable)\b", asked), asked
    asked = (share / "removed").read_text()
    all_timers = "nbdbackup-boot-test@*.timer nbdbackup-prune@*.timer nbdbackup-verify-all.timer"
    all_timers += " nbdbackup-report.timer"
    assert f"stop nbdbackup@*.timer nbdbackup-verify@*.timer {all_timers}\n" in asked
    assert re.search(r"^stop nbdbackup@\*\.service ", asked, re.MULTILINE)
    off = "nbdbackup-boot-test@.timer nbdbackup-prune@.timer nbdbackup-verify-all.timer"
    off += " nbdbackup-report.timer"
    assert f"disable nbdbackup@.timer nbdbackup-verify@.timer {off}\n" in asked
    assert "backups and what belongs to them stay in /var/lib/nbdbackup" in purged
    assert "your files stay in /etc/nbdbackup/domains.d" in purged
    left = {each for each in purged.splitlines() if each.startswith("/")}
    made = {each for each in left if each.startswith("/var/lib/nbdbackup/")}
    assert made == {
        f"/var/lib/nbdbackup/{each}"
        for each in ("repository", "repository/vm1", "scratch", "state", "state/pending")
    }
    assert left - made == {
        "/etc/nbdbackup", "/etc/nbdbackup/domains.d", "/etc/nbdbackup/domains.d/mine.yaml",
        "/var/lib/nbdbackup",
    }  # fmt: skip


def test_rpm_package_lives_and_dies(share: Path) -> None:
    told = run_in_copy(
        f"""
        {SYSTEMD}
        rm -rf /var/lib/nbdbackup /etc/nbdbackup # of this host
        rpm -i --nodeps /tmp/share/*.rpm
        rpm -V --nodeps nbdbackupd nbdbackup-restore cockpit-nbdbackup
        nbdbackupctl --version
        stat -c '%a %U %n' /run/nbdbackup/xml /var/lib/nbdbackup/state /{HOOK}
        echo == upgrade
        mv /tmp/share/systemctl /tmp/share/installed
        echo '# mine' >>/etc/nbdbackup/hook.conf
        rpm -U --force --nodeps /tmp/share/*.rpm
        tail -n 1 /etc/nbdbackup/hook.conf
        echo == remove
        mv /tmp/share/systemctl /tmp/share/upgraded
        mkdir -p /var/lib/nbdbackup/repository/vm1
        rpm -e --nodeps nbdbackupd nbdbackup-restore cockpit-nbdbackup
        ls -d /usr/lib/nbdbackup /{HOOK} /usr/bin/nbdbackupctl 2>&1 || :
        ls -d /var/lib/nbdbackup/repository/vm1
        """,
        share,
    )
    installed, _, rest = told.partition("== upgrade\n")
    upgraded, _, removed = rest.partition("== remove\n")
    assert f"nbdbackupctl {__version__}" in installed
    assert "restart libvirt's daemon once" in installed
    assert f"755 root /{HOOK}" in installed
    assert "# mine" in upgraded
    asked = (share / "upgraded").read_text()
    assert "daemon-reload" in asked
    assert not re.search(r"\b(stop|restart|try-restart|disable)\b", asked), asked
    asked = (share / "systemctl").read_text()
    off = "nbdbackup-boot-test@.timer nbdbackup-prune@.timer nbdbackup-verify-all.timer"
    off += " nbdbackup-report.timer"
    assert f"disable nbdbackup@.timer nbdbackup-verify@.timer {off}\n" in asked
    assert removed.count("No such file") == 3
    assert "/var/lib/nbdbackup/repository/vm1\n" in removed


@pytest.mark.parametrize(
    "install",
    ["dpkg -i /tmp/share/nbdbackup-restore_*.deb >/dev/null",
     "rpm -i --nodeps /tmp/share/nbdbackup-restore-*.rpm"],
)  # fmt: skip
def test_installed_command_restores_without_libvirt(share: Path, install: str) -> None:
    """The worst day: a host with nothing but the package and the set."""
    rng = random.Random(1)
    made = SetBuilder(share / "set")
    made.disks = {"vda": sets.random_disk(rng, 3 << 20)}
    made.full()
    made.inc({"vda": sets.random_changes(rng, 3 << 20, 20)})
    script = (
        f"{install}\n"
        """
        find /usr/lib/python3/dist-packages -maxdepth 1 -name 'libvirt*' -exec rm -rf {} +
        rm -rf /etc/libvirt /usr/lib/nbdbackup/nbdbackupd/__pycache__
        cd /
        ! python3 -c 'import libvirt' 2>/dev/null
        nbdbackupctl verify /tmp/share/set
        # 3: a set made by hand does not tell how its original was made
        nbdbackupctl restore /tmp/share/set -o /tmp/share/restored || [ $? -eq 3 ]
        """
    )
    run_in_copy(script, share)
    (image,) = (each for each in (share / "restored").iterdir() if each.name.startswith("vda"))
    assert sets.read_image(image, "qcow2" if image.suffix == ".qcow2" else "raw") == bytes(
        made.disks["vda"]
    )
    # the modules come from the package
    broken = script.replace("cd /\n", "rm -rf /usr/lib/nbdbackup\ncd /\n")
    with pytest.raises(LabError, match="No module named"):
        run_in_copy(broken, share)
