"""What a sweep tells while it runs. Light to import, so that the command line can subclass it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.evidence.records import TrialRecord


class Watcher:
    """Listens to nothing; a subclass overrides what it wants to hear."""

    def planned(self, trial_ids: Sequence[str], finished: int) -> None:
        """The plan is made; so many of its trials had finished before."""

    def progress(self, trial_id: str, latest: dict[str, float]) -> None:
        """A trial goes on; the latest value of each of its curves."""

    def finished(self, record: "TrialRecord") -> None:
        """A trial ended."""
