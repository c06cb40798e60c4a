"""The only importer of libnbd: extents, the copy pipeline, writing restored images."""
