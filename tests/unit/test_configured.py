"""What verbs take from the configuration."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nbdbackupd.errors import ConfigError
from nbdbackupd.model.host import Host
from nbdbackupd.ops.domain import configured


def host(directory: Path) -> Host:
    return Host(
        uri="test:///default",
        user="",
        password_file=None,
        runtime_dir=directory,
        scratch_dir=directory,
        state_dir=Path("/default"),
        own_state_dir=Path("/default"),
        clock=lambda: datetime.now(UTC),
        config_dir=directory,
    )


def test_bases_are_noted_where_runs_note_them(tmp_path: Path) -> None:
    main = tmp_path / "nbdbackup.yaml"
    here = host(tmp_path)
    assert configured.state_directory("vm1", here) == Path("/default")
    main.write_text("checkpoint_directory: /shared/state\n")
    assert configured.state_directory("vm1", here) == Path("/shared/state")
    (tmp_path / "domains.d").mkdir()
    (tmp_path / "domains.d/vm1.yaml").write_text(
        "match: {name: vm1}\ncheckpoint_directory: /other\n"
    )
    assert configured.state_directory("vm1", here) == Path("/other")
    assert configured.state_directory("vm2", here) == Path("/shared/state")
    # what the command line says is asked nobody
    main.write_text("no: such setting\n")
    given = replace(here, is_state_given=True)
    assert configured.state_directory("vm1", given) == Path("/default")
    with pytest.raises(ConfigError, match="no"):
        configured.state_directory("vm1", here)
