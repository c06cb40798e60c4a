"""What a definition may say of a host: by kind, beside what every guest needs (S-1 to S-3)."""

from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from nbdbackupd.errors import DomainError, UsageError
from nbdbackupd.model import allowed, definition, sifting, throwaway
from nbdbackupd.model.definition import Adapted, Changes, NewDisk
from nbdbackupd.model.domain import is_uuid
from tests.lib.ordinary import CLOUD, WINDOWS

WIN = Changes(
    name="clone", disks={"sda": NewDisk(path="/new/a.qcow2", format="qcow2")},
    nvram="/new/vars.fd", loader="/usr/share/OVMF/OVMF_CODE_4M.ms.fd",
)  # fmt: skip
ARM = Changes(
    name="clone", disks={"vda": NewDisk(path="/dev/new/lv", format="raw", type="block")},
    kernel="/new/vmlinuz", initrd="/new/initrd.img",
)  # fmt: skip
BARE = """\
<domain type='qemu'><name>vm</name><memory>1</memory>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{devices}</devices>{rest}</domain>
"""


def adapt(xml: str, changes: Changes) -> Adapted:
    number = iter(range(1, 1 << 16))
    return definition.adapt(xml, changes, lambda size: next(number).to_bytes(size, "big"))


def bare(devices: str = "", rest: str = "", **options: object) -> Adapted:
    changes = replace(Changes(name="clone"), **options)  # type: ignore[arg-type]
    return adapt(BARE.format(devices=devices, rest=rest), changes)


def places(xml: str) -> list[str]:
    """All elements with their attributes and texts, in order; identities are left out."""
    found = []
    for each in ET.fromstring(xml).iter():
        words = {name: value for name, value in each.items() if name != "address"}
        found.append(f"{each.tag} {words} {(each.text or '').strip()}")
    return found


@pytest.mark.parametrize(("xml", "changes"), [(WINDOWS, WIN), (CLOUD, ARM)], ids=["win", "cloud"])
def test_what_virt_manager_makes_comes_back(xml: str, changes: Changes) -> None:
    """Nothing is left out of a clone; the same machine needs nobody's consent."""
    clone = adapt(xml, changes)
    assert clone.foreign == ()
    assert not [line for line in clone.warnings if "left out" in line]
    name = ET.fromstring(xml).findtext("name", "")
    same = adapt(xml, replace(changes, name=name, keep_identity=True))
    assert not [line for line in same.changes if line.startswith("kept")]
    lost = set(places(xml)) - set(places(same.xml))
    # what libvirt made up for one run, images, and words about images
    words = (
        "alias", "seclabel", "label", "imagelabel", "domain", "source", "backingStore", "genid",
        "driver", "disk", "nvram", "kernel", "initrd", "target", "console", "name",
    )  # fmt: skip
    assert {each for each in lost if each.partition(" ")[0] not in words} == set()


def test_a_definition_that_was_sifted_is_sifted_no_further() -> None:
    for xml, changes in ((WINDOWS, WIN), (CLOUD, ARM)):
        once = adapt(xml, changes)
        again = adapt(once.xml, replace(changes, uuid=once.uuid, keep_identity=True))
        assert places(again.xml) == places(once.xml)


@pytest.mark.parametrize(
    ("devices", "rest"),
    [
        ("<emulator>/tmp/qemu-system-x86_64</emulator>", ""),
        ("<emulator>/usr/bin/../../tmp/qemu-system-x86_64</emulator>", ""),
        ("<emulator>/usr/bin/bash</emulator>", ""),
        ("<emulator>/usr/bin/qemu-system-x86_64<x>/../../../tmp/x</x></emulator>", ""),
        ("<interface type='ethernet'><script path='/tmp/x'/></interface>", ""),
        ("<interface type='ethernet'><downscript path='/tmp/x'/></interface>", ""),
        ("<interface type='network'><backend tap='/tmp/x'/></interface>", ""),
        ("<interface type='network'><rom file='/tmp/x'/></interface>", ""),
        ("<interface type='user'><backend type='passt' logFile='/tmp/x'/></interface>", ""),
        ("<interface type='direct'><source dev='tmp' mode='passthrough'/></interface>", ""),
        ("<graphics type='sdl' display=':0' xauth='/tmp/x'/>", ""),
        ("<graphics type='spice'><gl enable='yes' rendernode='/tmp/x'/></graphics>", ""),
        ("<graphics type='dbus' address='unix:path=/tmp/x'/>", ""),
        ("<video><model type='virtio'><acceleration rendernode='/tmp/x'/></model></video>", ""),
        ("<audio id='1' type='oss'><input dev='/tmp/x'/></audio>", ""),
        ("<audio id='1' type='pulseaudio' serverName='tmp'/>", ""),
        ("<rng model='virtio'><backend model='random'>/tmp/x</backend></rng>", ""),
        ("<shmem name='../tmp'><model type='ivshmem-plain'/></shmem>", ""),
        ("<pstore backend='acpi-erst'><path>/tmp/x</path></pstore>", ""),
        ("<memory model='dimm'><source><path>/tmp/x</path></source></memory>", ""),
        ("", "<seclabel type='static' model='dac'><label>+0:+0</label></seclabel>"),
        ("", "<seclabel type='dynamic' model='selinux'><baselabel>tmp</baselabel></seclabel>"),
        ("", "<seclabel type='none' model='tmp'/>"),
        ("", "<bootloader>/tmp/x</bootloader>"),
        ("", "<sysinfo type='fwcfg'><entry name='opt/x' file='/tmp/x'/></sysinfo>"),
        ("", "<blkiotune><device><path>/tmp/x</path></device></blkiotune>"),
        ("", "<resource><partition>/tmp</partition></resource>"),
        ("", "<x:commandline xmlns:x='http://libvirt.org/schemas/domain/qemu/1.0'>"
             "<x:arg value='/tmp'/></x:commandline>"),
        ("", "<x:capabilities xmlns:x='http://libvirt.org/schemas/domain/qemu/1.0'>"
             "<x:add capability='tmp'/></x:capabilities>"),
        ("", "<x:override xmlns:x='http://libvirt.org/schemas/domain/qemu/1.0'><x:device "
             "alias='tmp'/></x:override>"),
        ("", "<x:anything xmlns:x='urn:tmp'/>"),
        ("", "<unheard-of/><tmp/>"),
    ],
)  # fmt: skip
def test_what_is_of_a_host_is_left_out(devices: str, rest: str) -> None:
    """S-1, S-2, S-3: with a line each; the same machine keeps it only with consent."""
    adapted = bare(devices, rest)
    words = ("tmp", "bash", "+0:+0", "log file", "pstore")
    told = [*adapted.warnings, *adapted.changes]
    assert [line for line in told if any(word in line for word in words)], told
    assert "tmp" not in adapted.xml
    assert "/bash" not in adapted.xml
    with pytest.raises(UsageError, match="--trust-definition"):
        bare(devices, rest, keep_identity=True)


def test_a_network_disk_of_somebody() -> None:
    """Only the very sockets of what is restored; a second source does not hide behind one."""
    disk = "<disk type='network' device='cdrom'><source protocol='nbd'>{}</source>{}</disk>"
    target = "<target dev='sda' bus='sata'/>"
    for source in (
        "<host transport='unix' socket='/run/other'/>", "<host name='192.0.2.1' port='1'/>",
    ):  # fmt: skip
        with pytest.raises(UsageError, match="sda"):
            bare(disk.format(source, target), media="keep")
    new = {"vda": NewDisk(format="raw", type="network", socket="/run/own", export="vda")}
    two = "<disk type='file'><target dev='vda'/><source file='/a'/><source file='/b'/></disk>"
    adapted = bare(two, disks=new)
    assert adapted.foreign == ()
    assert adapted.xml.count("<source") == 1
    assert 'socket="/run/own"' in adapted.xml


@pytest.mark.parametrize("threads", ["emulator", "iothread", "vcpu"])
def test_no_guest_comes_before_its_host(threads: str) -> None:
    """S-1: at priority 99 on each processor nobody could end it."""
    which = "" if threads == "emulator" else f"{threads}s='0-1' "
    schedule = f"<{threads}sched {which}scheduler='fifo' priority='99'/>"
    adapted = bare(rest=f"<cputune><shares>2048</shares>{schedule}</cputune>")
    assert "<shares>2048</shares>" in adapted.xml
    assert "sched" not in adapted.xml
    (told,) = [line for line in adapted.warnings if "left out" in line]
    assert f"{threads}sched" in told
    assert "come before all that the host does" in told
    with pytest.raises(UsageError, match="--trust-definition"):
        bare(rest=f"<cputune>{schedule}</cputune>", keep_identity=True)


def test_dumps_and_host_identity() -> None:
    adapted = bare(rest="<on_crash>coredump-restart</on_crash><sysinfo type='host'/>")
    assert "<on_crash>restart</on_crash>" in adapted.xml
    assert [line for line in adapted.warnings if "coredump" in line]
    adapted = bare("<watchdog model='i6300esb' action='dump'/>")
    assert 'action="none"' in adapted.xml
    assert [line for line in adapted.warnings if "watchdog" in line and "dumps" in line]
    smbios = BARE.format(devices="", rest="").replace("</os>", "<smbios mode='host'/></os>")
    assert "smbios" not in adapt(smbios, Changes(name="x")).xml


@pytest.mark.parametrize(
    ("zone", "stays"),
    [("Europe/Berlin", True), ("UTC", True), ("Etc/GMT+5", True), ("America/Port-au-Prince", True),
     ("/etc/shadow", False), (":/dev/sr0", False), ("../../dev/sr0", False), ("a/../b", False)],
)  # fmt: skip
def test_a_time_zone_is_no_path(zone: str, *, stays: bool) -> None:
    """S-1: libvirt puts it into QEMU's environment, and the C library opens what it names."""
    adapted = bare(rest=f"<clock offset='timezone' timezone='{zone}'/>")
    assert (f'timezone="{zone}"' in adapted.xml) is stays
    assert (adapted.foreign == ()) is stays


def test_firmware_of_the_system_is_only_read() -> None:
    """It is all domains' own, and libvirt does not give it away."""
    loader = "<loader readonly='no' type='pflash'>{}</loader></os>"
    for path, stays in (
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", True), ("/usr/share/edk2/ovmf/OVMF_CODE.fd", True),
        ("/usr/share/qemu/edk2-aarch64-code.fd", True), ("/usr/share/OVMF/../x", False),
        ("/var/lib/x/OVMF.fd", False), ("/usr/share/doc/x", False),
    ):  # fmt: skip
        xml = BARE.format(devices="", rest="").replace("</os>", loader.format(path))
        adapted = adapt(xml, Changes(name="x"))
        assert (path in adapted.xml) is stays
        assert (adapted.foreign == ()) is stays
        assert 'readonly="no"' not in adapted.xml


@pytest.mark.parametrize("kind", ["lxc", "xen", "bhyve", "test"])
def test_domains_of_other_hypervisors(kind: str) -> None:
    xml = BARE.format(devices="", rest="").replace("type='qemu'", f"type='{kind}'", 1)
    with pytest.raises(DomainError, match="not run by QEMU"):
        adapt(xml, Changes(name="x"))


def test_trust_keeps_what_two_domains_may_share() -> None:
    kept: list[str] = []
    xml = BARE.format(
        devices="<emulator>/opt/qemu</emulator><filesystem type='mount'><source dir='/srv'/>"
        "<target dir='x'/><readonly/></filesystem><hostdev mode='subsystem' type='usb'/>",
        rest="<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>"
        "<q:arg value='file=/own'/><q:env name='A' value='b'/></q:commandline>",
    )
    found = definition.adapt(xml, Changes(name="x", trusted=True), bytes, kept.extend)
    for word in ("/opt/qemu", "/srv", 'name="A"'):
        assert word in found.xml
    # what is one of a kind never: another domain has it
    for word in ("hostdev", "file=/own"):
        assert word not in found.xml
    assert [line for line in kept if "/opt/qemu" in line]


def test_many_things_are_told_shortly() -> None:
    """A thousand words do not fill the terminal, and none of them controls it."""
    rest = "".join(f"<a{number}/>" for number in range(1000)) + "<b c='&#x202e;&#10;x'/>"
    adapted = bare(rest=rest)
    assert len(adapted.foreign) == definition.MOST_TOLD + 1
    assert adapted.foreign[-1] == "and 901 more"
    long = bare(rest=f"<b c='&#x202e;&#10;{'x' * 5000}'/>").foreign
    assert all(line.isprintable() and len(line) < 200 for line in long)


def test_a_path_of_ours_is_of_one_use() -> None:
    """What is restored is content of the set: it is no program, whatever mode it has."""
    own = NewDisk(path="/usr/new/a.raw", format="raw")
    xml = BARE.format(
        devices="<emulator>/usr/new/a.raw</emulator><disk type='file'><target dev='vda'/></disk>"
        "<rng model='virtio'><backend model='random'>/usr/new/a.raw</backend></rng>",
        rest="",
    )
    adapted = adapt(xml, Changes(name="x", disks={"vda": own}))
    assert adapted.xml.count("/usr/new/a.raw") == 1
    assert len(adapted.foreign) == 2


def test_every_rule_has_its_place() -> None:
    """The list and the rules name the same places."""
    marked = {
        f"{path} {name}"
        for path, kinds in allowed.ALLOWED.items()
        for name, kind in kinds.items()
        if kind == allowed.RULE
    }
    assert marked == set(sifting._VALUES)
    assert set(sifting._ELEMENTS) <= set(allowed.ALLOWED)
    assert all(reason for path, reason in allowed.REASONS.items() if has_mark(path))


def has_mark(path: str) -> bool:
    return any(kind for kind in allowed.ALLOWED[path].values())


@pytest.mark.parametrize(
    "word", ["../../../etc/cron.d", "x", "", "7A1F0B8E3A7A4B8E9D570F6F2F1B7C11"]
)
def test_an_identity_that_is_none(word: str) -> None:
    """A UUID names a directory: that of the TPM's state, which root writes."""
    xml = BARE.format(devices="", rest="").replace("<name>", f"<uuid>{word}</uuid><name>")
    same = Changes(name="x", keep_identity=True)
    if word:
        with pytest.raises(DomainError, match="is no UUID"):
            adapt(xml, same)
    else:
        assert is_uuid(adapt(xml, same).uuid)
    assert is_uuid(adapt(xml, Changes(name="x")).uuid)


@pytest.mark.parametrize(
    "rest",
    [
        "<description>x:nbdbackup-throwaway</description>",
        "<title>x:nbdbackup-throwaway</title>",
        "<metadata><x:a xmlns:x='urn:x'><x:nbdbackup-throwaway/></x:a></metadata>",
        "<metadata><x:a xmlns:x='urn:x' b=':nbdbackup-throwaway'/></metadata>",
        "<metadata>:nbdbackup-throwaway<x:a xmlns:x='urn:x'/></metadata>",
    ],
)
def test_nobody_hides_from_the_backup(rest: str) -> None:
    """A domain with the mark of a boot is passed over by the hook: no set may forge that."""
    assert throwaway.is_marked(BARE.format(devices="", rest=rest))
    assert not throwaway.is_marked(bare(rest=rest).xml)
