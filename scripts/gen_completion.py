"""The body of scripts/gen-completion: nbdbackupctl's parser, read and turned into bash and zsh."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdbackupd.app.ctl import build_parser
from scripts import zsh_completion
from scripts.generated import TOP, main

HEAD = """\
# bash completion of nbdbackupctl. Made by scripts/gen-completion, not to be edited.

# names of defined domains, without asking a libvirt that may be slow or away
_nbdbackupctl_domains() {
    local file name
    for file in /etc/libvirt/qemu/*.xml "${XDG_CONFIG_HOME:-$HOME/.config}"/libvirt/qemu/*.xml; do
        [[ -e $file ]] || continue
        name=${file##*/}
        name=${name%.xml}
        [[ $name == "$1"* ]] && COMPREPLY+=("$(printf %q "$name")")
    done
}

# names of boots that run, or are to be gone on with
_nbdbackupctl_boots() {
    local file name
    for file in /run/nbdbackup/boot/*.lock; do
        [[ -e $file ]] || continue
        name=${file##*/}
        name=${name%.lock}
        [[ $name == "$1"* ]] && COMPREPLY+=("$(printf %q "$name")")
    done
}

# kind of the value: directory, file, domain, source (a set or a domain), boot, or words to choose
# from; $2: what was typed
_nbdbackupctl_value() {
    case $1 in
    directory)
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -d -- "$2")
        ;;
    file)
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$2")
        ;;
    source)
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -d -- "$2")
        _nbdbackupctl_domains "$2"
        ;;
    domain) _nbdbackupctl_domains "$2" ;;
    boot) _nbdbackupctl_boots "$2" ;;
    words*) mapfile -t COMPREPLY < <(compgen -W "${1#words}" -- "$2") ;;
    esac
}
"""

BODY = """\
_nbdbackupctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} previous='' verb='' positional=0 word kind i
    COMPREPLY=()
    ((COMP_CWORD > 0)) && previous=${COMP_WORDS[COMP_CWORD - 1]}
    # readline cuts words at "=" and ":": --level=in comes as three, qemu:///system, too
    if [[ $cur == = ]]; then
        cur=''
    elif [[ $previous == = ]]; then
        previous=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == [=:] ]]; then
            ((i++))
        elif [[ $word == -* ]]; then
            # a value follows, unless it may be left out and is
            kind=$(_nbdbackupctl_kind "$verb" "$word")
            [[ -n $kind && ${COMP_WORDS[i + 1]} != [=-]* ]] && ((i++))
        elif [[ -z $verb ]]; then
            verb=$word
        else
            ((positional++))
        fi
    done
    if [[ $previous == -* && $cur != -* ]]; then
        kind=$(_nbdbackupctl_kind "$verb" "$previous")
        if [[ -n $kind ]]; then
            _nbdbackupctl_value "$kind" "$cur"
            return
        fi
    fi
    if [[ $cur == -* ]]; then
        _nbdbackupctl_value "words$(_nbdbackupctl_options "$verb")" "$cur"
    elif [[ -z $verb ]]; then
        _nbdbackupctl_value "words$(_nbdbackupctl_verbs)" "$cur"
    else
        _nbdbackupctl_value "$(_nbdbackupctl_positional "$verb" "$positional")" "$cur"
    fi
}

complete -F _nbdbackupctl nbdbackupctl
"""

POSITIONALS = {"DOMAIN": "domain", "SOURCE": "source", "SET": "directory"}
BOOTS = ("--stop", "--resume")
PATHS = {"DIR": "directory", "FILE": "file", "FILES": "file"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option of a parser: its spellings, and what its value is.

    ``metavar`` is empty for an option without a value; an ``optional`` value may be left out. A
    ``repeated`` one may be given several times. ``help`` is what the parser says of it.
    """

    names: tuple[str, ...]
    metavar: str = ""
    choices: tuple[str, ...] = ()
    optional: bool = False
    repeated: bool = False
    help: str = ""

    @property
    def kind(self) -> str:
        """What completes its value, in the script's words; empty if it takes none."""
        if not self.metavar:
            return ""
        if self.choices:
            return f"words{' '.join(self.choices)}"
        if set(self.names) & set(BOOTS):
            return "boot"
        return PATHS.get(self.metavar, "other")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """The options and positional arguments of the program itself or of one verb.

    ``kinds`` are what completes each positional argument, in the script's words.
    """

    options: tuple[Option, ...]
    positionals: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


def read_parser() -> tuple[Command, Mapping[str, Command]]:
    """The program's own options, and its verbs in the parser's order."""
    parser = build_parser()
    verbs: dict[str, Command] = {}
    for action in _actions(parser):
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - no public name
            verbs = {name: _command(each) for name, each in action.choices.items()}
    return _command(parser), verbs


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    return parser._actions  # noqa: SLF001 - argparse offers nothing else to look into it


def _command(parser: argparse.ArgumentParser) -> Command:
    actions = list(_actions(parser))
    places = [
        each
        for each in actions
        if not each.option_strings and not isinstance(each, argparse._SubParsersAction)  # noqa: SLF001 - as above
    ]
    return Command(
        options=tuple(_option(each) for each in actions if each.option_strings),
        positionals=tuple(str(each.metavar) for each in places),
        kinds=tuple(map(_kind, places)),
    )


def _kind(place: argparse.Action) -> str:
    if place.choices:
        return f"words{' '.join(map(str, place.choices))}"
    return POSITIONALS.get(str(place.metavar), "other")


def _option(action: Any) -> Option:
    names = tuple(action.option_strings)
    told = str(action.help).replace("%%", "%")
    repeated = isinstance(action, (argparse._AppendAction, argparse._CountAction))  # noqa: SLF001 - as above
    if action.nargs == 0:
        return Option(names=names, repeated=repeated, help=told)
    choices = tuple(str(each) for each in action.choices or ())
    metavar = "|".join(choices) if choices else str(action.metavar)
    return Option(
        names=names,
        metavar=metavar,
        choices=choices,
        optional=action.nargs == "?",
        repeated=repeated,
        help=told,
    )


def generated() -> Mapping[Path, str]:
    """The files and what must stand in each."""
    return {
        TOP / "packaging/completion/nbdbackupctl.bash": generate(),
        TOP / "packaging/completion/_nbdbackupctl": zsh_completion.generate(*read_parser()),
    }


def generate() -> str:
    """The whole script for bash."""
    program, verbs = read_parser()
    commands = {"": program, **verbs}
    return "\n".join(
        [
            HEAD,
            _function("verbs", [f"    echo {shlex.quote(' '.join(verbs))}"]),
            "# $1: the verb, empty before it",
            _function(
                "options", _cases("$1", {v or "''": _spellings(c) for v, c in commands.items()})
            ),
            "# $1: the verb, $2: how many arguments stand before this one",
            _function("positional", _cases("$1:$2", _places(verbs))),
            "# $1: the verb, $2: an option; what its value is, nothing if it takes none",
            _function("kind", _cases("$1:$2", _kinds(commands))),
            BODY,
        ]
    )


def _places(verbs: Mapping[str, Command]) -> dict[str, str]:
    """Patterns for "VERB:PLACE"."""
    return {
        f"{verb}:{place}": kind
        for verb, command in verbs.items()
        for place, kind in enumerate(command.kinds)
        if kind != "other"
    }


def _function(name: str, lines: list[str]) -> str:
    return "\n".join([f"_nbdbackupctl_{name}() {{", *lines, "}", ""])


def _cases(subject: str, table: Mapping[str, str]) -> list[str]:
    """Lines of a ``case``: patterns, already quoted, and what each of them prints."""
    patterns: dict[str, list[str]] = {}
    for pattern, value in table.items():
        patterns.setdefault(value, []).append(pattern)
    lines = [
        line
        for value, each in patterns.items()
        for line in (*_wrapped(" | ".join(each) + ")"), *_wrapped(f"    echo '{value}'"), "    ;;")
    ]
    return [f'    case "{subject}" in', *(f"    {line}" for line in lines), "    esac"]


def _wrapped(text: str) -> list[str]:
    """Cut at spaces; a backslash joins the lines again, within quotes a space is as good."""
    lines = textwrap.wrap(text, 90, break_long_words=False, break_on_hyphens=False)
    end = "" if text.lstrip().startswith("echo") else " \\"
    indent = text[: len(text) - len(text.lstrip())]
    return [
        f"{indent if number else ''}{line}{end if number < len(lines) - 1 else ''}"
        for number, line in enumerate(lines)
    ]


def _spellings(command: Command) -> str:
    return " ".join(name for option in command.options for name in option.names)


def _kinds(commands: Mapping[str, Command]) -> dict[str, str]:
    """Patterns for "VERB:OPTION"; the verb counts only where an option differs between them."""
    kinds: dict[str, dict[str, str]] = {}
    for verb, command in commands.items():
        for option in command.options:
            for name in option.names:
                kinds.setdefault(name, {})[verb] = option.kind
    found: dict[str, str] = {}
    for name, by_verb in kinds.items():
        if len(set(by_verb.values())) == 1:
            found[f"*:{name}"] = next(iter(by_verb.values()))
        else:
            found |= {f"{verb}:{name}": kind for verb, kind in by_verb.items()}
    return {pattern: kind for pattern, kind in found.items() if kind}


if __name__ == "__main__":
    sys.exit(main("gen-completion", generated(), sys.argv[1:]))
