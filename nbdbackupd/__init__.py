"""nbdbackupd: full and incremental backup of libvirt/QEMU domains, and their restore."""

__version__ = "0.2.0"
