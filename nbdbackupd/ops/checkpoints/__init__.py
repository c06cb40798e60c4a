"""Checkpoints and bitmaps: making libvirt and the images agree with what is committed."""
