"""nbdbackupd: full and incremental backup of libvirt/QEMU domains, and their restore."""

__version__ = "0.1.0"
