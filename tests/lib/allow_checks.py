"""What must hold of every place of a schema of libvirt's, whichever release it is of."""

from collections.abc import Iterable
from typing import Final

import pytest

from nbdbackupd.errors import DomainError, UsageError
from nbdbackupd.model import allowed, definition
from nbdbackupd.model.allowed import NAME, RULE, TEXT
from nbdbackupd.model.definition import Changes, NewDisk
from tests.lib import schema
from tests.lib.schema import Place

PATH: Final = "/canary/path"
WORD: Final = "canary"
DISK: Final = {"vda": NewDisk(path="/new/a.qcow2", format="qcow2")}
# elements of plain words and numbers that are refused nevertheless, whole: as libvirt's page says,
# they are of the host, or of other hypervisors
REFUSED: Final = (
    "backingStore", "mirror", "blkiotune/device", "devices/filesystem", "devices/hostdev",
    "devices/lease", "devices/pstore", "devices/interface/portForward", "devices/interface/guest",
    "features/capabilities", "features/privnet", "idmap", "os/init", "os/acpi", "privateData",
    "reconnect", "seclabel", "{", "devices/interface/source/address", "devices/interface/source/ip",
    "devices/interface/source/route", "devices/interface/source/local", "devices/disk/source",
    "os/nvram/source", "devices/disk/auth", "devices/disk/encryption", "/protocol", "/log",
    "devices/input/source", "devices/interface/route", "devices/smartcard/target",
    "devices/rng/backend/", "devices/redirdev/source", "devices/smartcard/source",
    "cputune/emulatorsched", "cputune/iothreadsched", "cputune/vcpusched",
)  # fmt: skip
REFUSED_HERE: Final = frozenset(
    {
        "domain id",
        "domain/devices/interface trustGuestRxFilters",
        "domain/devices/disk rawio",
        "domain/devices/disk sgio",
    }
    | {
        f"domain/devices/{device}/source {name}"
        for device in ("serial", "console", "parallel", "channel")
        for name in ("append", "tls")
    }
)


def _kind(place: Place) -> str | None:
    """How the list has a place, or None."""
    path = "/".join(place.path[1:])
    if path.startswith("metadata/"):
        return TEXT
    return (allowed.entry(path) or {}).get(place.name)


def _reason(place: Place) -> str:
    path = "/".join(place.path[1:])
    device = "/".join(("devices", "*", *place.path[3:]))
    if path.startswith("metadata/"):
        path = "metadata"
    return allowed.REASONS.get(path) or allowed.REASONS.get(device, "")


def _results(place: Place, value: str) -> Iterable[str]:
    for xml in schema.instances(place, value):
        disks = DISK if '"vda"' in xml else {}
        changes = Changes(name="clone", disks=disks)
        try:
            yield definition.adapt(xml, changes, bytes).xml
        except DomainError:
            # refused as a whole: a domain of another type
            continue


def no_path_gets_through(places: Iterable[Place]) -> None:
    """A path at any place is not in the result, but where the list has any text, with a reason."""
    seen = 0
    for place in places:
        for xml in _results(place, PATH):
            seen += 1
            if PATH in xml:
                assert _kind(place) == TEXT, f"{place}: {xml}"
                assert _reason(place), place
    assert seen > 1000


def every_name_has_a_reason(places: Iterable[Place]) -> None:
    """What is no number and none of libvirt's own words gets through only with a reason."""
    through = 0
    for place in places:
        if place.free and any(WORD in xml for xml in _results(place, WORD)):
            through += 1
            assert _kind(place) in (NAME, TEXT, RULE), place
            assert _reason(place), place
    assert through > 50


def what_is_kept_is_told(places: Iterable[Place]) -> None:
    """The same machine keeps nothing that somebody was not asked about."""
    for place in places:
        for xml in schema.instances(place, PATH):
            disks = DISK if '"vda"' in xml else {}
            same = Changes(name="clone", disks=disks, keep_identity=True)
            told: list[str] = []
            try:
                found = definition.adapt(xml, same, bytes, told.extend).xml
            except DomainError:
                continue
            if PATH in found and _kind(place) != TEXT:
                assert any(PATH in line for line in told), f"{place}: {told}"
                with pytest.raises(UsageError, match="--trust-definition"):
                    definition.adapt(xml, same, bytes)


def plain_words_get_through(places: Iterable[Place]) -> None:
    """What holds but numbers and words of libvirt's is there, unless it is refused by name."""
    missing = [
        str(place)
        for place in places
        if not place.free
        and _kind(place) is None
        and str(place) not in REFUSED_HERE
        and not any(each in "/".join(place.path) + "/" for each in REFUSED)
    ]
    assert missing == []


def nothing_is_made_up(places: Iterable[Place]) -> None:
    """What the list has is in a schema: a word that was misspelt allows nothing."""
    known = {("/".join(place.path[1:]), place.name) for place in places}
    known |= {
        ("/".join(("devices", "*", *path.split("/")[2:])), name)
        for path, name in known
        if path.startswith("devices/")
    }
    for path, kinds in allowed.ALLOWED.items():
        # a line for several elements has what any of them has
        shared = [each for each, other in allowed.ALLOWED.items() if other is kinds]
        for name in kinds:
            assert any((each, name) in known for each in shared), f"{path} {name}"


OF_A_RELEASE: Final = (
    no_path_gets_through,
    every_name_has_a_reason,
    what_is_kept_is_told,
    plain_words_get_through,
)
