"""The manual page ``nbdbackup.yaml(5)``, made from the schema."""

import re
import textwrap
from typing import Any, Final

from nbdbackupd import __version__
from nbdbackupd.config import sample, schema
from nbdbackupd.config.matching import LABELS_URI, MATCHERS
from nbdbackupd.config.schema import DIRECTORY, DOMAINS, MAIN
from nbdbackupd.config.setting import Setting, groups

DATE: Final = "2026-11-30"

DESCRIPTION: Final = f"""\
These files say what *nbdbackupctl*(1) does where its command line says nothing: where backups go, \
when a new full is made, which disks are saved, and how.

_{DIRECTORY}/{MAIN}_ holds settings for all domains.
Each _{DIRECTORY}/{DOMAINS}/*.yaml_ holds settings for some, chosen by its section *match*.
None of the files need be there: every setting has a default.
Names that begin with a dot are not read.

If several files are for one domain, they apply in the order of their names, and the later one \
wins, setting by setting; the main file comes first.
A list replaces a list.
An option on the command line wins over all files.
*nbdbackupctl config show* _DOMAIN_ prints each setting for a domain, and the file and line that \
it comes from.

If any file has an error, no backup is made by any of them: a slip in a pattern could otherwise \
send a domain's backups to another place.
*nbdbackupctl config check* shows all errors at once.
"""

SYNTAX: Final = """\
The files are YAML in UTF-8, up to 256 KiB.
A value is taken as it stands there: *no*, *0755* and *1:30* are texts where a text is wanted.
Anchors, aliases and merge keys (*<<*) can be used; tags, and two equal keys in a section, are \
errors.
A text that begins with a special character, such as _*_, needs quotes.
"""

KINDS: Final = (
    (
        "size",
        "A number of bytes, or a number with *K*, *M*, *G* or *T*, powers of 1024: "
        "_4096_, _512M_, _1.5G_.",
    ),
    (
        "duration",
        "A number of seconds, or numbers with *s*, *m*, *h*, *d* or *w*: _30s_, _2h_, _1h30m_.",
    ),
    ("days", "A number with *d* (days) or *w* (weeks): _7d_, _4w_."),
    ("yes or no", "*yes*, *on*, *true*, or *no*, *off*, *false*."),
    ("path", "An absolute path."),
    ("file name", "A name without a directory."),
    (
        "calendar event",
        "A time or repetition as in *systemd.time*(7), checked by "
        "*systemd-analyze*(1) if it is there.",
    ),
    (
        "command",
        "A program by its absolute path, and its arguments. It is cut into words as a "
        "shell does it, quotes included, but no shell runs it.",
    ),
    (
        "list",
        "Values in brackets with commas between them, or one on each line after a dash; a "
        "single value may stand alone.",
    ),
)

LABELS: Final = f"""\
Attributes of an element of the namespace _{LABELS_URI}_ are labels of that name.
This command gives a domain the label *tier* with the value _gold_, for now and for later:

    virsh metadata vm1 --live --config --uri {LABELS_URI} \\
        --key nbdbackup --set '<labels tier="gold"/>'

Metadata of other programs can be used, too.
A label is then the namespace in braces, the element and those within it with slashes between \
them, and *@* with an attribute, or nothing for the element's text:

    match:
      metadata:
        tier: gold
        '{{http://openstack.org/xmlns/libvirt/nova/1.1}}instance/flavor@name': 'm1.*'

The metadata of the running domain count, and of its definition those that the running one does \
not have.
libvirt is asked only where a file needs it.
"""

FILES: Final = (
    (f"{DIRECTORY}/{MAIN}", "Settings for all domains."),
    (f"{DIRECTORY}/{DOMAINS}/*.yaml", "Settings for some domains."),
)


def render() -> str:
    """The page, in roff."""
    lines = [
        '.\\" Made by scripts/gen-config from the schema in nbdbackupd/config; do not edit.',
        f'.TH {_plain(MAIN.upper())} 5 "{DATE}" "nbdbackupd {__version__}" "File Formats"',
        ".SH NAME",
        rf"{MAIN} \- configuration of nbdbackupd",
        ".SH SYNOPSIS",
        *(f".I {_plain(path)}\n.br" for path, _ in FILES),
        ".SH DESCRIPTION",
        *_text(f"{schema.USE}\n\n{DESCRIPTION}" if schema.USE else DESCRIPTION),
        ".SH SYNTAX",
        *_text(SYNTAX),
        *_tagged(KINDS),
        ".SH MATCHING",
        *_text(
            "Each file for single domains has a section *match* with at least one of these keys. "
            "All that are given must hold. Each may be a list, of which one member must fit."
        ),
        *_tagged(tuple((f"match.{name}", text) for name, text in MATCHERS.items())),
        ".SS Labels",
        *_text(LABELS),
        ".SH SETTINGS",
        *_text(
            "A setting *a.b* stands as key *b* in section *a*. Behind each stand its kind and its "
            "default."
        ),
        *_settings(),
        ".SH EXAMPLES",
        *_text("A main file:"),
        *_code(MAIN_EXAMPLE),
        *_text(f"A file in {DOMAINS}:"),
        *_code(sample.EXAMPLE_FILE),
        ".SH FILES",
        *_tagged(FILES),
        ".SH SEE ALSO",
        *_text("*nbdbackupctl*(1), *systemd.time*(7), *systemd-analyze*(1), *virsh*(1)"),
    ]
    return "\n".join(lines) + "\n"


MAIN_EXAMPLE: Final = """\
repository:
  path: /backup/vms
  mount_point: /backup
level:
  rotate: weekly
  max_increments: 100
freeze:
  policy: require
"""


def _settings() -> list[str]:
    lines, lone = [], []
    for section, settings in groups(schema.BY_PATH.values()):
        described = [line for setting in settings for line in _setting(setting)]
        if section:
            lines += [f".SS {section}", *_text(schema.SECTIONS[section]), *described]
        else:
            lone += described
    return [*lines, ".SS Without a section", *lone]


def _setting(setting: Setting[Any]) -> list[str]:
    default = _plain(setting.kind.show(setting.default))
    text = setting.help
    if not setting.everywhere:
        text += " In the main file only."
    if setting.option:
        text += f" Command line: *{setting.option.flags[-1]}*."
    kind = _plain(setting.kind.name)
    tag = f'.BR {_plain(setting.path)} " \\fR({kind}; default \\fB{default}\\fR)"'
    return [".TP", tag, *inline(text)]


def _tagged(items: tuple[tuple[str, str], ...]) -> list[str]:
    lines = []
    for tag, text in items:
        lines += [".TP", f".B {_plain(tag)}", *inline(text)]
    return lines


def _text(text: str) -> list[str]:
    """Paragraphs, with an empty line between them; those that are indented are code."""
    lines: list[str] = []
    for part in text.strip("\n").split("\n\n"):
        if part.startswith("    "):
            lines += _code(textwrap.dedent(part))
        else:
            lines += [*([".PP"] if lines else []), *inline(part)]
    return lines


def _code(text: str) -> list[str]:
    shown = [_line(_plain(line)) for line in text.rstrip("\n").split("\n")]
    return [".PP", ".RS 4", ".EX", *shown, ".EE", ".RE", ".PP"]


def inline(text: str) -> list[str]:
    """One line of roff for each sentence; ``*bold*`` and ``_italic_`` in changed fonts."""
    lines = []
    for sentence in re.split(r"(?<=[.;:])\s+(?=[A-Z*_])|\n", text):
        plain = _plain(sentence)
        plain = re.sub(r"(?<![\w/])_(\S(?:.*?\S)?)_(?!\w)", r"\\fI\1\\fR", plain)
        plain = re.sub(r"(?<![\w/])\*(\S|\S.*?\S)\*(?!\w)", r"\\fB\1\\fR", plain)
        lines.append(_line(plain))
    return lines


def _plain(text: str) -> str:
    """A text with what roff would take for its own made harmless."""
    return text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq").replace("'", "\\(aq")


def _line(text: str) -> str:
    return f"\\&{text}" if text.startswith((".", "'")) else text
