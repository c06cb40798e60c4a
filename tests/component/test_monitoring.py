"""Alerts and dashboard: Prometheus' own tool takes them, and they ask for what we write."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nbdbackupd.ops.status import metrics
from tests.lab.taken_out import taken_out
from tests.lib.pages import TOP

pytestmark = pytest.mark.component
PLACE = TOP / "docs/monitoring"
RULES, TEST, DASHBOARD = (
    PLACE / f"nbdbackup.{each}" for each in ("rules.yaml", "rules-test.yaml", "dashboard.json")
)
TABLES = (
    metrics.DOMAIN_METRICS, metrics.SET_METRICS, metrics.HOST_METRICS, metrics.REPOSITORY_METRICS,
)  # fmt: skip


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def promtool(*words: object) -> subprocess.CompletedProcess[str]:
    argv = [str(taken_out("promtool") / "usr/bin/promtool"), *map(str, words)]
    return subprocess.run(argv, cwd=PLACE, capture_output=True, text=True, check=False)


def test_the_rules_are_rules_and_each_alert_fires_in_their_test() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules())} rules found" in done.stdout
    done = promtool("test", "rules", TEST)
    assert done.returncode == 0, done.stdout + done.stderr
    for rule in rules():
        assert f'alertname="{rule["alert"]}"' in TEST.read_text()


def test_a_rule_that_never_fires_would_be_seen(tmp_path: Path) -> None:
    text = RULES.read_text().replace("nbdbackup_damaged_points > 0", "nbdbackup_damaged_points > 9")
    (broken := tmp_path / RULES.name).write_text(text)
    (broken.parent / TEST.name).write_text(TEST.read_text())
    done = promtool("test", "rules", broken.parent / TEST.name)
    assert done.returncode == 1
    assert "BackupDamaged" in done.stdout + done.stderr


@pytest.mark.parametrize("path", [RULES, TEST, DASHBOARD], ids=lambda path: str(path.name))
def test_all_that_is_asked_for_is_written(path: Path) -> None:
    known = {f"{metrics.PREFIX}_{name}" for table in TABLES for name in table}
    asked = set(re.findall(r"nbdbackup_\w+", path.read_text()))
    assert asked
    assert asked <= known, asked - known


def test_each_alert_says_how_bad_it_is_and_what_helps() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert re.search(r"nbdbackupctl \w+", rule["annotations"]["description"]), rule["alert"]


def test_the_dashboard_has_panels_that_do_not_cover_one_another() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["targets"], panel["title"]
