"""zsh completes verbs, options, their values, and names of domains: asked of zsh's own editor."""

import re
import subprocess
from pathlib import Path

import pytest

from scripts import gen_completion
from tests.lib.pages import TOP

pytestmark = pytest.mark.component

SETUP = r"""
fpath=("$COMPLETIONS" $fpath)
autoload -Uz compinit && compinit -u -D
zle -C answer complete-word _main_complete
# what would be shown goes to a file; asked only, as _describe does, it goes where that wants it
compadd() {
    if [[ " ${@[1,(i)(-|--)]}" != *' -'[OAD]* ]]; then
        local -a found
        builtin compadd -O found "$@"
        (( $#found )) && print -rl -- $found >> "$ANSWERS"
    fi
    builtin compadd "$@"
}
zle-line-init() {
    local line
    for line in ${(f)LINES_TYPED}; do
        BUFFER=$line CURSOR=$#line
        zle answer
        print -r -- ---- >> "$ANSWERS"
    done
    exit
}
zle -N zle-line-init
"""


def complete(tmp_path: Path, *lines: str) -> list[set[str]]:
    """What zsh offers at the end of each line; runs in ``tmp_path``."""
    home, answers = tmp_path / "home", tmp_path / "home/answers"
    (home / ".zshrc").write_text(SETUP)
    subprocess.run(
        ["script", "-qec", "exec zsh -i -o no_global_rcs", "/dev/null"],
        cwd=tmp_path,
        env={
            "HOME": str(home), "PATH": "/usr/bin:/bin", "TERM": "xterm", "SHELL": "/bin/sh",
            "COMPLETIONS": str(TOP / "packaging/completion"), "ANSWERS": str(answers),
            "LINES_TYPED": "\n".join(f"nbdbackupctl {line}" for line in lines),
        },
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False, timeout=60,
    )  # fmt: skip
    told = answers.read_text().split("----\n")
    assert told.pop() == ""
    return [set(each.splitlines()) for each in told]


def test_completion_offers_what_fits(tmp_path: Path) -> None:
    (tmp_path / "a set").mkdir()
    (tmp_path / "a file").write_text("")
    domains = tmp_path / "home/.config/libvirt/qemu"
    domains.mkdir(parents=True)
    (domains / "vm-of-test.xml").write_text("<domain/>")
    cases = {
        "": set(gen_completion.read_parser()[1]),
        "re": {"remove", "report", "restore"},
        "-c qemu:///system res": {"restore"},
        "--progress p": {"plain"},
        "backup -l ": {"auto", "full", "inc", "diff", "copy"},
        "backup --level=i": {"inc"},
        "backup --freeze-": {"--freeze-mountpoint"},
        "backup vm-of": {"vm-of-test"},
        "backup vm-of-test vm": set(),
        "backup -o a": {r"a\ set"},
        "restore a": {r"a\ set"},
        "restore vm-of": {"vm-of-test"},
        "restore --sequence a": {r"a\ set", r"a\ file"},
        "config s": {"show", "sample"},
        "config show vm-of": {"vm-of-test"},
        "files 'a set' c": {"cp"},
        "boot --stop no-such": set(),
    }
    found = complete(tmp_path, *cases)
    assert dict(zip(cases, found, strict=True)) == cases


def test_every_option_is_offered(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    program, verbs = gen_completion.read_parser()
    found = complete(tmp_path, "--", *(f"{verb} --" for verb in verbs))
    for command, offered in zip((program, *verbs.values()), found, strict=True):
        names = {name for option in command.options for name in option.names}
        assert {re.sub("=.*", "", each) for each in offered} == {
            name for name in names if name.startswith("--")
        }
