"""W-5: what was "sound" and could not work is told, each with its line; libvirt's test driver."""

import json
from pathlib import Path

import pytest

from nbdbackupd.app import ctl
from nbdbackupd.config import inventory
from nbdbackupd.virt import same_host
from tests.lib import points

NODE = """<node>
<domain type='test'><name>web 1</name><uuid>{uuid}</uuid><memory>8192</memory>
<metadata><b:x xmlns:b="urn:nbdbackup:1" tier="gold"/></metadata>
<os><type>hvm</type></os><devices><disk type='file' device='disk'><source file='/x.qcow2'/>
<target dev='vda'/></disk></devices></domain>
<domain type='test'><name>db</name><uuid>{other}</uuid><memory>8192</memory>
<os><type>hvm</type></os></domain></node>"""
OTHER = "4a64cc71-19c4-2fd0-2323-3050941ea3c3"


class Host:
    """A configuration and the domains of a libvirt."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys
        (root / "domains.d").mkdir()
        (root / "node").write_text(NODE.format(uuid=points.UUID, other=OTHER))
        self.uri = f"test://{root}/node"

    def check(self, main: str = "", **others: str) -> tuple[int, list[str]]:
        """Exit status, and what is told of each file, without the directory."""
        for name, text in {
            "nbdbackup": main,
            **{f"domains.d/{k}": v for k, v in others.items()},
        }.items():
            (self.root / f"{name}.yaml").write_text(text)
        self.capsys.readouterr()
        head = ["-c", self.uri, "--config-dir", str(self.root)]
        code = ctl.main([*head, "config", "check", "--json"])
        found = self.capsys.readouterr()
        document = json.loads(found.out)
        told = [f"{each['file']}:{each['line']}: {each['path']}: {each['message']}"
                for each in document["problems"]]  # fmt: skip
        assert (document["result"], code) in (("bad", 10), ("sound", 3), ("sound", 0))
        assert (code == 3) == (bool(document["warnings"]) and not told)
        lines = [each.removeprefix("warning: ") for each in found.err.splitlines()]
        assert len(lines) == len(told) + len(document["warnings"])
        return code, [each.replace(f"{self.root}/", "") for each in (*told, *document["warnings"])]


@pytest.fixture
def host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Host:
    # this driver has no files at all, and can't prove whose they are
    monkeypatch.setattr(same_host, "prove", lambda *_: None)
    return Host(tmp_path, capsys)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("limits:\n  bandwidth: 1K", 2, "limits.bandwidth: '1K' is too slow for a run to end"),
        ("monitoring:\n  warning_age: 3d\n  critical_age: 2d", 3,
         "monitoring.critical_age: warning_age is longer than critical_age"),
        ("monitoring:\n\n  warning_age: 30d", 3, "monitoring.warning_age: warning_age is longer"),
        ("notification:\n  mail:\n  - root\n  - 'me at home'", 4,
         "notification.mail: not a mail address: 'me at home'"),
        ("notification: {mail: '-oQ/tmp/x'}", 1, "not a mail address"),
        ("notification: {mail: '@example.org'}", 1, "not a mail address"),
    ],
)  # fmt: skip
def test_w5_errors(host: Host, text: str, line: int, words: str) -> None:
    code, (told,) = host.check(text)
    assert code == 10
    assert told.startswith(f"nbdbackup.yaml:{line}: ")
    assert words in told


def test_w5_addresses_that_are_some(host: Host) -> None:
    text = "notification: {mail: [root, a.b+c@example.org, ü@example.org, x@localhost]}"
    assert host.check(text) == (0, [])


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("commands:\n  pre:\n  - /no/such -x", 2, "commands.pre: there is no program /no/such"),
        ("notification:\n  command: /etc/passwd", 2, "/etc/passwd can't be executed"),
        ("monitoring:\n  metrics_directory: /no/dir", 2, "there is no directory /no/dir"),
        ("repository: {path: /no/dir/x, mount_point: /no/dir}", 1, "there is no directory /no/dir"),
        ("libvirt:\n  password_file: /no/file", 2, "there is no file /no/file"),
        ("schedule:\n  calendar: ['2020-01-01 02:00', daily]", 2,
         "schedule.calendar: '2020-01-01 02:00' is over and never comes again"),
        ("disks:\n  exclude: [vda, vdz]", 2, "disks.exclude: vdz is no disk of any domain"),
    ],
)  # fmt: skip
def test_w5_warnings(host: Host, text: str, line: int, words: str) -> None:
    code, (told,) = host.check(text)
    assert code == 3
    assert told.startswith(f"nbdbackup.yaml:{line}: ")
    assert words in told


def test_w5_domains_that_are_not_there(host: Host) -> None:
    code, told = host.check(
        a="match:\n  name:\n  - web 1\n  - web*\n  - 00000000-0000-4000-8000-000000000000",
        b="match:\n  glob: ['w*', 'x*']\ndisks: {exclude: [vda, vdb]}",
        c="match: {regex: 'db|web.*'}",
        d="match:\n  regex: 'x+'",
        e="match:\n  glob: d*\n  metadata: {tier: gold}",
        f="match: {metadata: {tier: gold}}\ndisks: {include: vda}",
        g=f"match: {{name: {OTHER}}}\ndisks: {{include: vda}}",
    )
    assert code == 3
    assert told == [
        "domains.d/a.yaml:4: match.name: libvirt knows no domain of the name 'web*'; a pattern "
        "goes into match.glob",
        "domains.d/a.yaml:5: match.name: libvirt knows no domain of the UUID "
        "'00000000-0000-4000-8000-000000000000'",
        "domains.d/b.yaml:2: match.glob: 'x*' fits no domain that libvirt knows",
        "domains.d/b.yaml:3: disks.exclude: vdb is no disk of web 1; fix or remove it",
        "domains.d/d.yaml:2: match.regex: 'x+' fits no domain that libvirt knows",
        "domains.d/e.yaml:2: match: all conditions together fit no domain that libvirt knows",
        "domains.d/g.yaml:2: disks.include: vda is no disk of db; fix or remove it",
    ]


def test_w5_a_machine_without_libvirt_that_has_a_domains_name(host: Host) -> None:
    code, told = host.check(
        a="match: {name: db}\nqmp: /run/db/qmp", b="match: {name: vm7}\nqmp: /run/vm7/qmp"
    )
    assert (code, told) == (
        3,
        ["domains.d/a.yaml:2: qmp: libvirt has a domain 'db', too, which is not saved because of "
         "this file; give the machine without libvirt another name"],
    )  # fmt: skip


def test_w5_a_template_that_is_of_no_use(host: Host) -> None:
    template = host.root / "notify.txt.j2"
    template.write_text("{{ what }}\n{% for each in lines %}{{ each }}{% endfor %}{{ reason }}")
    assert host.check() == (0, [])
    template.write_text("{{ nothing_of_that_name }}")
    code, (told,) = host.check()
    assert code == 3
    assert told.startswith("notify.txt.j2: can't be used: ")
    assert "nothing_of_that_name" in told


def test_w5_without_libvirt_its_files_tell(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    definitions = host.root / "qemu"
    definitions.mkdir()
    (definitions / "web 1.xml").write_text(
        f"<domain><name>web 1</name><uuid>{OTHER}</uuid></domain>"
    )
    monkeypatch.setattr(inventory, "DEFINITIONS", definitions)
    host.uri = "test:///nonexistent"
    # nobody knows its disks
    code, told = host.check(a="match: {glob: 'web*'}\ndisks: {exclude: vdz}", b="match: {name: db}")
    assert (code, told) == (
        3, ["domains.d/b.yaml:1: match.name: libvirt knows no domain of the name 'db'"]
    )  # fmt: skip
    # nor which domains there are
    monkeypatch.setattr(inventory, "DEFINITIONS", host.root / "none")
    assert host.check() == (0, [])
