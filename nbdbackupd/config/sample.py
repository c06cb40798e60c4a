"""The commented sample: every setting with its default, made from the schema."""

import textwrap
from typing import Any, Final

from nbdbackupd.config import schema
from nbdbackupd.config.kinds import spoken
from nbdbackupd.config.matching import MATCHERS
from nbdbackupd.config.schema import SECTIONS
from nbdbackupd.config.setting import Setting, groups

WIDTH: Final = 88
TITLE: Final = f"Configuration of nbdbackupd: {schema.DIRECTORY}/{schema.MAIN}"
HEAD: Final = f"""\
Every setting stands here with its default. To change one, remove the # before its name; \
the line of its section needs no change. The manual page nbdbackup.yaml(5) tells more.

The files in {schema.DIRECTORY}/{schema.DOMAINS} hold settings for some domains; there is an \
example at the end. Check all of them with:

  nbdbackupctl config check
  nbdbackupctl config show DOMAIN

Sizes: 4096, 512M, 1.5G (powers of 1024). Durations: 30s, 10m, 2h, 7d. A list: [vda, vdb], \
or one value.\
"""
EXAMPLE: Final = f"""\
An example of a file in {schema.DOMAINS}, say web.yaml, for all domains whose names begin with \
"web-". A file may match by several of these; then all of them must hold:
"""


def render() -> str:
    """The file."""
    use = [*_comment(schema.USE), "#"] if schema.USE else []
    lines = [*_comment(TITLE), "#", *use, *_comment(HEAD), ""]
    for section, settings in groups(schema.BY_PATH.values()):
        if section:
            lines += [*_comment(SECTIONS[section]), f"{section}:"]
        for setting in settings:
            lines += [*_setting(setting, "  " if section else ""), ""]
        if section:
            del lines[-1]
        lines += [""] if section else []
    lines += [*_comment(EXAMPLE), "#"]
    for name, text in MATCHERS.items():
        first, *rest = textwrap.wrap(text, WIDTH - 13)
        lines.append(f"#   {name + ':':<9} {first}")
        lines += [f"#   {'':<9} {each}" for each in rest]
    lines += ["#", *(f"#   {line}".rstrip() for line in EXAMPLE_FILE.splitlines())]
    return "\n".join(lines) + "\n"


EXAMPLE_FILE: Final = """\
match:
  glob: 'web-*'
repository:
  path: /backup/web
schedule:
  calendar: ['Mon..Fri 22:30', 'Sat 06:00']
compression: lz4
"""


def _setting(setting: Setting[Any], indent: str) -> list[str]:
    lines = _comment(setting.help, indent)
    if setting.kind.words:
        lines += _comment(f"Values: {spoken(setting.kind.words)}", indent)
    if not setting.everywhere:
        lines += _comment("In this file only, not for single domains.", indent)
    if setting.single:
        lines += _comment("Only in a file whose match is the name of one machine.", indent)
    if setting.example:
        lines += _comment(f"Example: {setting.key}: {setting.example}", indent)
    return [*lines, f"{indent}#{setting.key}: {setting.kind.show(setting.default)}"]


def _comment(text: str, indent: str = "") -> list[str]:
    """Paragraphs as comments; indented lines stay as they are."""
    lines: list[str] = []
    for line in text.strip("\n").split("\n"):
        if line.startswith(" ") or not line:
            lines.append(line)
        else:
            lines += textwrap.wrap(
                line, WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False
            )
    return [f"{indent}# {line}".rstrip() for line in lines]
