"""A restore point as a running domain."""
