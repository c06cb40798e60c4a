"""Which domains a file of ``domains.d`` is for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final
from xml.etree import ElementTree as ET

from nbdbackupd import documents
from nbdbackupd.errors import DomainError
from nbdbackupd.model.domain import is_uuid

METADATA: Final = "metadata"
LABELS_URI: Final = "urn:nbdbackup:1"
MATCHERS: Final[Mapping[str, str]] = {
    "name": "The domain's name or UUID, letter for letter.",
    "glob": "A pattern for the whole name: * for any text, ? for one character, [ab] for one "
    "of these.",
    "regex": "A regular expression, in Python's syntax, for the whole name.",
    METADATA: "Labels in the domain's XML, each with a pattern as for glob.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """All conditions that are given must hold; of several values of one, any will do.

    ``metadata`` maps labels to patterns; all of them must be there and fit.
    """

    names: tuple[str, ...] = ()
    globs: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
    metadata: Mapping[str, tuple[str, ...]]

    def fits_name(self, name: str, uuid: str) -> bool:
        """Whether the conditions but for the metadata hold."""
        is_named = not self.names or name in self.names
        if not is_named and uuid.lower() not in (each.lower() for each in self.names):
            return False
        if self.globs and not any(fnmatchcase(name, each) for each in self.globs):
            return False
        return not self.regexes or any(re.fullmatch(each, name) for each in self.regexes)

    def fits(self, name: str, uuid: str, labels: Mapping[str, str]) -> bool:
        """Whether all conditions hold for a domain."""
        return self.fits_name(name, uuid) and all(
            label in labels and any(fnmatchcase(labels[label], each) for each in patterns)
            for label, patterns in self.metadata.items()
        )

    @property
    def sole_name(self) -> str:
        """The name of the one domain that it can be for; empty if there may be others."""
        is_sole = len(self.names) == 1 and not (self.globs or self.regexes or self.metadata)
        return self.names[0] if is_sole and not self.names_uuid else ""

    @property
    def names_uuid(self) -> bool:
        """Whether one of the names has the form of a UUID."""
        return any(is_uuid(each) for each in self.names)


def labels_of(xml: str) -> dict[str, str]:
    """The labels in the ``<metadata>`` of a domain XML.

    Attributes of our own element (``urn:nbdbackup:1``) count by their plain names. Those of
    others count as ``{URI}element/child@attribute``, and the text of an element as
    ``{URI}element/child``; the children need no URI if it is the same.

    Raises DomainError if the text is no XML.
    """
    root = documents.parse_xml(xml, "domain", DomainError)
    found: dict[str, str] = {}
    for element in root.findall("./metadata/*"):
        if element.tag.startswith(f"{{{LABELS_URI}}}"):
            found |= {str(name): value for name, value in element.attrib.items()}
        else:
            _collect(element, element.tag, found)
    return found


def _collect(element: ET.Element, path: str, found: dict[str, str]) -> None:
    home = path.partition("}")[0] + "}"
    text = (element.text or "").strip()
    if text:
        found.setdefault(path, text)
    for name, value in element.attrib.items():
        found.setdefault(f"{path}@{name.removeprefix(home)}", value)
    for child in element:
        _collect(child, f"{path}/{child.tag.removeprefix(home)}", found)
