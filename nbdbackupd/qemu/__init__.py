"""Typed calls of QEMU's own tools."""
