"""JSON and XML that others wrote, read within bounds: the one owner of both parsers.

A set, a peer, a guest's QEMU or a file of an unprivileged account may hold a document that is
small and costs gigabytes once it is parsed. What it can cost is looked at before: its size, the
number of its values or elements, and how deep it is. Entities and document types are refused, for
libvirt writes none and they can grow without end.
"""

import json
import math
import re
from typing import Any, Final
from xml.etree import ElementTree as ET

from nbdbackupd.errors import NbdbackupError

MAX_VALUES: Final = 1 << 18
"""How many values a JSON document may hold; the largest that we write hold some thousands."""

MAX_XML: Final = 4 << 20
"""Bytes of an XML: libvirt's limit for a text in its protocol (REMOTE_STRING_MAX)."""

MAX_ELEMENTS: Final = 100_000
MAX_DEPTH: Final = 256
"""libxml2's own limit (xmlParserMaxDepth), with which libvirt reads; a backing chain nests."""

MAX_PREFIXES: Final = 64
_RESERVED: Final = re.compile(r"ns\d+", re.ASCII)


def parse_json(
    data: str | bytes,
    *,
    values: int = MAX_VALUES,
) -> Any:
    """The document; the caller has bounded its size.

    ``values`` is how many it may hold; no number is infinite, or none. Raises ValueError, and no
    other, with a short line that says what is wrong.
    """
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    # each value but the first is behind one of these; in texts they count as well
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > values:
        raise ValueError(f"it holds more than {values} values")
    try:
        return _DECODER.decode(raw.decode(json.detect_encoding(raw), "surrogatepass"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _finite(text: str) -> float:
    """Of a number with a point or an exponent, and of ``NaN`` and ``Infinity``, which are none."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no JSON number")
    return number


_DECODER: Final = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
"""One for all: to make one takes longer than a small document."""


def parse_xml(
    text: str, root: str, error: type[NbdbackupError], *, prefixes: bool = False
) -> ET.Element:
    """The root element, whose name must be ``root`` unless that is empty.

    With ``prefixes`` those of its name spaces are kept when it is written again. Raises ``error``
    with one line if it is no XML, another, or beyond the bounds.
    """
    what = f"{root} XML" if root else "XML"
    try:
        found = _bounded(text, prefixes=prefixes)
    except (ET.ParseError, ValueError) as err:
        raise error(f"{what} can't be parsed: {err}") from err
    if root and found.tag != root:
        raise error(f"not a {what}: its root element is <{found.tag[:80]}>")
    return found


def _bounded(text: str, *, prefixes: bool) -> ET.Element:
    # a byte or more for each character; the exact number is not worth a copy
    if len(text) > MAX_XML:
        raise ValueError(f"it is longer than {MAX_XML >> 20} MiB")
    if text.count("<") > 2 * MAX_ELEMENTS:
        raise ValueError(f"it has more than {MAX_ELEMENTS} elements")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it has a document type")
    parser: Any = ET.XMLPullParser(["start", "end", "start-ns"])
    parser.feed(text)
    parser.close()
    root: ET.Element | None = None
    depth = 0
    spaces: dict[str, str] = {}
    for event, item in parser.read_events():
        if event == "start-ns":
            spaces[item[0]] = item[1]
            if len(spaces) > MAX_PREFIXES:
                raise ValueError(f"it has more than {MAX_PREFIXES} name spaces")
            continue
        depth += 1 if event == "start" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"its elements are nested more than {MAX_DEPTH} deep")
        root = item if root is None else root
    if root is None:
        raise ValueError("it has no element")
    for prefix, uri in spaces.items() if prefixes else ():
        if prefix and not _RESERVED.fullmatch(prefix):
            ET.register_namespace(prefix, uri)
    return root
