"""A throwaway laboratory: real libvirt, real QEMU, real disks, nothing left behind.

The system tests, ``scripts/demo`` and ``scripts/bench`` share it.  It needs root and Debian's
libvirt and QEMU packages, and neither systemd nor KVM nor a running libvirtd.  What only whole
machines show, with a systemd and a network each, containers do: see ``hostlab``.
"""
