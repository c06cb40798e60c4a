"""What a newcomer runs first: the demo, and the benchmark's machinery."""

import re

import pytest

from tests.lab.command import LabError, run
from tests.lab.virsh import TOP

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(300)]


def test_demo_finds_every_byte() -> None:
    told = run([TOP / "scripts" / "demo", "--embedded"], timeout_seconds=240)
    assert told.count("identical: ") == 6
    assert "All restored disks are identical" in told


def test_bench_measures() -> None:
    cases = ["full", "empty", "version"]
    words = ["--runs", "1", "--size", "0.06"]
    told = run([TOP / "scripts" / "bench", *cases, *words], timeout_seconds=240)
    assert len(re.findall(r"ours / peer +\d", told)) == 2
    assert len(re.findall(r"ours / nbdcopy +\d", told)) == 2
    assert "--version" in told


def test_bench_refuses_an_unknown_case() -> None:
    with pytest.raises(LabError, match="no such case: fast"):
        run([TOP / "scripts" / "bench", "fast"])
