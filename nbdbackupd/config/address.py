"""What is wrong with a URI of libvirt beyond its form: it names another host."""

import socket
from typing import Any
from urllib.parse import urlsplit


def fault(uri: str) -> str:
    """Why this URI can't be that of this host's libvirt, or nothing.

    Looks the name up and asks the kernel whether such an address is one of ours. What passes
    may still lead elsewhere (a tunnel); each run has that proven by libvirt itself.
    """
    try:
        host = urlsplit(uri).hostname
    except ValueError as err:
        return f"not a libvirt URI: {uri!r}: {err}"
    if not host:
        return ""
    cure = "run nbdbackupctl on that host, and leave the host out of the URI"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return f"{host} has no address, so it can't be shown to be this host; {cure}"
    if any(_is_ours(family, address) for family, _, _, _, address in found):
        return ""
    return f"{host} is another host, whose guests can't be saved from here; {cure}"


def _is_ours(family: int, address: tuple[Any, ...]) -> bool:
    """Whether the kernel lets us bind to an address, as it does to those of its own."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as tried:
            tried.bind(address)
    except OSError:
        return False
    return True
