"""A definition for another domain: nothing that two can't share, and libvirt's schema holds."""

import copy
import random
import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from nbdbackupd.errors import DomainError, UsageError
from nbdbackupd.model import definition, hostpaths, throwaway
from nbdbackupd.model.definition import Adapted, Changes, Consent, NewDisk
from nbdbackupd.model.hostpaths import PathUse, VolumeUse
from tests.lib.definitions import CLONE, DISKS, PRODUCTION

SINGULAR = (
    "PROD", "0f1e2d3c", "52:54:00:00:00:0", "44321", "44322", "44323", "44324", "tapPROD",
    "vnet3", "svirt_t", "/dev/pts", "hostdev", 'address="44"', "portid",
    "interfaceid", "backingStore", "mirror", "encryption", 'name="shared"',
)  # fmt: skip


def adapt(
    changes: Changes = CLONE,
    xml: str = PRODUCTION,
    seed: int = 1,
    consent: Consent = definition.refuse,
) -> Adapted:
    return definition.adapt(xml, changes, random.Random(seed).randbytes, consent)


def root_of(adapted: Adapted) -> ET.Element:
    return ET.fromstring(adapted.xml)


def test_nothing_of_the_original_is_left() -> None:
    adapted = adapt()
    for word in SINGULAR:
        assert word in PRODUCTION.replace("'", '"'), word
        assert word not in adapted.xml, word
    assert (adapted.name, root_of(adapted).findtext("name")) == ("clone", "clone")
    assert root_of(adapted).findtext("uuid") == adapted.uuid
    assert root_of(adapted).findtext("./sysinfo/system/entry") == adapted.uuid
    assert "id" not in root_of(adapted).attrib
    assert "lib:libosinfo" in adapted.xml


def test_l2_what_is_restored_is_not_thrown_away() -> None:
    """L-2: a point of a domain that was just restored live, say."""
    root = ET.fromstring(PRODUCTION)
    throwaway.mark(root)
    throwaway.mark(root)
    marked = ET.tostring(root, encoding="unicode")
    assert marked.count(throwaway.NAME) == 1
    again = adapt(xml=marked)
    assert not throwaway.is_marked(again.xml)
    assert "libosinfo.org" in again.xml


def test_what_the_guest_was_set_up_for_stays() -> None:
    root = root_of(adapt())
    assert root.findtext("./os/type") == "hvm"
    assert root.get("type") == "kvm"
    targets = [each.get("dev") for each in root.findall("./devices/disk/target")]
    assert targets == ["vda", "vdb", "sda", "vdc", "hdc", "fda"]
    assert root.findtext("./devices/disk/serial") == "same"
    interfaces = root.findall("./devices/interface")
    assert [each.get("type") for each in interfaces] == ["bridge", "network"]
    channels = root.findall("./devices/channel")
    assert [each.get("type") for each in channels] == ["unix", "pty", "unix"]
    assert [each.find("source") for each in channels] == [None] * 3
    assert len(root.findall("./devices/tpm")) == 1


def test_disks_have_the_restored_images() -> None:
    root = root_of(adapt())
    found = {}
    for disk in root.findall("./devices/disk"):
        target, driver, source = (disk.find(tag) for tag in ("target", "driver", "source"))
        assert target is not None
        assert driver is not None
        attributes = dict(source.attrib) if source is not None else {}
        found[target.get("dev")] = (
            disk.get("type"), disk.get("device"), driver.get("type"), attributes,
        )  # fmt: skip
    assert found == {
        "vda": ("file", "disk", "qcow2", {"file": "/new/a.qcow2"}),
        "vdb": ("file", "disk", "raw", {"file": "/new/b <&'\"> .raw"}),
        "sda": ("block", "disk", "raw", {"dev": "/dev/new/lv"}),
        "vdc": ("network", "disk", "raw", {"protocol": "nbd", "name": "vdc"}),
        "hdc": ("file", "cdrom", None, {}),
        "fda": ("file", "floppy", "raw", {}),
    }
    assert set(adapt().paths) == {
        "/new/a.qcow2", "/new/b <&'\"> .raw", "/dev/new/lv", "/new/vars.fd", "/new/code.fd",
        "/new/kernel", "/new/initrd",
    }  # fmt: skip


def test_the_same_machine_keeps_what_is_its_own() -> None:
    kept: list[str] = []
    same = replace(CLONE, name="PROD", keep_identity=True, media="keep")
    adapted = adapt(same, consent=kept.extend)
    root = root_of(adapted)
    for word in ("hostdev", "/PROD/share", "/PROD/own", "/PROD/medium.iso", "/dev/input/PROD"):
        assert [line for line in kept if word in line], word
    assert {f"kept: {line}" for line in kept} <= set(adapted.changes)
    assert adapted.foreign == ()
    with pytest.raises(UsageError, match="--trust-definition"):
        adapt(same)
    assert adapted.uuid == "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
    # whoever it is: it is at an earlier time
    assert root.findtext("genid") not in (None, "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0aa")
    macs = [each.get("address") for each in root.iter("mac")]
    assert macs == ["52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:03"]
    assert len(root.findall("./devices/hostdev")) == 1
    assert root.findall("./devices/graphics")[0].get("port") == "44323"
    assert "file=/PROD/own" in adapted.xml
    # libvirt's own of one run, and images, never
    for word in ("vnet3", "portid", "/PROD/a.qcow2", "/PROD/base", "rbd", "+0:+0", "virtio-disk0"):
        assert word not in adapted.xml
    assert PathUse(path="/PROD/medium.iso", what="cdrom hdc", readonly=True) in adapted.uses


def test_networks() -> None:
    down = root_of(adapt(replace(CLONE, network="down")))
    links = [each.find("link") for each in down.findall("./devices/interface")]
    assert [link is not None and link.get("state") for link in links] == ["down", "down"]
    none = root_of(adapt(replace(CLONE, network="none")))
    assert none.findall("./devices/interface") == []
    macs = {
        each.get("address") for seed in (1, 2) for each in root_of(adapt(seed=seed)).iter("mac")
    }
    assert len(macs) == 4
    assert all(re.fullmatch("52:54:00(:[0-9a-f]{2}){3}", mac or "") for mac in macs)


def test_two_cards_never_get_one_address() -> None:
    answers = iter([b"u" * 16, b"g" * 16, b"\1\2\3", b"\1\2\3", b"\1\2\4"])
    adapted = definition.adapt(PRODUCTION, CLONE, lambda _: next(answers))
    macs = [each.get("address") for each in root_of(adapted).iter("mac")]
    assert macs == ["52:54:00:01:02:03", "52:54:00:01:02:04"]


def test_disks_that_are_kept() -> None:
    kept: list[str] = []
    adapted = adapt(replace(CLONE, other_disks="keep"), consent=kept.extend)
    assert len(kept) == 1
    assert "/PROD/excluded" in kept[0]
    with pytest.raises(UsageError, match="/PROD/excluded"):
        adapt(replace(CLONE, other_disks="keep"))
    assert PathUse(path="/PROD/excluded", what="disk vdd") in adapted.uses
    assert [text for text in adapted.warnings if "disk vdd is not restored" in text]
    some = replace(CLONE, other_disks="keep", disks={"vda": DISKS["vda"]})
    volume = adapt(some, consent=kept.extend)
    assert VolumeUse(pool="PROD", volume="PRODb", what="disk vdb") in volume.uses


def test_a_disk_that_the_xml_does_not_have() -> None:
    with pytest.raises(DomainError, match="no disk vdz"):
        adapt(replace(CLONE, disks={"vdz": NewDisk(path="/new/z", format="raw")}))


def test_firmware_that_the_point_does_not_hold() -> None:
    """The original's NVRAM is never taken, nor a kernel or a loader of just any path."""
    adapted = adapt(replace(CLONE, nvram=None, loader=None, own_loader=False, kernel=None))
    system = root_of(adapted).find("os")
    assert system is not None
    assert system.get("firmware") == "efi"
    assert "/PROD/vars.fd" not in adapted.xml
    nvram = system.find("nvram")
    assert nvram is not None
    assert (nvram.text, nvram.get("template")) == (None, "/usr/share/OVMF/vars.fd")
    for word in ("/PROD/kernel", "/new/initrd", "/PROD/code.fd"):
        assert word not in adapted.xml
    trusted = adapt(replace(CLONE, kernel=None, trusted=True), consent=lambda _: None)
    assert PathUse(path="/PROD/kernel", what="kernel", readonly=True) in trusted.uses
    assert [text for text in adapted.warnings if "does not hold the NVRAM" in text]
    nested = PRODUCTION.replace(
        "<nvram template='/usr/share/OVMF/vars.fd'>/PROD/vars.fd</nvram>",
        "<nvram type='file'><source file='/PROD/vars.fd'/></nvram>",
    )
    new = root_of(adapt(xml=nested)).find("./os/nvram")
    assert new is not None
    assert (new.text, new.attrib, list(new)) == ("/new/vars.fd", {}, [])
    assert "/PROD/vars.fd" not in adapt(replace(CLONE, nvram=None), nested).xml


def test_a_loader_that_libvirt_chose_at_start() -> None:
    """libvirt 9.0 does not name it in the definition: the point's own has to be named."""
    loader = "    <loader readonly='yes' type='pflash'>/PROD/code.fd</loader>\n"
    assert loader in PRODUCTION
    for secure in (False, True):
        xml = PRODUCTION.replace(loader, "")
        if secure:
            xml = xml.replace("enabled='no' name='secure-boot'", "enabled='yes' name='secure-boot'")
        root = root_of(adapt(xml=xml))
        assert (root.find("./features/smm[@state='on']") is not None) is secure
        system = root.find("os")
        assert system is not None
        found = system.find("loader")
        assert found is not None
        assert (found.text, found.get("type")) == ("/new/code.fd", "pflash")
        assert (found.get("secure") == "yes") is secure
        assert (system.get("firmware"), system.find("firmware")) == (None, None)
        same = root_of(adapt(replace(CLONE, own_loader=False), xml)).find("os")
        assert same is not None
        assert (same.get("firmware"), same.find("loader")) == ("efi", None)


@pytest.mark.parametrize(
    ("machine", "family"),
    [
        ("pc-q35-7.2", "q35"), ("pc-i440fx-9.0", "pc"), ("pc-q35-rhel9.4.0", "q35"),
        ("pc-i440fx-rhel7.6.0", "pc"), ("virt-8.2", "virt"),
        ("s390-ccw-virtio-9.1", "s390-ccw-virtio"),
        ("pseries-9.0", "pseries"), ("q35", "q35"), ("microvm", "microvm"),
    ],
)  # fmt: skip
def test_families_of_machines(machine: str, family: str) -> None:
    assert definition.machine_family(machine) == family


@pytest.mark.parametrize("name", ["", "  ", "a/b", "a\nb"])
def test_names_that_libvirt_refuses(name: str) -> None:
    with pytest.raises(UsageError):
        adapt(replace(CLONE, name=name))


@pytest.mark.parametrize(
    "xml", ["", "<domain>", "<pool/>", "no xml", "<domain><devices/><devices/></domain>"]
)
def test_what_is_no_definition(xml: str) -> None:
    with pytest.raises(DomainError):
        adapt(xml=xml)


def test_an_empty_definition_becomes_one() -> None:
    adapted = adapt(Changes(name="x"), "<domain/>")
    assert root_of(adapted).findtext("name") == "x"
    assert root_of(adapted).findtext("uuid") == adapted.uuid


def mutilated(rng: random.Random) -> str:
    """The sample with elements and attributes missing, doubled, and in another order."""
    root = ET.fromstring(PRODUCTION)
    for _ in range(rng.randrange(1, 30)):
        parent = rng.choice(list(root.iter()))
        children = list(parent)
        match rng.randrange(5):
            case 0 if children:
                parent.remove(rng.choice(children))
            case 1 if children:
                parent.append(copy.deepcopy(rng.choice(children)))
            case 2:
                rng.shuffle(children)
                parent[:] = children
            case 3 if parent.attrib:
                parent.attrib.pop(rng.choice(list(parent.attrib)))
            case 4:
                parent.text = rng.choice([None, "", " ", "/PROD/odd", "\t\n"])
    return ET.tostring(root, encoding="unicode")


def test_odd_definitions(seed: int) -> None:
    """Whatever is missing: there is a definition without the original's images, or an error."""
    rng = random.Random(seed)
    images = [
        word for word in re.findall("'(/[^']*PROD[^']*)'", PRODUCTION) if "mirror" not in word
    ]
    adapted = 0
    for _ in range(200):
        xml = mutilated(rng)
        targets = [
            each.get("dev", "") for each in ET.fromstring(xml).findall("./devices/disk/target")
        ]
        disks = {name: disk for name, disk in DISKS.items() if name in targets}
        changes = replace(CLONE, disks=disks, keep_identity=rng.random() < 0.3)
        try:
            found = adapt(changes, xml)
        except (DomainError, UsageError):
            continue
        adapted += 1
        root = root_of(found)
        assert root.findtext("name") == "clone"
        sources = {
            value
            for disk in root.iter("disk")
            for source in disk.iter("source")
            for value in source.attrib.values()
        }
        assert not sources.intersection(images)
        assert {use.path for use in hostpaths.of_domain(root) if isinstance(use, PathUse)} == set(
            found.paths
        )
    assert adapted > 50


def use(path: str, *, readonly: bool = False) -> PathUse:
    return PathUse(path=path, what="disk vda", readonly=readonly)


@pytest.mark.parametrize(
    ("mine", "theirs", "clash"),
    [
        (use("/a"), use("/a"), True),
        (use("/a"), use("/b"), False),
        (use("/a", readonly=True), use("/a"), True),
        (use("/a"), use("/a", readonly=True), True),
        (use("/a", readonly=True), use("/a", readonly=True), False),
        (use("/link"), use("/a"), True),
    ],
)
def test_one_writer_is_one_too_many(mine: PathUse, theirs: PathUse, *, clash: bool) -> None:
    same = {"/link": "file 1", "/a": "file 1", "/b": "file 2"}
    found = hostpaths.clashes([mine], {"other": [theirs]}, same)
    assert [(each.use, each.domain) for each in found] == ([(mine, "other")] if clash else [])


def test_paths_of_a_domain_and_its_snapshots() -> None:
    paths = {use.path for use in hostpaths.of_xml(PRODUCTION) if isinstance(use, PathUse)}
    named = set(re.findall(r"['>](/PROD/[^'<]*)", PRODUCTION))
    # connections to servers are not files of this domain's own; a word of QEMU's is not read
    assert named - paths == {"/PROD/egd", "/PROD/spice", "/PROD/shm"}
    assert "/dev/PROD/lun" in paths
    snapshot = (
        "<domainsnapshot><memory snapshot='external' file='/s/memory'/><disks>"
        "<disk name='vda' snapshot='external'><source file='/s/over'/></disk></disks>"
        "<domain><devices><disk type='file'><source file='/s/below'/><target dev='vda'/></disk>"
        "</devices></domain></domainsnapshot>"
    )
    assert {use.path for use in hostpaths.of_xml(snapshot) if isinstance(use, PathUse)} == {
        "/s/memory", "/s/over", "/s/below",
    }  # fmt: skip
