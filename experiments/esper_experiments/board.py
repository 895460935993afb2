"""The board of a sweep: hears what happens to trials, and writes `progress.json`."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from esper.config.sweep import SweepConfig
from esper.evidence.progress import ENDED, FILE, Progress, TrialProgress, begin, now
from esper.evidence.records import TrialRecord, write_json
from esper_experiments.plan import Planned
from esper_experiments.watcher import Watcher

# readers look again after a second or two
EVERY_S = 1.0


class Board:
    """Keeps one line a trial.

    Args:
        sweep: The configuration.
        folder: Of the sweep.
        plan: All trials.
        records: Of those that had ended before.
        watcher: Told as often as the file is written.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        folder: Path,
        plan: Iterable[Planned],
        records: Iterable[TrialRecord],
        watcher: Watcher,
    ) -> None:
        self._path, self._watcher = folder / FILE, watcher
        self._trials = {
            p.spec.trial_id: TrialProgress(
                arm=p.spec.arm, pair=p.spec.pair, steps=p.config.train.steps,
                interval_steps=p.config.train.interval_steps,
            )
            for p in plan
        }  # fmt: skip
        for record in records:
            self._change(record.trial_id, **_ended(record))
        self.progress = begin(sweep.name, self._trials)
        self._written = 0.0
        self._write()

    def _change(self, trial_id: str, **values: Any) -> None:
        self._trials[trial_id] = self._trials[trial_id].model_copy(update=values)

    def placed(self, slots: int, gpus: float, gpus_per_trial: float) -> None:
        """The cluster is known."""
        self._write(slots=slots, gpus=gpus, gpus_per_trial=gpus_per_trial)

    def running(self, trial_id: str, latest: Mapping[str, float], place: str) -> None:
        """A trial went on; the latest value of each of its curves."""
        before = self._trials[trial_id]
        self._change(
            trial_id,
            state="running",
            step=int(latest["step"]),
            active_seeds=int(latest["active_seeds"]),
            parameters=int(latest["parameters"]),
            train_loss=latest["train_loss"],
            place=place,
            started_at=before.started_at or now(),
        )
        self.tick()

    def started(self, trial_id: str) -> None:
        """A trial has a worker."""
        self._change(trial_id, state="running", started_at=now())
        self.tick()

    def failed(self, trial_id: str, failures: int, note: str, again: bool) -> None:
        """A trial's worker was lost, or it raised an error."""
        state = "waiting" if again else "failed"
        self._change(trial_id, state=state, failures=failures, note=note, step=0, active_seeds=0)
        self._write()

    def finished(self, record: TrialRecord) -> None:
        """A trial has its record."""
        self._change(record.trial_id, **_ended(record), ended_at=now())
        self.tick()
        self._watcher.finished(record, self._now())

    def end(self, whole: bool) -> None:
        """The driver leaves; `whole`: with all trials that the question needs."""
        if whole:
            for trial_id, trial in self._trials.items():
                if trial.state not in ENDED:
                    self._change(trial_id, state="not needed")
        self._write(outcome="ended" if whole else "interrupted")

    def tick(self) -> None:
        """Write what changed, at most once a second."""
        if time.monotonic() - self._written >= EVERY_S:
            self._write()

    def _now(self, **values: Any) -> Progress:
        changed = {**values, "updated_at": now(), "trials": dict(self._trials)}
        self.progress = self.progress.model_copy(update=changed)
        return self.progress

    def _write(self, **values: Any) -> None:
        self._written = time.monotonic()
        write_json(self._path, self._now(**values))
        self._watcher.changed(self.progress)


def _ended(record: TrialRecord) -> dict[str, Any]:
    collapsed = record.status == "collapsed"
    return {
        "state": "collapsed" if collapsed else "finished",
        "step": int(record.metrics["steps"]),
        "active_seeds": 0,
        "parameters": int(record.metrics["parameters"]),
        "note": record.collapse_reason,
    }
