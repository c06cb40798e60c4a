"""Names of our checkpoints: ``nbdbackup.<tag>.<point id>``.

A checkpoint's bitmap carries the same name in each image. The tag is the end of the chain's id,
so that two chains of one domain can be told apart, and a name is used for one point only. Hence
a bitmap of a point's name was made for that point and nothing else.
"""

import re
import uuid
from typing import Final

PREFIX: Final = "nbdbackup"
CHAIN_NAME: Final = re.compile("[a-z0-9_]{1,32}", re.ASCII)
"""What people may call a chain."""

NAMESPACE: Final = uuid.UUID("5a0b8d3e-6c5c-4d4f-9a0e-8b1f6f1c7a52")
"""For a QEMU that was given no UUID: its set goes by the name that the user gives it."""


def tag_of_chain(chain: str) -> str:
    """What tells a chain's names from those of others: what follows the last dash of its id."""
    return chain.rpartition("-")[2]


def named_chain(run_id: str, name: str) -> str:
    """The id of the chain that a run begins; ``name`` takes the place of the run's own mark."""
    return f"{run_id.rpartition('-')[0]}-{name}" if name else run_id


def checkpoint_prefix(chain: str) -> str:
    """How the names of a chain's checkpoints begin: ``nbdbackup.<tag>.``."""
    return f"{PREFIX}.{tag_of_chain(chain)}."


def tag_of(name: str) -> str:
    """The tag in the name of a checkpoint or bitmap; empty if the name is not one of ours."""
    parts = name.split(".", 2)
    if len(parts) != 3 or parts[0] != PREFIX or not parts[2]:
        return ""
    return parts[1]


def point_of(name: str) -> str:
    """The id of the point that a checkpoint was made for; empty if the name is not ours."""
    return name.split(".", 2)[2] if tag_of(name) else ""


def uuid_of(name: str) -> str:
    """The UUID under which a QEMU is saved that was given none."""
    return str(uuid.uuid5(NAMESPACE, name))


def is_foreign(checkpoint: str) -> bool:
    """Whether a checkpoint that is the base of a chain was made by another program."""
    return bool(checkpoint) and not tag_of(checkpoint)
