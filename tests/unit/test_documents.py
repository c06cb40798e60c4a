"""What a document may cost is bounded before it is parsed (S-6)."""

import json
import resource
import time
from xml.etree import ElementTree as ET

import pytest

from nbdbackupd import documents
from nbdbackupd.errors import FormatError, NbdbackupError
from nbdbackupd.format import manifest, sizes, stream
from nbdbackupd.model import bootxml, definition, hostpaths, jobxml
from nbdbackupd.model.domain import parse_domain
from nbdbackupd.qemu import image
from nbdbackupd.repo.draft import Intent
from nbdbackupd.repo.state import Record
from nbdbackupd.repo.virtnbdbackup import peer

MANY = documents.MAX_VALUES + 1
JSON = {
    "values": b"[" + b"1," * MANY + b"1]",
    "lists": b"[" + b"[]," * MANY + b"1]",
    "texts": json.dumps({"a": ["," * MANY]}).encode(),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a long number": b"1" * 100_000,
    "nothing": b"",
    "no text": b"\xff\xfe\xfd",
}
XML = {
    "deep": "<domain>" + "<a>" * 3000 + "</a>" * 3000 + "</domain>",
    "deep, no end": "<domain>" * 200_000,
    "wide": "<domain>" + "<a/>" * 400_000 + "</domain>",
    "20 MiB": "<domain>" + "<a/>" * (5 << 20) + "</domain>",
    "long": "<domain>" + "a" * documents.MAX_XML + "</domain>",
    "entities": "<!DOCTYPE a [<!ENTITY b 'c'>]><domain>&b;</domain>",
    "a thousand name spaces": "<domain>" + "".join(
        f"<p{n}:a xmlns:p{n}='u{n}'/>" for n in range(1000)
    ) + "</domain>",
    "another": "<pool/>",
    "no end": "<domain><devices>",
    "nothing": "",
    "control characters": "<domain><name>a\x1b[2J</name></domain>",
    "a surrogate": "<domain><name>\udcff</name></domain>",
}  # fmt: skip
READERS = {
    "manifest": manifest.parse,
    "meta frame": stream.parse_meta,
    "list of checkpoints": peer.parse_checkpoints,
    "qemu-img": image.parse_chain,
    "intent": Intent.parse,
    "record": Record.parse,
    "sizes": lambda data: sizes.parse(lambda at, n: data[at : at + n], 0, len(data), 1 << 40),
}
XML_READERS = {
    "domain": parse_domain,
    "peer's domain": lambda text: peer.parse_config(text.encode(errors="surrogateescape")),
    "definition": definition.parse,
    "paths": hostpaths.of_xml,
    "boot": bootxml.live_disks,
    "checkpoint": jobxml.checkpoint_name,
}


def cost(call: object, data: object) -> tuple[NbdbackupError | None, float]:
    """How a reader ended, and its seconds of processor time."""
    begun = time.process_time()
    found = None
    try:
        call(data)  # type: ignore[operator]
    except NbdbackupError as err:
        found = err
    return found, time.process_time() - begun


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize("reader", READERS)
def test_json_of_a_stranger(reader: str, kind: str) -> None:
    found, seconds = cost(READERS[reader], JSON[kind])
    if (reader, kind) == ("sizes", "values"):
        # just what that list is made for: eight bytes each, its length bounded by the file's
        assert found is None
        return
    assert isinstance(found, FormatError)
    assert found.exit_code == 40
    assert "\n" not in str(found)
    assert len(str(found)) < 400
    assert seconds < 2


@pytest.mark.parametrize("kind", XML)
@pytest.mark.parametrize("reader", XML_READERS)
def test_xml_of_a_stranger(reader: str, kind: str) -> None:
    if (reader, kind) == ("paths", "another"):
        return  # it takes what names paths, whatever it is
    found, seconds = cost(XML_READERS[reader], XML[kind])
    assert found is not None
    assert "\n" not in str(found)
    assert len(str(found)) < 400
    assert seconds < 2


def test_the_memory_is_bounded() -> None:
    """A manifest of eight million numbers took 753 MiB, 20 MiB of elements 652 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (b"[" + b"1," * (8 << 20) + b"1]", b'{"version":' + b"[0]," * (3 << 20)):
        with pytest.raises(FormatError):
            manifest.parse(data)
    with pytest.raises(FormatError):
        documents.parse_xml("<a/>" * (5 << 20), "", FormatError)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < 150, f"{grown} MiB"


def test_what_libvirt_writes_is_read() -> None:
    """A chain of 200 images nests; a host of 2,000 disks is wide."""
    layer = "<backingStore>" * 200 + "</backingStore>" * 200
    root = documents.parse_xml(f"<domain><disk>{layer}</disk></domain>", "domain", FormatError)
    assert len(list(root.iter("backingStore"))) == 200
    disks = "<disk><target dev='a'/><source file='b'/><driver/><alias/></disk>" * 2000
    root = documents.parse_xml(f"<domain>{disks}</domain>", "domain", FormatError)
    assert len(root) == 2000
    text = "<domain xmlns:qemu='http://libvirt.org/q'><qemu:a/></domain>"
    root = documents.parse_xml(text, "domain", FormatError, prefixes=True)
    assert "<qemu:a />" in ET.tostring(root, encoding="unicode")
