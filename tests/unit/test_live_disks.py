"""D-3: disks that were attached to the running domain alone come back with it."""

from xml.etree import ElementTree as ET

from nbdbackupd.model import live_disks

PERSISTENT = """<domain><name>vm1</name><devices>
<disk type='file' device='disk'><source file='/i/a'/><target dev='vda' bus='virtio'/>
<address type='pci' slot='0x04'/></disk>
<disk type='file' device='disk'><source file='/i/s'/><target dev='sda' bus='scsi'/>
<address type='drive' controller='0' bus='0' target='0' unit='0'/></disk>
<controller type='scsi' index='0' model='virtio-scsi'/>
</devices></domain>"""
LIVE = """<domain id='7'><name>vm1</name><devices>
<disk type='file' device='disk'><source file='/i/a' index='1'/>
<target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='/i/b' index='2'/><backingStore type='file'><source file='/i/base'/></backingStore>
<target dev='vdb' bus='virtio'/><boot order='1'/><serial>X</serial><alias name='virtio-disk1'/>
<address type='pci' slot='0x09'/></disk>
<disk type='file' device='disk'><source file='/i/c'/><target dev='sdb' bus='scsi'/>
<address type='drive' controller='1' bus='0' target='0' unit='3'/></disk>
<disk type='file' device='disk'><source file='/i/d'/><target dev='sdc' bus='scsi'/>
<address type='drive' controller='0' bus='0' target='0' unit='0'/></disk>
<controller type='scsi' index='0' model='virtio-scsi'/>
<controller type='scsi' index='1' model='lsilogic'>
<alias name='scsi1'/><address type='pci' slot='0x0a'/></controller>
</devices></domain>"""


def disks(xml: str) -> dict[str, ET.Element]:
    root = ET.fromstring(xml)
    return {each.find("target").get("dev", ""): each for each in root.findall("./devices/disk")}  # type: ignore[union-attr]


def test_what_ran_is_added() -> None:
    xml, words = live_disks.complete(PERSISTENT, LIVE, ["vda", "vdb", "sda", "sdb", "sdc"])
    found = disks(xml)
    assert list(found) == ["vda", "sda", "vdb", "sdb", "sdc"]
    assert [word.split()[1] for word in words] == ["vdb", "sdb", "sdc"]
    added = found["vdb"]
    assert [each.tag for each in added] == ["driver", "source", "target", "serial"]
    assert added.find("source").attrib == {"file": "/i/b"}  # type: ignore[union-attr]
    # a place on a controller stays, and the controller comes along, unless it is taken
    assert found["sdb"].find("address").get("unit") == "3"  # type: ignore[union-attr]
    assert found["sdc"].find("address") is None
    controllers = ET.fromstring(xml).findall("./devices/controller[@index='1']")
    assert [(each.get("model"), len(each)) for each in controllers] == [("lsilogic", 0)]


def test_a_definition_that_has_all_stays_as_it_is() -> None:
    assert live_disks.missing(PERSISTENT, ["vda", "sda"]) == ()
    assert live_disks.complete(PERSISTENT, LIVE, ["vda", "sda"]) == (PERSISTENT, ())
    # what neither has is the caller's to refuse
    assert live_disks.complete(PERSISTENT, LIVE, ["vdz"]) == (PERSISTENT, ())
