"""A repository of one domain with rules of retention, and points of chosen times in it."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nbdbackupd.app import ctl
from nbdbackupd.model.chain import Consistency, Level
from nbdbackupd.repo.set_directory import SetDirectory
from tests.lib import chains, points


class House:
    """A repository and a configuration; points are made at a time, into the set of its month."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        self.repository = root / "repository"
        self.home = self.repository / "vm1"
        (root / "config/domains.d").mkdir(parents=True)
        self.numbers: dict[Path, int] = {}

    def rules(self, text: str) -> None:
        text = f"repository: {{path: {self.repository}}}\nretention: {{{text}}}\n"
        (self.root / "config/nbdbackup.yaml").write_text(text)

    def save(self, moment: str, *, level: Level | None = None, **more: Any) -> str:
        """Publish a point; its id."""
        made = datetime.fromisoformat(moment).replace(tzinfo=UTC)
        path = self.home / f"{made:%Y-%m}"
        self.numbers[path] = number = self.numbers.get(path, 0) + 1
        repository = SetDirectory.open(path)
        ident = f"{made:%Y%m%dt%H%M%S}-{number:08}"
        with repository.lock(owner="test"):
            known = repository.load().points
            level = level or (Level.INC if known else Level.FULL)
            intent = replace(
                chains.intent_for(number, level=level), point_id=ident, run_id=ident,
                uuid=more.get("uuid", points.UUID),
                checkpoint=f"nbdbackup.{made:%Y%m}.{number}" if level is not Level.DIFF else "",
                chain=f"c{made:%Y%m}",
            )  # fmt: skip
            with repository.draft(intent) as draft:
                point = chains.fill(draft, known, level)
                draft.publish(
                    replace(point, chain=intent.chain, created=f"{moment}:00Z",
                            consistency=Consistency.FILESYSTEM, **more)
                )  # fmt: skip
        return ident

    def nights(self, begin: str, number: int) -> list[str]:
        first = datetime.fromisoformat(begin)
        return [self.save(f"{first + timedelta(days=n):%Y-%m-%dT%H:%M}") for n in range(number)]

    def run(self, *words: object, code: int = 0) -> str:
        """Standard output and error of a command."""
        self.capsys.readouterr()
        head = ["--config-dir", self.root / "config", "--runtime-dir", self.root / "run"]
        found = ctl.main([str(each) for each in (*head, *words)])
        said = "".join(self.capsys.readouterr())
        assert found == code, said
        return said

    def fates(self, *words: object, code: int = 0) -> dict[str, str]:
        """What becomes of each point, by id; those that are merged with the id of the other."""
        document = json.loads(self.run("prune", "--json", *words, code=code))
        return {each["point"]: each["into"] or each["fate"] for each in document["points"]}

    def left(self) -> dict[str, list[str]]:
        """The points of each set."""
        return {
            path.name: [each.id for each in SetDirectory.open(path).load().points]
            for path in sorted(self.home.iterdir())
        }
