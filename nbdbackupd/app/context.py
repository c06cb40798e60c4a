"""What all verbs share: connection settings, directories, output."""

import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdbackupd import plain, rundir
from nbdbackupd.errors import ConfigError

if TYPE_CHECKING:
    from nbdbackupd.app.arguments import Arguments
    from nbdbackupd.app.progress import Progress
    from nbdbackupd.virt.connection import Connection

DEFAULT_URI = "qemu:///system"


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Settings from the global options and the environment."""

    uri: str
    user: str
    password_file: Path | None
    json: bool
    progress_style: str
    runtime_dir: Path
    scratch_dir: Path
    state_dir: Path
    is_state_given: bool = False
    config_dir: Path | None = None

    @classmethod
    def from_args(cls, args: "Arguments") -> "Context":
        """Read the global options, set the log up."""
        # read when libvirt is imported; else its embedded driver fills stderr with notices
        os.environ.setdefault("LIBVIRT_DEBUG", "error")
        _setup_log(args)
        runtime = getattr(args, "runtime_dir", None) or default_runtime_dir(os.environ)
        return cls(
            uri=getattr(args, "connect", "") or DEFAULT_URI,
            user=getattr(args, "user", "") or "",
            password_file=getattr(args, "password_file", None),
            json=getattr(args, "json", False),
            progress_style=getattr(args, "progress", "auto"),
            runtime_dir=runtime,
            scratch_dir=getattr(args, "scratch_dir", None) or default_scratch_dir(os.environ),
            state_dir=getattr(args, "checkpoint_dir", None) or default_state_dir(os.environ),
            is_state_given=getattr(args, "checkpoint_dir", None) is not None,
            config_dir=getattr(args, "config_dir", None),
        )

    @contextmanager
    def connection(self, *, any_host: bool = False) -> "Iterator[Connection]":
        """Open the libvirt connection of the global options.

        Only who touches no file of a guest takes ``any_host``. Raises ConfigError if the
        password file can't be read, DomainError if libvirt can't be reached or is another host's.
        """
        from nbdbackupd import log
        from nbdbackupd.virt import connection

        password = self._password()
        with (
            log.hidden(password),
            connection.open_connection(
                self.uri, user=self.user, password=password,
                runtime_dir=None if any_host else self.runtime_dir,
            ) as opened,
        ):  # fmt: skip
            yield opened

    @contextmanager
    def progress(self) -> "Iterator[Progress]":
        """A progress display on stderr; quiet where nobody watches."""
        from nbdbackupd.app import progress

        with ExitStack() as stack:
            style = progress.choose_style(self.progress_style, sys.stderr)
            yield stack.enter_context(progress.Progress(sys.stderr, style))

    def show(self, document: Mapping[str, Any], text: str, *, painted: bool = False) -> None:
        """Print a report: JSON if that was asked for, else text.

        ``painted``: it has colours, and its parts are fit for a terminal already.
        """
        if self.json:
            print(json.dumps(document, indent=2))
        elif text:
            print(text if painted else plain.lines(text))

    def _password(self) -> str:
        if self.password_file is None:
            return ""
        try:
            return self.password_file.read_text().rstrip("\n")
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"can't read the password file {self.password_file}: {err}") from err


def now() -> datetime:
    """The time of the run, UTC."""
    return datetime.now(UTC)


def new_run_id(moment: datetime) -> str:
    """``20260131t235959-1a2b3c4d``: sorts by time, never the same twice.

    It becomes part of names of files, and some file systems know no capitals.
    """
    return f"{moment:%Y%m%dt%H%M%S}-{secrets.token_hex(4)}"


def default_runtime_dir(environ: Mapping[str, str]) -> Path:
    """``/run/nbdbackup`` for root, below the user's runtime directory for others."""
    if os.geteuid() == 0:
        return rundir.DEFAULT
    base = environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return Path(base, "nbdbackup")


def default_scratch_dir(environ: Mapping[str, str]) -> Path:
    """``/var/lib/nbdbackup/scratch`` for root, below the user's state directory for others."""
    return _own_dir(environ) / "scratch"


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """``/var/lib/nbdbackup/state`` for root, below the user's state directory for others.

    ``NBDBACKUP_STATE_DIR`` overrules both, as it does for libvirt's hook.
    """
    given = environ.get("NBDBACKUP_STATE_DIR")
    return Path(given) if given else _own_dir(environ) / "state"


def host_state_dir() -> Path:
    """Where this host keeps what is about itself, whatever ``checkpoint_directory`` says."""
    return default_state_dir(os.environ)


def _own_dir(environ: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/nbdbackup")
    base = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/"), ".local/state")
    return Path(base, "nbdbackup")


def _setup_log(args: "Arguments") -> None:
    from nbdbackupd import log

    level = log.NOTICE
    if getattr(args, "verbose", 0):
        level = logging.DEBUG if args.verbose > 1 else logging.INFO
    elif getattr(args, "quiet", False):
        level = logging.ERROR
    log.setup(level, sys.stderr, os.environ.get("JOURNAL_STREAM", ""))
