"""nbdbackupctl's parser, turned into a completion function of zsh; see ``gen_completion``."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from nbdbackupd.app.verbs import ALL

if TYPE_CHECKING:
    from scripts.gen_completion import Command, Option

HEAD: Final = """\
#compdef nbdbackupctl
# zsh completion of nbdbackupctl. Made by scripts/gen-completion, not to be edited.

# names of defined domains, without asking a libvirt that may be slow or away
_nbdbackupctl_domains() {
    local -a names
    names=({/etc,${XDG_CONFIG_HOME:-$HOME/.config}}/libvirt/qemu/*.xml(N:t:r))
    _wanted domains expl domain compadd -a names
}

# names of boots that run, or are to be gone on with
_nbdbackupctl_boots() {
    local -a names
    names=(/run/nbdbackup/boot/*.lock(N:t:r))
    _wanted boots expl boot compadd -a names
}

# a set or a domain
_nbdbackupctl_sources() {
    _alternative 'sets:set:_directories' 'domains:domain:_nbdbackupctl_domains'
}
"""

ACTIONS: Final = {
    "directory": "_directories",
    "file": "_files",
    "domain": "_nbdbackupctl_domains",
    "source": "_nbdbackupctl_sources",
    "boot": "_nbdbackupctl_boots",
    "other": " ",
}
"""What completes a value of each kind; nothing does where only its name can be shown."""


def generate(program: "Command", verbs: Mapping[str, "Command"]) -> str:
    """The whole file."""
    # what a verb has, too: all but --version
    shared = [each for each in program.options if "--version" not in each.names]
    alone = [each for each in program.options if each not in shared]
    return "\n".join(
        [
            HEAD,
            "_nbdbackupctl() {",
            "    local curcontext=$curcontext state line ret=1",
            "    local -A opt_args",
            "    local -a verbs shared",
            "    verbs=(",
            *(f"        {shlex.quote(f'{verb}:{ALL[verb][1]}')}" for verb in verbs),
            "    )",
            "    shared=(",
            *(f"        {word}" for word in _options(shared)),
            "    )",
            f"    _arguments -C -s $shared {' '.join(_options(alone))} \\",
            "        ':verb:->verb' '*:: :->words' && ret=0",
            "    case $state in",
            "    verb) _describe -t verbs verb verbs && ret=0 ;;",
            "    words)",
            "        curcontext=${curcontext%:*}-$words[1]:",
            "        case $words[1] in",
            *(line for verb in verbs for line in _verb(verb, verbs[verb], shared)),
            "        esac",
            "        ;;",
            "    esac",
            "    return ret",
            "}",
            "",
            '_nbdbackupctl "$@"',
            "",
        ]
    )


def _verb(verb: str, command: "Command", shared: Sequence["Option"]) -> Iterator[str]:
    own = [each for each in command.options if each not in shared]
    yield f"        {verb})"
    yield "            _arguments -s $shared \\"
    yield from (f"                {word} \\" for word in _options(own))
    for name, kind in zip(command.positionals, command.kinds, strict=True):
        yield f"                {shlex.quote(_value(name, kind))} \\"
    yield "                && ret=0"
    yield "            ;;"


def _options(options: Iterable["Option"]) -> Iterator[str]:
    """What _arguments(zshcompsys) takes for each spelling: (those it excludes)NAME[help]:VALUE."""
    for option in options:
        others = "*" if option.repeated else f"({' '.join(option.names)})"
        told = re.sub(r"([\[\]])", r"\\\1", option.help)
        value = _value(option.metavar, option.kind) if option.metavar else ""
        for name in option.names:
            joint = ("=" if name.startswith("--") else "+") if value else ""
            yield shlex.quote(f"{others}{name}{joint}[{told}]{':' * option.optional}{value}")


def _value(name: str, kind: str) -> str:
    words = kind.removeprefix("words")
    shown = name.replace(":", "\\:")
    return f":{shown}:({words})" if words != kind else f":{shown}:{ACTIONS[kind]}"
