"""The version of libnbd."""

import nbd


def version() -> str:
    """The library's version, such as ``1.14.2``."""
    return nbd.NBD().get_version()
