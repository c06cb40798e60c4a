"""What a definition that somebody else wrote may hold: the allow list of elements and attributes.

Made from libvirt's own schema (``domaincommon.rng`` of 9.0 and 11.3). Whatever is not in here is
left out of a definition, also what a newer libvirt knows: a guest that misses a new feature is
told of, a word that names a file of the host is not harmless until somebody has looked at it. A
test feeds every element and attribute of the schemas that are installed.

A line is a path below ``<domain>``, its attributes, and ``#`` for its text. Braces stand for each
of the names in them, ``*`` for any device of the list. A bare word is a number or one of libvirt's
own words. Other values need a reason, which stands behind ``--``, and are marked:

``=``  a name: it has no slash, so that it is no path
``~``  any text: the guest's own, or for people
``?``  decided by ``model.sifting``: a path of what is restored, or one that a system has
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Final

PLAIN: Final = ""
NAME: Final = "="
TEXT: Final = "~"
RULE: Final = "?"

_LIST: Final = """\
. type
{blkiotune,cputune,devices,features,iothreadids,keywrap,memoryBacking,memtune,numatune}
{perf,pm,resource,throttlegroups,vcpus}
clock adjustment basis offset start timezone? -- a zone of the zone table: libvirt gives it to QEMU
    as TZ, which may be the path of any file
cpu check deprecated_features match migratable mode
{currentMemory,memory} # dumpCore unit
defaultiothread thread_pool_max thread_pool_min
{description,title} #~ -- for people
{genid,iothreads,on_crash,on_lockfailure,on_poweroff,on_reboot,uuid} #
launchSecurity authorKey kernelHashes type vcek
maxMemory # slots unit
metadata -- for other programs; neither libvirt nor QEMU reads what is in it
name #= -- chosen by us
os firmware
vcpu # cpuset current placement
blkiotune/weight #
clock/timer frequency mode name present tickpolicy track
clock/timer/catchup limit slew threshold
cpu/cache level mode
cpu/feature name policy
cpu/maxphysaddr bits limit mode
cpu/model fallback #= vendor_id= -- models that QEMU knows
cpu/numa
cpu/numa/cell cpus discard id memAccess memory unit
cpu/numa/cell/cache associativity level policy
cpu/numa/cell/cache/{line,size} unit value
cpu/numa/cell/distances
cpu/numa/cell/distances/sibling id value
cpu/numa/interconnects
cpu/numa/interconnects/{bandwidth,latency} cache initiator target type unit value
cpu/topology clusters cores dies sockets threads
cpu/vendor #= -- as a model
cputune/cachetune vcpus id= -- a label of libvirt's own
cputune/cachetune/cache id level size type unit
cputune/cachetune/monitor level vcpus
cputune/{emulator_period,emulator_quota,global_period,global_quota} #
cputune/{iothread_period,iothread_quota,period,quota,shares} #
cputune/{emulatorpin,iothreadpin,vcpupin} cpuset iothread vcpu
cputune/memorytune vcpus
cputune/memorytune/monitor vcpus
cputune/memorytune/node bandwidth id
devices/*/acpi index
devices/*/address base bus controller cssid devno domain function multifunction port reg slot ssid
    target type unit iobase= irq= -- numbers of the guest's buses
devices/*/address/zpci fid uid
devices/*/alias name
devices/audio driver dspPolicy exclusive id timerPeriod tryMMap type
devices/audio/{input,output} bufferCount bufferLength exactName fixedSettings latency mixingEngine
    tryPoll voices clientName= name= streamName= -- labels of a stream in a sound server
devices/audio/{input,output}/settings channels format frequency
devices/{channel,console,hub,parallel,serial} type
devices/{channel,console,parallel,serial}/source channel= -- a label within SPICE or D-Bus
devices/{channel,console,parallel,serial}/source/clipboard copypaste
devices/{channel,console,parallel,serial}/source/mouse mode
devices/{channel,console,parallel,serial}/target type state port= name= address= -- seen by the
    guest alone
devices/{console,parallel,serial}/target/model name
devices/controller index maxEventChannels maxGrantFrames model ports type vectors
devices/controller/driver ats cmd_per_lun ioeventfd iommu iothread max_sectors packed page_per_vq
    queues
devices/{controller,disk}/driver/iothreads
devices/{controller,disk}/driver/iothreads/iothread id
devices/{controller,disk}/driver/iothreads/iothread/queue id
devices/controller/master startport
devices/controller/model name
devices/controller/pcihole64 # unit
devices/controller/target busNr chassis chassisNr hotplug index memReserve port
devices/controller/target/node #
devices/crypto model type
devices/crypto/backend model queues
devices/{crypto,input,memballoon,rng,sound,vsock}/driver ats iommu packed page_per_vq
devices/disk device model snapshot type
devices/disk/blockio discard_granularity logical_block_size physical_block_size
devices/{disk,interface,redirdev}/boot order loadparm= -- for the guest's firmware
devices/disk/driver ats cache copy_on_read detect_zeroes discard discard_no_unref error_policy
    event_idx io ioeventfd iommu iothread packed page_per_vq queue_size queues rerror_policy type
    name= -- QEMU's own driver
devices/disk/driver/metadata_cache
devices/disk/driver/metadata_cache/max_size # unit
devices/disk/geometry cyls heads secs trans
devices/disk/{iotune,readonly,shareable,throttlefilters}
devices/disk/iotune/group_name #= -- a label within this QEMU
devices/disk/iotune/{read,write,total}_{bytes,iops}_sec{,_max,_max_length} #
devices/disk/iotune/size_iops_sec #
devices/disk/{product,serial,vendor} #~ -- seen by the guest alone
devices/disk/source index startupPolicy protocol file? dev? name= -- an image that was restored, or
    its export
devices/disk/source/host transport socket? -- the server of such an export
devices/disk/target bus dev removable rotation_rate tray
devices/disk/throttlefilters/throttlefilter group= -- a label within this QEMU
devices/disk/transient shareBacking
devices/disk/wwn #
devices/emulator #? -- a QEMU of the system
devices/graphics autoport connected defaultMode fullscreen multiUser p2p passwdValidTo port
    powerControl replaceUser sharePolicy tlsPort type websocket keymap= listen= username= passwd~
    -- where the guest's screen is shown, the secret for it, and a table of keys that QEMU has
devices/graphics/audio id
devices/graphics/channel mode name
devices/graphics/clipboard copypaste
devices/graphics/{filetransfer,gl} enable
devices/graphics/{image,jpeg,playback,zlib} compression
devices/graphics/listen type address= network= -- where the guest's screen is shown
devices/graphics/{mouse,streaming} mode
devices/input bus model type
devices/interface managed type
devices/interface/backend type tap? vhost? -- the devices that libvirt takes by itself
devices/interface/bandwidth classID
devices/interface/bandwidth/{inbound,outbound} average burst floor peak
devices/interface/{coalesce,tune}
devices/interface/coalesce/rx
devices/interface/coalesce/rx/frames max
devices/interface/driver ats event_idx ioeventfd iommu name packed page_per_vq queues rss
    rss_hash_report rx_queue_size tx_queue_size txmode
devices/interface/driver/{guest,host} csum ecn gso mrg_rxbuf tso4 tso6 ufo
devices/interface/filterref filter= -- a filter of the host, which takes rights away
devices/interface/filterref/parameter name= value= -- of such a filter
devices/interface/ip family prefix address= peer= -- addresses within a user mode network
devices/interface/link state
devices/interface/mac address check currentAddress type
devices/interface/model type= -- models that QEMU knows
devices/interface/mtu size
devices/interface/port isolated
devices/interface/rom bar enabled
devices/interface/source connectionid macTableManager missing mode port portid switchid type
    bridge= dev= network= portgroup= -- which network it is in, see restore --network
devices/interface/source/{product,vendor} id
devices/interface/target managed dev= -- the name of what libvirt makes for the card
devices/interface/teaming persistent type
devices/interface/tune/sndbuf #
devices/interface/virtualport type
devices/interface/virtualport/parameters instanceid interfaceid managerid typeid typeidversion
    profileid= -- a profile of the switch
devices/interface/vlan trunk
devices/interface/vlan/tag id nativeMode
devices/{iommu,panic,rng,tpm,vsock} model
devices/iommu/driver aw_bits caching_mode dma_translation eim intremap iotlb
devices/memballoon autodeflate freePageReporting model
devices/memballoon/stats period
devices/memory access discard model
devices/memory/source
devices/memory/source/{alignsize,pagesize} # unit
devices/memory/source/{nodemask,pmem} #
devices/memory/target dynamicMemslots
devices/memory/target/address base
devices/memory/target/{block,current,requested,size} # unit
devices/memory/target/{label,readonly}
devices/memory/target/label/size # unit
devices/memory/target/node #
devices/memory/uuid #
devices/{nvram,redirfilter,video}
devices/redirdev bus type
devices/redirfilter/usbdev allow class product vendor version
devices/rng/backend model type #? -- the kernel's random numbers
devices/rng/rate bytes period
devices/shmem role name? -- has the domain's own name in it
devices/shmem/model type
devices/shmem/msi ioeventfd vectors
devices/shmem/size # unit
devices/smartcard mode type
devices/sound model multichannel streams
devices/sound/audio id
devices/sound/codec type
devices/tpm/backend debug persistent_state type version
devices/tpm/backend/active_pcr_banks
devices/tpm/backend/active_pcr_banks/{sha1,sha256,sha384,sha512}
devices/tpm/backend/encryption secret
devices/tpm/backend/profile removeDisabled name= source= -- profiles that swtpm knows
devices/tpm/backend/source mode type path? -- the state that was restored
devices/video/driver ats iommu name packed page_per_vq vgaconf
devices/video/model blob heads primary ram type vgamem vram vram64
devices/video/model/acceleration accel2d accel3d
devices/video/model/resolution x y
devices/vsock/cid address auto
devices/watchdog action model
features/{acpi,kvm,pae,tcg,viridian,xen}
features/{aia,cfpc,ibs,sbbc} value
features/apic eoi
features/async-teardown enabled
features/{ccf-assist,hap,htm,nested-hv,pmu,ps2,pvspinlock,ras,smm,vmcoreinfo,vmport} state
features/gic version
features/hpt resizing
features/hpt/maxpagesize # unit
features/hyperv mode
features/hyperv/{avic,emsr_bitmap,evmcs,frequencies,ipi,reenlightenment,relaxed,reset} state
features/hyperv/{runtime,stimer,synic,tlbflush,vapic,vpindex,xmm_input} state
features/hyperv/spinlocks retries state
features/hyperv/stimer/direct state
features/hyperv/tlbflush/{direct,extended} state
features/hyperv/vendor_id state value~ -- seen by the guest alone
features/ioapic driver
features/kvm/dirty-ring size state
features/kvm/{hidden,hint-dedicated,poll-control,pv-ipi} state
features/msrs unknown
features/smm/tseg # unit
features/tcg/tb-cache # unit
features/xen/e820_host state
features/xen/passthrough state mode= -- a word of Xen's
iothreadids/iothread id thread_pool_max thread_pool_min
iothreadids/iothread/poll grow max shrink
keywrap/cipher name state
launchSecurity/{cbitpos,handle,policy,reducedPhysBits} #
launchSecurity/{dhCert,guestVisibleWorkarounds,hostData,idAuth,idBlock,session} #~ -- data for
    the guest's processor, in base64
memoryBacking/access mode
memoryBacking/allocation mode threads
memoryBacking/{discard,hugepages,locked,nosharepages}
memoryBacking/hugepages/page nodeset size unit
memoryBacking/source type
memtune/{hard_limit,min_guarantee,soft_limit,swap_hard_limit} # unit
numatune/{memnode,memory} cellid mode nodeset placement
os/bios rebootTimeout useserial
os/boot dev
os/bootmenu enable timeout
os/cmdline #~ -- words for the guest's kernel
os/firmware
os/firmware/feature enabled name
os/{initrd,kernel} #? -- a file that was restored
os/loader format readonly secure stateless type #? -- one that was restored, or the system's
os/nvram format templateFormat type #? template? -- as a loader
os/smbios mode
os/type # arch machine= -- machines that QEMU knows
perf/event enabled name
pm/{suspend-to-disk,suspend-to-mem} enabled
resource/fibrechannel appid= -- a label of its requests
resource/partition #? -- libvirt's own
sysinfo type
sysinfo/{baseBoard,bios,chassis,oemStrings,system}
sysinfo/{baseBoard,bios,chassis,oemStrings,system}/entry name #~ -- seen by the guest alone
sysinfo/entry #~ name~ -- seen by the guest alone
throttlegroups/throttlegroup
throttlegroups/throttlegroup/group_name #= -- a label within this QEMU
throttlegroups/throttlegroup/{read,write,total}_{bytes,iops}_sec{,_max,_max_length} #
throttlegroups/throttlegroup/size_iops_sec #
vcpus/vcpu enabled hotpluggable id order
"""

DEVICE: Final = "*"


def _lines() -> Iterator[str]:
    """The lines of the list, continued ones as one."""
    joined = re.sub(r"\n +", " ", _LIST)
    yield from joined.splitlines()


def _paths(text: str) -> Iterator[str]:
    """``a/{b,c}`` → ``a/b``, ``a/c``."""
    parts = re.split(r"\{([^}]*)\}", text)
    for chosen in itertools.product(*(part.split(",") for part in parts)):
        yield "".join(chosen)


def _read() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    allowed: dict[str, dict[str, str]] = {}
    reasons: dict[str, str] = {}
    for line in _lines():
        words, _, reason = line.partition(" -- ")
        first, *tokens = words.split()
        kinds = {
            token.rstrip(NAME + TEXT + RULE): token[-1] if token[-1] in "=~?" else PLAIN
            for token in tokens
        }
        for path in _paths(first):
            allowed[path.removeprefix(".")] = kinds
            reasons[path.removeprefix(".")] = reason
    return allowed, reasons


_FOUND: Final = _read()
ALLOWED: Final[Mapping[str, Mapping[str, str]]] = _FOUND[0]
REASONS: Final[Mapping[str, str]] = _FOUND[1]


def entry(path: str) -> Mapping[str, str] | None:
    """How the attributes and the text (``#``) of an element may be, or None if it may not be.

    ``path`` is below ``<domain>``, the parts joined by slashes.
    """
    found = ALLOWED.get(path)
    if found is None and path.startswith("devices/"):
        _, device, *rest = path.split("/")
        if rest and f"devices/{device}" in ALLOWED:
            found = ALLOWED.get("/".join(("devices", DEVICE, *rest)))
    return found
