"""The only importer of libvirt."""
