"""From options and settings to a request for a backup: explicit options win."""

import argparse
from collections.abc import Mapping
from typing import Any, Final

from nbdbackupd.app.arguments import Arguments
from nbdbackupd.errors import UsageError

UNSET: Final = argparse.SUPPRESS
"""The default of options that a setting can stand for: absent tells from given."""

FIELDS: Final = {
    "include": "include",
    "exclude": "exclude",
    "raw": "raw",
    "compress": "compression",
    "start_paused": "start_paused",
    "scratch_reserve": "scratch_reserve",
    "threshold": "threshold",
    "strict": "strict",
    "workers": "workers",
    "wait": "wait_seconds",
    "timeout": "timeout_seconds",
    "limit_rate": "limit_rate",
}
"""Options, by their names in ``Arguments``, and the fields of a request that they decide."""


def given(args: Arguments, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that options of ``backup`` decide; ``settings`` are those of ``request_fields``.

    Raises UsageError if options contradict one another.
    """
    found = {FIELDS[name]: value for name, value in vars(args).items() if name in FIELDS}
    if "include" in found or "exclude" in found:
        # the two belong together: a disk of one list may be in the setting of the other
        found = {"include": (), "exclude": (), **found}
    if args.type == "raw":
        if args.level != "copy" or found.get("compression") is not None:
            raise UsageError("--type raw needs '-l copy' and goes without --compress")
        found["compression"] = None
    return {**found, **_holding(args, settings)}


def _holding(args: Arguments, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the guest is held still at the instant."""
    from nbdbackupd.model.policy import FreezePolicy

    freeze = getattr(args, "freeze", None)
    mountpoints = getattr(args, "freeze_mountpoint", ())
    if getattr(args, "pause", False):
        if freeze == "require" or mountpoints:
            raise UsageError("--pause and freezing exclude one another")
        return {"freeze": FreezePolicy.PAUSE, "mountpoints": ()}
    if freeze is None and not mountpoints:
        return {}
    if freeze is None:
        before = settings.get("freeze", FreezePolicy.AUTO)
        policy = FreezePolicy.REQUIRE if before is FreezePolicy.REQUIRE else FreezePolicy.AUTO
    else:
        policy = FreezePolicy(freeze)
    chosen = mountpoints or settings.get("mountpoints", ())
    return {"freeze": policy, "mountpoints": chosen}
