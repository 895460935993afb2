"""What a sweep tells while it runs. Light to import, so that the command line can subclass it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.evidence.progress import Progress
    from esper.evidence.records import TrialRecord


class Watcher:
    """Listens to nothing; a subclass overrides what it wants to hear."""

    def changed(self, progress: "Progress") -> None:
        """Where the sweep stands: at its beginning, about once a second, and at its end."""

    def finished(self, record: "TrialRecord", progress: "Progress") -> None:
        """A trial ended."""
