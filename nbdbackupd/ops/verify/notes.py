"""What a verification writes down in the set, point by point, as soon as each is proven."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from nbdbackupd.errors import RepositoryError, one_line
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.model.proof import Proof, content_of
from nbdbackupd.ops.verify.findings import Problem
from nbdbackupd.repo import verified
from nbdbackupd.units import utc_time


class Notes:
    """Without a clock nothing is noted. ``problem`` says why the first note was not written."""

    def __init__(self, set_path: Path, clock: Callable[[], datetime] | None) -> None:
        self.problem = ""
        self._path = set_path
        self._clock = clock

    def note(self, point: RestorePoint, size: int, problems: Sequence[Problem]) -> None:
        """Note that all files of a point were looked at, ``size`` bytes, and what is wrong.

        What could not be read is neither sound nor damaged: then nothing is noted.
        """
        if self._clock is None or self.problem or any(each.is_unread for each in problems):
            return
        proof = Proof(
            point=point.id,
            content=content_of(point),
            verified=utc_time(self._clock()),
            size=size,
            damage=tuple(" ".join(each.text.split()) for each in problems),
        )
        try:
            verified.write(self._path, proof)
        except RepositoryError as err:
            self.problem = one_line(err)
