"""Definitions as virt-manager and virt-install make them, and as libvirt tells them of a guest."""

# virt-install --osinfo win11, running, as libvirt 9.0 tells it
WINDOWS = """\
<domain type='kvm' id='3'>
  <name>win</name>
  <uuid>7a1f0b8e-3a7a-4b8e-9d57-0f6f2f1b7c11</uuid>
  <title>A desk / of somebody</title>
  <metadata><libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
    <libosinfo:os id="http://microsoft.com/win/11"/></libosinfo:libosinfo></metadata>
  <memory unit='KiB'>4194304</memory>
  <currentMemory unit='KiB'>4194304</currentMemory>
  <memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages><nosharepages/>
    <source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu placement='static' cpuset='0-3,^2' current='2'>4</vcpu>
  <iothreads>1</iothreads>
  <cputune><shares>2048</shares><vcpupin vcpu='0' cpuset='0'/><emulatorpin cpuset='1'/></cputune>
  <numatune><memory mode='strict' nodeset='0'/></numatune>
  <resource><partition>/machine</partition></resource>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'>/var/lib/libvirt/qemu/nvram/w.fd</nvram>
    <boot dev='hd'/><bootmenu enable='yes'/>
  </os>
  <features><acpi/><apic/>
    <hyperv mode='custom'><relaxed state='on'/><vapic state='on'/>
      <spinlocks state='on' retries='8191'/><vendor_id state='on' value='Nvidia/43FIX'/></hyperv>
    <kvm><hidden state='on'/></kvm><vmport state='off'/><smm state='on'/></features>
  <cpu mode='host-passthrough' check='none' migratable='on'>
    <topology sockets='1' dies='1' cores='4' threads='1'/>
    <feature policy='require' name='topoext'/>
    <numa><cell id='0' cpus='0-3' memory='4194304' unit='KiB' memAccess='shared'/></numa></cpu>
  <clock offset='localtime'><timer name='rtc' tickpolicy='catchup'/>
    <timer name='hpet' present='no'/><timer name='hypervclock' present='yes'/></clock>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <pm><suspend-to-mem enabled='no'/><suspend-to-disk enabled='no'/></pm>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap' iothread='1'/>
      <source file='/var/lib/libvirt/images/win.qcow2' index='2'/><backingStore/>
      <target dev='sda' bus='sata'/><iotune><total_iops_sec>500</total_iops_sec></iotune>
      <serial>A/B 1</serial><boot order='1'/><alias name='sata0-0-0'/>
      <address type='drive' controller='0' bus='0' target='0' unit='0'/></disk>
    <disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
      <source file='/var/lib/libvirt/images/virtio-win.iso' index='1'/><backingStore/>
      <target dev='sdb' bus='sata'/><readonly/><alias name='sata0-0-1'/>
      <address type='drive' controller='0' bus='0' target='0' unit='1'/></disk>
    <controller type='usb' index='0' model='qemu-xhci' ports='15'><alias name='usb'/>
      <address type='pci' domain='0x0000' bus='0x02' slot='0x00' function='0x0'/></controller>
    <controller type='pci' index='1' model='pcie-root-port'><model name='pcie-root-port'/>
      <target chassis='1' port='0x10'/><alias name='pci.1'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x0'
        multifunction='on'/></controller>
    <controller type='virtio-serial' index='0'><alias name='virtio-serial0'/></controller>
    <interface type='network'><mac address='52:54:00:11:22:33'/>
      <source network='default' portid='6d1f6e38-8a54-45c2-9c4f-52b1e7a6a0a1' bridge='virbr0'/>
      <target dev='vnet2'/><model type='e1000e'/><link state='up'/><alias name='net0'/>
      <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></interface>
    <interface type='bridge'><mac address='52:54:00:11:22:34'/><source bridge='br0'/>
      <target dev='win-lan'/><vlan><tag id='42'/></vlan><model type='virtio'/>
      <driver name='vhost' queues='4'/><filterref filter='clean-traffic'/></interface>
    <interface type='direct'><mac address='52:54:00:11:22:35'/>
      <source dev='eno1' mode='bridge'/><target dev='macvtap0'/><model type='virtio'/></interface>
    <serial type='pty'><source path='/dev/pts/3'/><target type='isa-serial' port='0'>
      <model name='isa-serial'/></target><alias name='serial0'/></serial>
    <console type='pty' tty='/dev/pts/3'><source path='/dev/pts/3'/>
      <target type='serial' port='0'/><alias name='serial0'/></console>
    <channel type='unix'><source mode='bind'
        path='/run/libvirt/qemu/channel/3-win/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
      <alias name='channel0'/><address type='virtio-serial' controller='0' bus='0' port='1'/>
    </channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0' state='connected'/>
      <alias name='channel1'/></channel>
    <channel type='spiceport'><source channel='org.spice-space.webdav.0'/>
      <target type='virtio' name='org.spice-space.webdav.0'/></channel>
    <input type='tablet' bus='usb'><alias name='input0'/><address type='usb' bus='0' port='1'/>
    </input><input type='mouse' bus='ps2'/><input type='keyboard' bus='ps2'/>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/><alias name='tpm0'/></tpm>
    <graphics type='spice' port='5900' autoport='yes' listen='127.0.0.1' keymap='de'>
      <listen type='address' address='127.0.0.1'/><image compression='off'/></graphics>
    <graphics type='vnc' port='5901' autoport='yes' passwd='a/b'/>
    <sound model='ich9'><alias name='sound0'/></sound><audio id='1' type='spice'/>
    <video><model type='qxl' ram='65536' vram='65536' vgamem='16384' heads='1' primary='yes'/>
      <alias name='video0'/></video>
    <redirdev bus='usb' type='spicevmc'><alias name='redir0'/><address type='usb' bus='0' port='2'/>
    </redirdev>
    <watchdog model='itco' action='reset'><alias name='watchdog0'/></watchdog>
    <memballoon model='virtio'><stats period='5'/><alias name='balloon0'/></memballoon>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend><alias name='rng0'/></rng>
    <panic model='hyperv'/><vsock model='virtio'><cid auto='yes' address='3'/></vsock>
    <iommu model='intel'><driver intremap='on' eim='on'/></iommu>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'>
    <label>libvirt-7a1f0b8e-3a7a-4b8e-9d57-0f6f2f1b7c11</label>
    <imagelabel>libvirt-7a1f0b8e-3a7a-4b8e-9d57-0f6f2f1b7c11</imagelabel></seclabel>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+64055</label>
    <imagelabel>+64055:+64055</imagelabel></seclabel>
</domain>
"""

# cloud images on arm64, firmware chosen by libvirt, kernel of the point, off
CLOUD = """\
<domain type='qemu'>
  <name>cloud</name>
  <uuid>7a1f0b8e-3a7a-4b8e-9d57-0f6f2f1b7c12</uuid>
  <description>made by a script: see https://example.org/a/b</description>
  <memory unit='MiB'>512</memory><vcpu>2</vcpu>
  <sysinfo type='smbios'><bios><entry name='vendor'>A/B</entry></bios>
    <system><entry name='serial'>ds=nocloud-net;s=http://192.0.2.1/x/</entry></system></sysinfo>
  <os firmware='efi'><type arch='aarch64' machine='virt-7.2'>hvm</type>
    <firmware><feature enabled='no' name='secure-boot'/></firmware>
    <kernel>/boot/vmlinuz</kernel><initrd>/boot/initrd.img</initrd>
    <cmdline>root=/dev/vda1 console=ttyAMA0</cmdline><smbios mode='sysinfo'/></os>
  <features><acpi/><gic version='3'/></features>
  <cpu mode='custom' match='exact'><model fallback='allow'>cortex-a57</model></cpu>
  <clock offset='timezone' timezone='Europe/Berlin'/>
  <devices>
    <emulator>/usr/bin/qemu-system-aarch64</emulator>
    <disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/>
      <source dev='/dev/vg/cloud'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='scsi'/><readonly/></disk>
    <interface type='user'><mac address='52:54:00:11:22:36'/><model type='virtio'/></interface>
    <interface type='ethernet'><mac address='52:54:00:11:22:37'/><model type='virtio'/></interface>
    <console type='pty'><target type='virtio' port='0'/></console>
    <rng model='virtio'><backend model='builtin'/></rng>
  </devices>
</domain>
"""
