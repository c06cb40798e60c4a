"""The documents of ``--json`` have the members that docs/json.md tells.

The reports are read as source text: importing all verbs would need libvirt and libnbd.
"""

import ast
import re
from collections.abc import Iterator
from typing import Final

import pytest

from scripts import gen_completion
from tests.lib.pages import TOP

PAGE: Final = TOP / "docs/json.md"
ROOT: Final = TOP / "nbdbackupd"
REPORTS: Final = {
    "error": [("app/ctl.py", "_report")],
    "backup": [("ops/backup/request.py", "to_json")],
    "run": [("ops/run/request.py", "to_json")],
    "list": [
        ("ops/sets/catalog.py", "to_json"),
        ("ops/sets/catalog.py", "describe"),
        ("ops/sets/catalog.py", "_describe_disk"),
        ("repo/boot_tests.py", "to_json"),
        ("app/verbs/catalog.py", "_document"),
        ("ops/sets/sizes.py", "to_json"),
        ("ops/sets/sizes.py", "describe"),
        ("ops/sets/sizes.py", "space"),
    ],
    "restore": [
        ("ops/restore/request.py", "RestoreReport.to_json"),
        ("ops/restore/request.py", "Definition.to_json"),
    ],
    "mount": [("ops/files/mount.py", "to_json"), ("model/file_systems.py", "to_json")],
    "unmount": [("app/verbs/mount.py", "run_unmount")],
    "files": [
        ("app/tree_options.py", "show_file_systems"),
        ("ops/files/report.py", "to_json"),
        ("ops/files/files.py", "to_json"),
        ("ops/files/copy.py", "to_json"),
    ],
    "prune": [
        ("ops/retention/prune.py", "to_json"),
        ("ops/retention/history.py", "to_json"),
        ("app/verbs/prune.py", "_each"),
    ],
    "protect": [("app/verbs/protect.py", "run_protect"), ("repo/protected.py", "to_json")],
    "unprotect": [("app/verbs/protect.py", "run_unprotect")],
    "merge": [("ops/removal/apply.py", "to_json")],
    "remove": [("ops/removal/apply.py", "to_json")],
    "import": [("ops/sets/import_set.py", "to_json")],
    "map": [
        ("app/verbs/mapping.py", "_show"),
        ("app/verbs/mapping.py", "_list"),
        ("ops/map/mapped.py", "to_json"),
        ("ops/map/mapped.py", "describe"),
    ],
    "unmap": [("app/verbs/mapping.py", "run_unmap")],
    "verify": [
        ("ops/verify/findings.py", "VerifyReport.to_json"),
        ("ops/verify/findings.py", "Problem.to_json"),
        ("ops/verify/by_age.py", "to_json"),
        ("app/verbs/verify.py", "_document"),
        ("ops/boot/boot_test.py", "to_json"),
    ],
    "boot": [
        ("app/verbs/boot.py", "_tell"),
        ("ops/boot/live_restore.py", "to_json"),
        ("app/verbs/boot.py", "_list"),
        ("ops/boot/record.py", "describe"),
        ("app/verbs/boot.py", "_stop"),
    ],
    "export": [("ops/backup/export.py", "to_json")],
    "estimate": [("ops/backup/estimate.py", "to_json")],
    "check": [("ops/check/check.py", "to_json"), ("model/finding.py", "to_json")],
    "checkpoints": [
        ("ops/checkpoints/checkpoints.py", "to_json"),
        ("ops/checkpoints/checkpoints.py", "_entry_json"),
        ("ops/checkpoints/checkpoints.py", "_step_json"),
    ],
    "abort": [("ops/backup/abort.py", "to_json")],
    "yield": [("ops/backup/give_way.py", "to_json")],
    "config": [
        ("app/verbs/config.py", "_check"),
        ("app/verbs/config.py", "_document"),
        ("app/verbs/config.py", "_sample"),
    ],
    "status": [("ops/status/status.py", "to_json"), ("ops/status/status.py", "describe")],
    "timers": [("app/verbs/timers.py", "_document"), ("app/verbs/timers.py", "_entry")],
    "notify": [("app/verbs/notify.py", "_tell")],
    "log": [("ops/status/journal.py", "to_json"), ("ops/status/journal.py", "describe")],
}


def told(heading: str) -> list[list[str]]:
    """The members of each table under a heading."""
    text = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (part,) = [each for each in text if each.startswith(f"{heading}\n")]
    tables = re.split(r"^\| member .*$", part, flags=re.MULTILINE)[1:]
    return [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in tables]


def literals(file: str, function: str) -> Iterator[list[str]]:
    """The keys of each object that the first function of that name writes down, in its order.

    ``Class.function`` is that of a class.
    """
    found: ast.AST = ast.parse((ROOT / file).read_text())
    for name in function.split("."):
        found = next(
            node
            for node in ast.walk(found)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        )
    for node in ast.walk(found):
        if isinstance(node, ast.Dict) and node.keys:
            yield [str(key.value) for key in node.keys if isinstance(key, ast.Constant)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "versioned":
            yield ["version", *(str(keyword.arg) for keyword in node.keywords)]


@pytest.mark.parametrize("heading", REPORTS)
def test_members_of_the_documents(heading: str) -> None:
    made = [keys for place in REPORTS[heading] for keys in literals(*place)]
    assert told(heading) == made
    assert made[0][0] == "version"


def test_every_verb_is_described() -> None:
    headings = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(["error", *gen_completion.read_parser()[1]])
