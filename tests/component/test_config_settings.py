"""What the configuration says for a domain, where it says so, and what a backup makes of it."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.app import context as app_context
from nbdbackupd.app import ctl as app_parser
from nbdbackupd.app.context import Context
from nbdbackupd.app.verbs.backup import with_options
from nbdbackupd.config import files, matching, schema, settings
from nbdbackupd.config.files import Configuration
from nbdbackupd.config.schema import DomainSettings
from nbdbackupd.config.setting import Setting
from nbdbackupd.errors import ConfigError, DomainError, RepositoryError, UsageError
from nbdbackupd.model.chain import Codec, Compression
from nbdbackupd.model.host import DEFAULT_URI
from nbdbackupd.model.policy import FreezePolicy, LevelPolicy, Rotate
from nbdbackupd.ops.backup import prepare
from nbdbackupd.ops.domain import configured, mounted
from nbdbackupd.ops.domain.images import ALONE, Sharing
from nbdbackupd.ops.domain.survey import DiskFilter
from scripts import gen_config, generated
from tests.lib.pages import TOP

pytestmark = pytest.mark.component

UUID = "4a64cc71-19c4-2fd0-2323-3050941ea3c3"
NOVA = "http://openstack.org/xmlns/libvirt/nova/1.1"
METADATA = f"""\
<metadata>
  <a:labels xmlns:a="urn:nbdbackup:1" tier="gold" site=""/>
  <nova:instance xmlns:nova="{NOVA}" xmlns:o="urn:o">
    <nova:flavor name="m1.small"><nova:memory> 512 </nova:memory></nova:flavor>
    <o:x o:id="1" id="2"/>
  </nova:instance>
</metadata>"""
NODE = f"""\
<node><domain type='test'><name>vm1</name><uuid>{UUID}</uuid><memory>8192</memory><vcpu>1</vcpu>
<os><type>hvm</type></os>{METADATA}</domain></node>"""


def write(directory: Path, main: str = "", **others: str) -> Path:
    """Files of these texts; ``others`` are files of domains.d, by stem."""
    (directory / "domains.d").mkdir(parents=True)
    (directory / "nbdbackup.yaml").write_text(main)
    for name, text in others.items():
        (directory / f"domains.d/{name}.yaml").write_text(text)
    return directory


def read(directory: Path, main: str = "", **others: str) -> Configuration:
    return files.read_all(write(directory, main, **others)).require_sound()


def defaults() -> DomainSettings:
    return settings.settings_for("vm", "", {}, Configuration())


# -- the schema


def test_settings_are_those_of_the_schema() -> None:
    entries = {
        name: each for name, each in vars(DomainSettings).items() if isinstance(each, Setting)
    }
    assert {name: each.path for name, each in entries.items()} == {
        each.field: path for path, each in schema.BY_PATH.items()
    }
    assert {each.section for each in schema.BY_PATH.values()} == {*schema.SECTIONS, ""}


def test_level_policy(tmp_path: Path) -> None:
    assert prepare.level_policy(defaults()) == LevelPolicy()
    main = "level: {rotate: never, full_every: 2w, max_increments: 30}"
    got = settings.settings_for("vm", "", {}, read(tmp_path / "a", main))
    assert prepare.level_policy(got) == LevelPolicy(
        rotate=Rotate.NEVER, full_every=14, max_increments=30
    )


def test_rotation_is_that_of_the_policy() -> None:
    assert schema.BY_PATH["level.rotate"].kind.words == tuple(Rotate)
    assert schema.BY_PATH["freeze.policy"].kind.words == tuple(FreezePolicy)


def parse(*argv: str) -> argparse.Namespace:
    return app_parser.build_parser().parse_args(["backup", "vm", "-o", "/x", *argv])


def test_options_exist() -> None:
    known: set[str] = set()
    for action in app_parser.build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            known |= {name for each in action.choices["backup"]._actions
                      for name in each.option_strings}  # fmt: skip
    flags = {
        flag
        for setting in schema.BY_PATH.values()
        for option in setting.options
        for flag in option.flags
    }
    assert len(flags) == 30
    assert flags <= known


def test_defaults_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, and a file with the defaults, change nothing of what ``backup`` does."""
    got = defaults()
    # no option given decides nothing
    assert with_options(parse(), got) == got == schema.defaults()
    host = Context.from_args(parse()).host
    made = prepare.request("vm", Path("/x"), host, got, ALONE)
    decided = {path for path, origin in made.settings.origins.items() if origin.file}
    assert decided <= {"scratch.directory", "checkpoint_directory"}
    assert made.settings.scratch_directory == host.scratch_dir
    assert made.settings.checkpoint_directory == host.state_dir
    assert got.libvirt_uri == DEFAULT_URI
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 0)
        assert got.scratch_directory == app_context.default_scratch_dir({})
        assert got.checkpoint_directory == app_context.default_state_dir({})


def test_every_setting_reaches_the_request(tmp_path: Path) -> None:
    main = """\
disks: {include: [vda, vdb], exclude: vdc, raw: yes}
compression: 7
freeze: {policy: require, mountpoints: [/, /var]}
scratch: {directory: /s, reserve: 1G}
checkpoint_directory: /c
block_devices: local
start_paused: yes
threshold: 16M
strict: on
limits: {workers: 3, wait: 5m, timeout: 10, bandwidth: 64K}
"""
    got = settings.settings_for("vm", "", {}, read(tmp_path / "a", main))
    host = Context.from_args(parse()).host
    sharing = configured.sharing(got)
    found = prepare.request("vm", Path("/x"), host, got, sharing).settings
    changed = {path: found.get(path) for path in schema.BY_PATH if not found.is_default(path)}
    assert changed == {
        "disks.include": ("vda", "vdb"),
        "disks.exclude": ("vdc",),
        "disks.raw": True,
        "compression": Compression(Codec.LZ4, 7),
        "freeze.policy": FreezePolicy.REQUIRE,
        "freeze.mountpoints": (Path("/"), Path("/var")),
        "scratch.directory": Path("/s"),
        "scratch.reserve": 1 << 30,
        "checkpoint_directory": Path("/c"),
        "block_devices": "local",
        "start_paused": True,
        "threshold": 16 << 20,
        "strict": True,
        "limits.workers": 3,
        "limits.wait": 300.0,
        "limits.timeout": 10.0,
        "limits.bandwidth": 64 << 10,
    }
    assert sharing == Sharing(
        state_dir=Path("/c"),
        devices="local",
        disks=DiskFilter(include=("vda", "vdb"), exclude=("vdc",)),
    )
    pause = read(tmp_path / "b", "freeze: {policy: pause}")
    assert settings.settings_for("vm", "", {}, pause).freeze_policy is FreezePolicy.PAUSE


def test_a_place_that_hosts_share_is_where_the_base_is_noted() -> None:
    host = replace(Context.from_args(parse()).host, scratch_dir=Path("/h/s"), state_dir=Path("/h"))
    made = prepare.request("vm", Path("/x"), host, defaults(), Sharing(state_dir=Path("/all")))
    assert made.settings.checkpoint_directory == Path("/all")
    assert made.settings.scratch_directory == Path("/h/s")
    given = with_options(parse("--checkpoint-dir", "c", "--scratch-dir", "s"), defaults())
    made = prepare.request("vm", Path("/x"), host, given, ALONE)
    assert made.settings.checkpoint_directory == Path("c").absolute()
    assert made.settings.scratch_directory == Path("s").absolute()


def test_options_win_over_settings(tmp_path: Path) -> None:
    main = "disks: {exclude: vda}\nfreeze: {policy: pause}\ncompression: 5\nthreshold: 9M\n"
    found = settings.settings_for("vm", "", {}, read(tmp_path, main))

    def merged(*argv: str) -> DomainSettings:
        return with_options(parse(*argv), found)

    assert merged() == found
    assert merged("--no-compress").compression is None
    assert merged("-z").compression == Compression(Codec.LZ4, 2)
    assert merged("-z", "zstd").compression == Compression(Codec.ZSTD, 1)
    assert merged("--threshold", "0").threshold == 0
    chosen = merged("-i", "vda")
    assert (chosen.disks_include, chosen.disks_exclude) == (("vda",), ())
    frozen = merged("--freeze", "require")
    assert frozen.freeze_policy is FreezePolicy.REQUIRE
    some = merged("-F", "/var")
    assert (some.freeze_policy, some.freeze_mountpoints) == (FreezePolicy.AUTO, (Path("/var"),))
    assert merged("-t", "raw", "-l", "copy").compression is None
    assert merged("--pause").freeze_policy is FreezePolicy.PAUSE
    assert merged("--freeze", "never", "--pause").freeze_policy is FreezePolicy.PAUSE
    for wrong in (("-t", "raw"), ("-t", "raw", "-l", "copy", "-z"), ("--pause", "-F", "/")):
        with pytest.raises(UsageError):
            merged(*wrong)


# -- matching and merging


@pytest.mark.parametrize(
    ("match", "fitting", "others"),
    [
        ("name: web", ["web"], ["web1", "Web", "xweb", ""]),
        ("name: [web, mail]", ["web", "mail"], ["mai"]),
        ("name: 'web*'", ["web*"], ["web1"]),
        ("glob: 'web-*'", ["web-", "web-1", "web-\n"], ["web", "xweb-1", "WEB-1"]),
        ("glob: ['?', '[ab]c']", ["x", "ac"], ["cc", ""]),
        ("regex: 'db[0-9]+'", ["db1", "db22"], ["db", "xdb1", "db1x", "db1\n"]),
        ("regex: '(?i)DB.*|x'", ["db", "DBx", "x"], ["xx"]),
        ("glob: 'a*'\n  regex: '.*z'", ["az", "a-z"], ["a", "z"]),
        (f"name: {UUID.upper()}", [UUID.upper()], [UUID, "vm", ""]),
    ],
)
def test_names(tmp_path: Path, match: str, fitting: list[str], others: list[str]) -> None:
    found = read(tmp_path / "a", one=f"match:\n  {match}\nstrict: yes")
    for name in fitting:
        assert settings.settings_for(name, "", {}, found).strict, name
    for name in others:
        assert not settings.settings_for(name, "", {}, found).strict, name


def test_uuids(tmp_path: Path) -> None:
    found = read(tmp_path / "a", one=f"match: {{name: {UUID.upper()}}}\nstrict: yes")
    assert settings.settings_for("any", UUID, {}, found).strict
    assert not settings.settings_for("any", UUID.replace("4", "5"), {}, found).strict


def test_labels() -> None:
    labels = matching.labels_of(f"<domain>{METADATA}<devices/></domain>")
    assert labels == {
        "tier": "gold",
        "site": "",
        f"{{{NOVA}}}instance/flavor@name": "m1.small",
        f"{{{NOVA}}}instance/flavor/memory": "512",
        f"{{{NOVA}}}instance/{{urn:o}}x@{{urn:o}}id": "1",
        f"{{{NOVA}}}instance/{{urn:o}}x@id": "2",
    }
    assert matching.labels_of("<domain/>") == {}
    with pytest.raises(DomainError, match="can't be parsed"):
        matching.labels_of("<domain>")


def test_metadata(tmp_path: Path) -> None:
    text = "match:\n  glob: 'v*'\n  metadata: {tier: [go*, silver], site: '*'}\nstrict: yes"
    found = read(tmp_path / "a", one=text)
    for labels, fits in (
        ({"tier": "gold", "site": ""}, True),
        ({"tier": "silver", "site": "b", "x": "y"}, True),
        ({"tier": "gold"}, False),
        ({"tier": "iron", "site": "b"}, False),
        ({}, False),
    ):
        assert settings.settings_for("vm", "", labels, found).strict == fits
        assert not settings.settings_for("xm", "", labels, found).strict


def test_libvirt_is_asked_only_where_it_must_be(tmp_path: Path) -> None:
    found = read(
        tmp_path / "a",
        a="match: {glob: 'a*', metadata: {tier: gold}}",
        b="match: {name: b}",
    )
    assert settings.needs_libvirt("b", found) == ()
    assert [path.stem for path in settings.needs_libvirt("a1", found)] == ["a"]
    assert [path.stem for path in settings.needs_libvirt(UUID, found)] == ["a", "b"]
    assert settings.needs_libvirt(UUID, Configuration()) == ()
    by_uuid = read(tmp_path / "b", a=f"match: {{name: [x, {UUID}]}}")
    assert [path.stem for path in settings.needs_libvirt("y", by_uuid)] == ["a"]


def test_the_later_file_wins_setting_by_setting(tmp_path: Path) -> None:
    main = "threshold: 1M\ncompression: 1\ndisks:\n  exclude: [vda, vdb]\n  raw: yes\n"
    found = read(
        tmp_path / "a",
        main,
        **{
            "10": "match: {glob: '*'}\ncompression: 2\ndisks:\n\n  exclude: [vdc]\n",
            "20": "match: {name: other}\nstrict: yes\n",
            "9": "match: {glob: '*'}\ncompression: none\n",
        },
    )
    got = settings.settings_for("vm", "", {}, found)
    assert [path.name for path in got.applied] == ["nbdbackup.yaml", "10.yaml", "9.yaml"]
    assert (got.threshold, got.compression, got.disks_exclude) == (1 << 20, None, ("vdc",))
    assert (got.disks_raw, got.strict) == (True, False)
    places = {
        path: f"{Path(each.file).name}:{each.line}"
        for path, each in got.origins.items()
        if each.file
    }
    assert places == {
        "threshold": "nbdbackup.yaml:1",
        "compression": "9.yaml:2",
        "disks.exclude": "10.yaml:5",
        "disks.raw": "nbdbackup.yaml:5",
    }
    assert str(got.origins["strict"]) == "default"
    assert settings.global_settings(found).compression == Compression(Codec.LZ4, 1)


def test_files_that_contradict_one_another_for_a_domain(tmp_path: Path) -> None:
    found = read(
        tmp_path / "a",
        a="match: {glob: 'v*'}\ndisks: {include: vda}",
        b="match: {glob: '*m'}\ndisks: {exclude: vda}",
    )
    with pytest.raises(ConfigError, match=r"domain vm: .*b.yaml:2: disks.exclude: both included"):
        settings.settings_for("vm", "", {}, found)
    assert settings.settings_for("vx", "", {}, found).disks_include == ("vda",)


# -- directories, marker, secrets


def test_marker(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    main = f"repository:\n  path: {repository}\n  marker: .here\n"
    got = settings.settings_for("vm", "", {}, read(tmp_path / "a", main))
    for _ in range(2):
        with pytest.raises(RepositoryError, match=r"marker .*\.here is missing.*yaml:3"):
            mounted.check(got)
        repository.mkdir(exist_ok=True)
    (repository / ".here").touch()
    mounted.check(got)
    repository.rename(tmp_path / "moved")
    repository.write_text("")
    with pytest.raises(RepositoryError, match="can't look at the marker"):
        mounted.check(got)
    mounted.check(defaults())


def test_mount_point(tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    folder.mkdir()
    for mount_point, is_mounted in ((folder, False), (folder / "x", False), (Path("/"), True)):
        main = f"repository: {{path: {folder / 'x'}, mount_point: {mount_point}}}"
        found = read(tmp_path / f"c{len(str(mount_point))}", main)
        got = settings.settings_for("vm", "", {}, found)
        if is_mounted:
            mounted.check(got)
        else:
            with pytest.raises(RepositoryError, match=f"nothing is mounted on {mount_point}"):
                mounted.check(got)


def test_password(tmp_path: Path) -> None:
    by_file = settings.global_settings(read(tmp_path / "a", "libvirt: {password_file: /p}"))
    assert settings.password_file(by_file, None) == Path("/p")
    main = "libvirt: {password_credential: pw}"
    by_name = settings.global_settings(read(tmp_path / "b", main))
    assert settings.password_file(by_name, Path("/c")) == Path("/c/pw")
    with pytest.raises(ConfigError, match="LoadCredential"):
        settings.password_file(by_name, None)
    assert settings.password_file(defaults(), None) is None


# -- the verb


def ctl(*argv: str | Path, code: int = 0, uri: str = "") -> subprocess.CompletedProcess[str]:
    head = ["/usr/bin/python3", "-m", "nbdbackupd", *(["-c", uri] if uri else []), "config"]
    done = subprocess.run(
        [*head, *map(str, argv)], cwd=TOP, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_check_tells_all(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "strikt: yes\ncompression: 99\nschedule: {calendar: noon}\n")
    done = ctl("check", "--config-dir", folder, code=10)
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == ["1", "2", "3"]
    assert done.stdout == ""
    done = ctl("check", "--config-dir", folder, "--json", code=10)
    document = json.loads(done.stdout)
    assert (document["version"], document["result"]) == (1, "bad")
    assert document["problems"][0] == {
        "file": str(folder / "nbdbackup.yaml"),
        "line": 1,
        "path": "strikt",
        "message": "unknown key (did you mean 'strict'?)",
    }
    assert "2 more" in ctl("show", "vm", "--config-dir", folder, code=10).stderr


def test_check_of_sound_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", "strict: yes")
    assert ctl("check", "--config-dir", folder).stdout == "sound: 1 file\n"
    document = json.loads(ctl("check", "--config-dir", folder, "--json").stdout)
    assert document["result"] == "sound"
    assert [Path(each).name for each in document["files"]] == ["nbdbackup.yaml"]
    assert "give an existing one" in ctl("check", "--config-dir", tmp_path / "b", code=10).stderr


def test_show(tmp_path: Path) -> None:
    main = "strict: yes\ncompression: 9\n"
    folder = write(tmp_path / "a", main, b="match: {name: b}\nlimits:\n  wait: 2h\n")
    done = ctl("show", "b", "--config-dir", folder)
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}
    assert set(rows) == set(schema.BY_PATH)
    assert rows["limits.wait"] == ["2h", f"{folder}/domains.d/b.yaml:3"]
    assert rows["strict"] == ["yes", f"{folder}/nbdbackup.yaml:1"]
    assert rows["threshold"] == ["none", "default"]
    document: dict[str, Any] = json.loads(ctl("show", "b", "--config-dir", folder, "--json").stdout)
    by_path = {each["path"]: each for each in document["settings"]}
    assert by_path["limits.wait"] == {
        "path": "limits.wait",
        "value": 7200.0,
        "text": "2h",
        "file": f"{folder}/domains.d/b.yaml",
        "line": 3,
    }
    assert by_path["scratch.reserve"]["value"] == 512 << 20
    assert by_path["compression"]["value"] == by_path["compression"]["text"] == "lz4:9"
    assert (document["version"], document["domain"], document["uuid"]) == (1, "b", "")


def test_show_asks_libvirt_for_labels(tmp_path: Path) -> None:
    """libvirt's own test driver: a real client, and a host that is a file."""
    node = tmp_path / "node.xml"
    node.write_text(NODE)
    uri = f"test://{node}"
    text = f"match:\n  metadata: {{tier: gold, '{{{NOVA}}}instance/flavor/memory': 512}}\n"
    folder = write(tmp_path / "a", "", gold=f"{text}strict: yes")
    for name in ("vm1", UUID):
        found = json.loads(ctl("show", name, "--config-dir", folder, "--json", uri=uri).stdout)
        assert (found["domain"], found["uuid"]) == ("vm1", UUID)
        assert [Path(each).name for each in found["files"]] == ["nbdbackup.yaml", "gold.yaml"]
    missing = ctl("show", "vm2", "--config-dir", folder, uri=uri, code=20).stderr
    assert "gold.yaml is for depends on what libvirt knows: no domain vm2" in missing
    # the URI of the configuration
    (folder / "nbdbackup.yaml").write_text(f"libvirt: {{uri: '{uri}'}}")
    assert "gold.yaml" in ctl("show", "vm1", "--config-dir", folder).stdout
    (folder / "nbdbackup.yaml").write_text("libvirt: {uri: 'qemu+unix:///system?socket=/none'}")
    away = ctl("show", "vm1", "--config-dir", folder, code=20).stderr
    assert "gold.yaml is for depends on what libvirt knows: can't connect" in away


def test_wrong_usage(tmp_path: Path) -> None:
    assert "wants a DOMAIN" in ctl("show", code=2).stderr
    assert "takes no DOMAIN" in ctl("check", "vm", code=2).stderr
    assert "invalid choice" in ctl("prove", code=2).stderr
    assert ctl("show", "vm", "--config-dir", tmp_path / "x", code=10).stdout == ""


def test_sample_is_the_file_in_etc() -> None:
    text = (TOP / "etc/nbdbackup/nbdbackup.yaml").read_text()
    assert ctl("sample").stdout == text
    assert json.loads(ctl("sample", "--json").stdout)["sample"] == text


def test_a_missing_library_is_one_line() -> None:
    script = (
        "import sys; sys.modules['yaml'] = None\n"
        "from nbdbackupd.app import ctl; sys.exit(ctl.main(['config', 'check']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TOP, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 10
    assert done.stderr.splitlines() == [
        "nbdbackupctl: PyYAML is missing: install python3-yaml (Debian) or python3-pyyaml "
        "(Fedora, EL)"
    ]


# -- generated files


def test_generated_files_are_current() -> None:
    assert generated.stale(gen_config.generated()) == [], "run scripts/gen-config"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_manual_renders_every_setting() -> None:
    page = TOP / "docs/man/nbdbackup.yaml.5"
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tascii", "-P-cbou", "-rLL=200n", page],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    shown = " ".join(done.stdout.replace("\b", "").split())
    for setting in schema.BY_PATH.values():
        assert f"{setting.path} (" in shown, setting.path
    # no mark-up is left over
    assert "*nbd" not in shown
    assert "--*" not in shown


def test_the_uri_of_another_host(tmp_path: Path) -> None:
    """D-1: ``config check`` names the line; what is this host by any address is let pass."""
    main = tmp_path / "nbdbackup.yaml"
    for host in ("192.0.2.1", "me@nowhere.invalid", "[2001:db8::1]:22"):
        main.write_text(f"full_every: 7d\nlibvirt:\n  uri: qemu+ssh://{host}/system\n")
        said = ctl("check", "--config-dir", tmp_path, code=10).stderr
        assert f"{main}:3: libvirt.uri: " in said
        assert "leave the host out of the URI" in said
    for uri in ("qemu+ssh://root@localhost/system", "qemu+tcp://127.0.0.1:1/system",
                "qemu:///session", "qemu+unix:///system?socket=/x"):  # fmt: skip
        main.write_text(f"libvirt:\n  uri: {uri}\n")
        ctl("check", "--config-dir", tmp_path)


def test_a_repository_in_a_units_own_directory() -> None:
    """What is saved there would be gone with the unit (PrivateTmp=)."""
    mounts = (
        "30 1 0:28 / / rw - ext4 /dev/x rw\n"
        "99 30 0:28 /var/tmp/systemd-private-1-a.service-b/tmp /var/tmp rw - ext4 /dev/x rw\n"
    )
    for path in ("/var/tmp/backup", "/var/tmp"):
        with pytest.raises(RepositoryError, match="lies in /var/tmp"):
            mounted.check_shared(Path(path), mounts)
    mounted.check_shared(Path("/var/tmpx"), mounts)
    mounted.check_shared(Path("/backup"), mounts)
