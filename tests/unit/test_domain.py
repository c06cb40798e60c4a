"""Reading domain XML of many shapes, and telling one disk from another."""

from xml.etree import ElementTree as ET

import pytest

from nbdbackupd.errors import DomainError
from nbdbackupd.model import domain as domain_model
from nbdbackupd.model.chain import ImageLayer
from nbdbackupd.model.domain import Agent, parse_domain

HOSTILE = "vm 'one' \"two\" <&> ünïcode"

LIVE = """
<domain type='kvm' id='7'>
  <name>vm1</name>
  <uuid>5b97b46b-fbfe-4710-94af-d486bf1df6a6</uuid>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/vm1.fd</nvram>
    <kernel>/boot/vmlinuz</kernel>
    <initrd>/boot/initrd</initrd>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/img/top.qcow2' index='4'/>
      <backingStore type='file' index='2'>
        <format type='qcow2'/>
        <source file='/img/middle.qcow2'/>
        <backingStore type='block'>
          <format type='raw'/>
          <source dev='/dev/vg/base'/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>S1</serial>
    </disk>
    <disk type='block' device='lun'>
      <driver name='qemu' type='raw'/><source dev='/dev/sdq'/><target dev='sda' bus='scsi'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='rbd' name='pool/image'><host name='mon' port='6789'/></source>
      <target dev='vdb' bus='virtio'/><shareable/>
    </disk>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='qcow2'/><source pool='default' volume='v.qcow2'/>
      <target dev='vdc' bus='virtio'/><transient/>
    </disk>
    <disk type='file' device='disk'>
      <source file='/img/noformat'/><target dev='vdd' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/img/meta.qcow2'>
        <dataStore type='file'><format type='raw'/><source file='/img/meta.raw'/></dataStore>
      </source>
      <target dev='vde' bus='virtio'/>
    </disk>
    <channel type='unix'>
      <target type='virtio' name='com.redhat.spice.0' state='connected'/>
    </channel>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
    </channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
  </devices>
  <seclabel type='dynamic' model='apparmor'><label>libvirt-5b97</label></seclabel>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+106</label></seclabel>
</domain>
"""


def test_live_domain() -> None:
    found = parse_domain(LIVE)
    assert (found.name, found.uuid) == ("vm1", "5b97b46b-fbfe-4710-94af-d486bf1df6a6")
    assert found.loader == "/usr/share/OVMF/OVMF_CODE.fd"
    assert found.nvram == "/var/lib/libvirt/qemu/nvram/vm1.fd"
    assert (found.kernel, found.initrd) == ("/boot/vmlinuz", "/boot/initrd")
    assert (found.has_tpm, found.tpm_source) == (True, "")
    assert found.agent is Agent.CONNECTED
    assert found.owner == (64055, 106)
    targets = ["vda", "sda", "sdb", "vdb", "vdc", "vdd", "vde"]
    assert [disk.target for disk in found.disks] == targets


def test_backing_chain_top_first() -> None:
    assert parse_domain(LIVE).disk("vda").layers == (
        ImageLayer("/img/top.qcow2", "qcow2"),
        ImageLayer("/img/middle.qcow2", "qcow2"),
        ImageLayer("/dev/vg/base", "raw"),
    )


def test_disk_attributes() -> None:
    found = parse_domain(LIVE)
    assert found.disk("vda").serial == "S1"
    assert (found.disk("sda").device, found.disk("sda").source) == ("lun", "/dev/sdq")
    assert (found.disk("sdb").device, found.disk("sdb").source) == ("cdrom", "")
    assert found.disk("sdb").layers == ()
    assert (found.disk("vdb").source, found.disk("vdb").shareable) == ("pool/image", True)
    assert (found.disk("vdc").source, found.disk("vdc").transient) == ("default/v.qcow2", True)
    assert found.disk("vdd").format == "raw"
    assert found.disk("vde").data_file == "/img/meta.raw"
    assert found.disk("vde").format == "qcow2"


def test_missing_disk_is_an_error() -> None:
    with pytest.raises(DomainError, match="no disk vdz"):
        parse_domain(LIVE).disk("vdz")


def test_minimal_domain() -> None:
    found = parse_domain("<domain><name>x</name></domain>")
    assert found.disks == ()
    assert found.agent is Agent.ABSENT
    assert found.owner is None
    assert not found.has_tpm


def test_hostile_names_survive() -> None:
    root = ET.fromstring("<domain><name/><devices><disk type='file'/></devices></domain>")
    name = root.find("name")
    disk = root.find("./devices/disk")
    assert name is not None
    assert disk is not None
    name.text = HOSTILE
    ET.SubElement(disk, "source", file=f"/img/{HOSTILE}.qcow2")
    ET.SubElement(disk, "target", dev="vda")
    found = parse_domain(ET.tostring(root, encoding="unicode"))
    assert found.name == HOSTILE
    assert found.disk("vda").source == f"/img/{HOSTILE}.qcow2"


@pytest.mark.parametrize("text", ["", "<domain>", "<network/>", "not xml"])
def test_no_domain_xml(text: str) -> None:
    with pytest.raises(DomainError):
        parse_domain(text)


def test_nvram_as_nested_source() -> None:
    xml = (
        "<domain><name>x</name><os><nvram type='file'>\n"
        "<source file='/n/v.fd'/></nvram></os></domain>"
    )
    assert parse_domain(xml).nvram == "/n/v.fd"


def test_passthrough_tpm_has_no_state_of_its_own() -> None:
    xml = (
        "<domain><name>x</name><devices><tpm><backend type='passthrough'/></tpm></devices></domain>"
    )
    assert not parse_domain(xml).has_tpm


def test_tpm_state_by_source() -> None:
    xml = (
        "<domain><name>x</name><devices><tpm><backend type='emulator'>"
        "<source type='dir' path='/tpm/x'/></backend></tpm></devices></domain>"
    )
    assert parse_domain(xml).tpm_source == "/tpm/x"


def test_agent_channel_of_an_inactive_domain() -> None:
    xml = LIVE.replace(" state='connected'", "")
    assert parse_domain(xml).agent is Agent.DISCONNECTED


@pytest.mark.parametrize(
    ("label", "owner"),
    [
        ("+0:+0", (0, 0)),
        ("+64055:+106", (64055, 106)),
        ("qemu:qemu", None),
        ("+1", None),
        ("", None),
    ],
)
def test_dac_label(label: str, owner: tuple[int, int] | None) -> None:
    assert domain_model.parse_dac_label(label) == owner


TOP = ImageLayer("/img/top", "qcow2", 10, 111)
BASE = ImageLayer("/img/base", "qcow2", 10, 100)
OTHER = ImageLayer("/img/other", "qcow2", 10, 222)
RBD = ImageLayer("pool/image", "raw")
LV = ImageLayer("/dev/vg/lv", "qcow2")


@pytest.mark.parametrize(
    ("recorded", "current", "same"),
    [
        ((TOP,), (TOP,), True),
        ((BASE,), (TOP, BASE), True),  # external snapshot since then
        ((TOP, BASE), (BASE,), True),  # committed since then
        ((TOP,), (ImageLayer("/img/renamed", "qcow2", 10, 111),), True),
        ((TOP,), (ImageLayer("/img/top", "qcow2", 77, 111),), True),  # device number after boot
        ((TOP,), (ImageLayer("/img/top", "qcow2", 10, 112),), False),  # copied or made anew
        ((TOP,), (ImageLayer("/img/x", "qcow2", 77, 111),), False),
        ((TOP, BASE), (OTHER, BASE), False),  # another clone of one template
        ((RBD,), (RBD,), True),
        ((LV,), (RBD,), False),
        ((TOP,), (ImageLayer("/img/top", "qcow2"),), False),  # file then, none now
        ((), (TOP,), False),
        ((TOP,), (), False),
        ((ImageLayer("", "raw"),), (ImageLayer("", "raw"),), False),
    ],
)
def test_same_image(
    recorded: tuple[ImageLayer, ...],
    current: tuple[ImageLayer, ...],
    same: bool,
) -> None:
    assert domain_model.same_image(recorded, current) is same


@pytest.mark.parametrize(
    ("recorded", "current", "needed"),
    [
        ((TOP,), (TOP,), (TOP,)),
        ((TOP, BASE), (TOP, BASE), (TOP,)),  # what lies below the recorded top did not change
        ((BASE,), (OTHER, TOP, BASE), (OTHER, TOP, BASE)),  # two snapshots since then
        ((TOP, BASE), (OTHER, TOP, BASE), (OTHER, TOP)),
        ((TOP, BASE), (BASE,), (BASE,)),  # committed since then
        ((), (TOP,), ()),
        ((TOP,), (), ()),
    ],
)
def test_layers_that_must_hold_a_bitmap(
    recorded: tuple[ImageLayer, ...],
    current: tuple[ImageLayer, ...],
    needed: tuple[ImageLayer, ...],
) -> None:
    assert domain_model.bitmap_layers(recorded, current) == needed


def test_each_layer_must_hold_a_sound_bitmap() -> None:
    held = {"/img/other": {"cp": True, "cp2": True}, "/img/top": {"cp": True, "cp2": False}}

    def why(name: str, *layers: ImageLayer) -> str:
        return domain_model.unsound_bitmap(layers, held, name)

    assert why("cp", OTHER, TOP) == ""
    assert why("cp", OTHER, TOP, BASE) == "image /img/base has lost bitmap cp"
    assert why("cp2", OTHER) == ""
    assert why("cp2", OTHER, TOP) == "bitmap cp2 in image /img/top is inconsistent"
    assert why("cp3", OTHER, TOP) == "image /img/other has lost bitmap cp3"
