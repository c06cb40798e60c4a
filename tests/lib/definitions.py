"""A definition that holds all that two domains must not share, and what becomes of it."""

from nbdbackupd.model.definition import Changes, NewDisk

# whatever is PROD here must not be in a clone's definition
PRODUCTION = """\
<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>PROD</name>
  <uuid>0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff</uuid>
  <genid>0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0aa</genid>
  <metadata><lib:libosinfo xmlns:lib='http://libosinfo.org/xmlns/libvirt/domain/1.0'>
    <lib:os id='http://debian.org/debian/12'/></lib:libosinfo></metadata>
  <maxMemory slots='4' unit='MiB'>1024</maxMemory>
  <memory unit='MiB'>96</memory>
  <cpu><numa><cell id='0' cpus='0' memory='64' unit='MiB'/></numa></cpu>
  <sysinfo type='smbios'><system>
    <entry name='uuid'>0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff</entry></system></sysinfo>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <firmware><feature enabled='no' name='secure-boot'/></firmware>
    <loader readonly='yes' type='pflash'>/PROD/code.fd</loader>
    <nvram template='/usr/share/OVMF/vars.fd'>/PROD/vars.fd</nvram>
    <kernel>/PROD/kernel</kernel>
    <initrd>/PROD/initrd</initrd>
    <smbios mode='sysinfo'/>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'>
        <metadata_cache><max_size unit='KiB'>64</max_size></metadata_cache></driver>
      <source file='/PROD/a.qcow2' index='2'>
        <seclabel model='dac' relabel='no'/>
        <encryption format='luks'><secret type='passphrase' usage='PROD'/></encryption></source>
      <backingStore type='file'><format type='qcow2'/><source file='/PROD/base.qcow2'/>
        <backingStore/></backingStore>
      <mirror type='file' job='copy'><format type='raw'/><source file='/PROD/mirror'/></mirror>
      <target dev='vda' bus='virtio'/><serial>same</serial><alias name='virtio-disk0'/>
    </disk>
    <disk type='volume' device='disk'><driver name='qemu' type='raw'/>
      <source pool='PROD' volume='PRODb'/><target dev='vdb' bus='virtio'/></disk>
    <disk type='block' device='lun' sgio='filtered'><driver name='qemu' type='raw'/>
      <source dev='/dev/PROD/lun'/><target dev='sda' bus='scsi'/></disk>
    <disk type='network' device='disk'><driver name='qemu' type='raw'/>
      <auth username='PROD'><secret type='ceph' usage='PROD'/></auth>
      <source protocol='rbd' name='pool/PROD'><host name='PROD.example'/></source>
      <target dev='vdc' bus='virtio'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/>
      <source file='/PROD/excluded'/><target dev='vdd' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
      <source file='/PROD/medium.iso'/><target dev='hdc' bus='sata'/><readonly/></disk>
    <disk type='file' device='floppy'><driver name='qemu' type='raw'/>
      <target dev='fda' bus='fdc'/></disk>
    <filesystem type='mount'><source dir='/PROD/share'/><target dir='share'/></filesystem>
    <filesystem type='mount'><source dir='/usr/share'/><target dir='ro'/><readonly/></filesystem>
    <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/>
      <virtualport type='openvswitch'>
        <parameters interfaceid='0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0bb'/></virtualport>
      <target dev='tapPROD'/><model type='virtio'/></interface>
    <interface type='network'><mac address='52:54:00:00:00:02'/>
      <source network='default' portid='0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0cc' bridge='virbr0'/>
      <target dev='vnet3'/><filterref filter='clean-traffic'>
        <parameter name='IP' value='192.0.2.1'/></filterref></interface>
    <interface type='hostdev' managed='yes'><mac address='52:54:00:00:00:03'/>
      <source><address type='pci' domain='0' bus='3' slot='2' function='0'/></source></interface>
    <serial type='file'><source path='/PROD/console'/><target type='isa-serial' port='0'/></serial>
    <serial type='tcp'><source mode='bind' host='127.0.0.1' service='44321'/>
      <protocol type='telnet'/><target type='isa-serial' port='1'/></serial>
    <console type='pty' tty='/dev/pts/7'><source path='/dev/pts/7'/>
      <log file='/PROD/console.log'/><target type='virtio' port='1'/></console>
    <channel type='unix'><source mode='bind' path='/PROD/agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    <channel type='unix'><source mode='connect' path='/PROD/other'/>
      <target type='virtio' name='some.0'/></channel>
    <channel type='unix'><source mode='bind' path='/PROD/bound'/>
      <target type='virtio' name='more.0'/></channel>
    <channel type='tcp'><source mode='bind' host='127.0.0.1' service='44322'/>
      <protocol type='raw'/><target type='guestfwd' address='10.0.2.1' port='4600'/></channel>
    <input type='evdev'><source dev='/dev/input/PROD'/></input>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <graphics type='vnc' port='44323' autoport='no' websocket='44324' listen='127.0.0.1'>
      <listen type='address' address='127.0.0.1'/></graphics>
    <graphics type='spice' autoport='no'><listen type='socket' socket='/PROD/spice'/></graphics>
    <audio id='1' type='file' path='/PROD/sound'/>
    <hostdev mode='subsystem' type='pci' managed='yes'><source>
      <address domain='0' bus='4' slot='0' function='0'/></source></hostdev>
    <redirdev bus='usb' type='tcp'><source mode='connect' host='PROD' service='4000'/></redirdev>
    <smartcard mode='host'/>
    <rng model='virtio'><backend model='egd' type='unix'>
      <source mode='connect' path='/PROD/egd'/></backend></rng>
    <memory model='nvdimm'><source><path>/PROD/nvdimm</path></source>
      <target><size unit='MiB'>32</size><node>0</node></target></memory>
    <shmem name='shared'><model type='ivshmem-plain'/><size unit='M'>1</size></shmem>
    <shmem name='server'><model type='ivshmem-doorbell'/><server path='/PROD/shm'/></shmem>
    <vsock model='virtio'><cid auto='no' address='44'/></vsock>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+0:+0</label></seclabel>
  <seclabel type='dynamic' model='apparmor' relabel='yes'><baselabel>base</baselabel>
    <label>libvirt-PROD</label><imagelabel>libvirt-PROD</imagelabel></seclabel>
  <seclabel type='static' model='selinux' relabel='yes'>
    <label>system_u:system_r:svirt_t:s0:c1,c2</label></seclabel>
  <qemu:commandline><qemu:arg value='-drive'/><qemu:arg value='file=/PROD/own'/>
    <qemu:env name='HOME' value='/'/></qemu:commandline>
</domain>
"""
DISKS = {
    "vda": NewDisk(path="/new/a.qcow2", format="qcow2"),
    "vdb": NewDisk(path="/new/b <&'\"> .raw", format="raw"),
    "sda": NewDisk(path="/dev/new/lv", format="raw", type="block"),
    "vdc": NewDisk(format="raw", type="network", socket="/new/nbd", export="vdc"),
}
CLONE = Changes(
    name="clone", disks=DISKS, nvram="/new/vars.fd", loader="/new/code.fd", own_loader=True,
    kernel="/new/kernel", initrd="/new/initrd",
)  # fmt: skip
