"""Disks of a restore point served over NBD."""
