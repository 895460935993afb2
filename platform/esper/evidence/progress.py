"""How far a sweep is: one file, written by the process that drives it, for whoever asks."""

import os
import socket
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field

from esper.config.base import ConfigError
from esper.evidence.records import Record

FILE = "progress.json"
State = Literal["waiting", "running", "finished", "collapsed", "failed", "not needed"]
ENDED: frozenset[State] = frozenset({"finished", "collapsed"})


class TrialProgress(Record):
    """One trial of a sweep."""

    arm: str
    pair: int
    state: State = "waiting"
    step: int = 0
    steps: int
    interval_steps: int
    active_seeds: int = 0
    parameters: int | None = None
    train_loss: float | None = None
    place: str | None = Field(None, description="Node, process and device that it runs on, or ran.")
    failures: int = Field(0, description="How often its worker was lost or it raised an error.")
    started_at: AwareDatetime | None = Field(
        None, description="Of its first interval by this driver; None before, or by another one."
    )
    ended_at: AwareDatetime | None = None
    note: str | None = Field(None, description="Last line of its last error.")

    @property
    def done_frac(self) -> float:
        """Share of its steps that it has taken."""
        return 1.0 if self.state in ENDED else self.step / self.steps


class Progress(Record):
    """A sweep on its way."""

    name: str
    host: str
    pid: int = Field(description="Of the driver, on its host.")
    started_at: AwareDatetime
    updated_at: AwareDatetime
    outcome: Literal["running", "ended", "interrupted"] = "running"
    slots: int | None = Field(None, description="Trials that fit at once; None before Ray runs.")
    gpus: float = Field(0.0, description="GPUs of the cluster.")
    gpus_per_trial: float = 0.0
    trials: dict[str, TrialProgress]

    def counts(self, arm: str | None = None) -> Counter[State]:
        """How many trials are in each state, of all arms or of one."""
        return Counter(t.state for t in self.trials.values() if arm in (None, t.arm))

    @property
    def active_seeds(self) -> int:
        """Seeds that live in the trials that run."""
        return sum(t.active_seeds for t in self.trials.values() if t.state == "running")

    @property
    def gpus_in_use(self) -> float:
        """GPUs that the running trials were given."""
        return self.gpus_per_trial * self.counts()["running"]

    @property
    def seconds_left(self) -> float | None:
        """Until the end, if trials go on as those of this driver did; None before the first."""
        spent, done = 0.0, 0.0
        for trial in self.trials.values():
            if trial.started_at is not None:
                spent += ((trial.ended_at or self.updated_at) - trial.started_at).total_seconds()
                done += trial.done_frac
        left = sum(
            1 - trial.done_frac
            for trial in self.trials.values()
            if trial.state in ("waiting", "running")
        )
        if not left:
            return 0.0
        if not done or not self.slots:
            return None
        # the last ones do not fill all slots
        return left * spent / done / max(1, min(self.slots, -int(-left // 1)))

    @property
    def driver_lives(self) -> bool | None:
        """Whether the process that drives the sweep is there; None if it is on another machine."""
        if self.host != socket.gethostname():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


def now() -> datetime:
    """In UTC."""
    return datetime.now(UTC)


def begin(name: str, trials: Mapping[str, TrialProgress]) -> Progress:
    """The progress of a sweep that this process is to drive."""
    at = now()
    return Progress(
        name=name, host=socket.gethostname(), pid=os.getpid(), started_at=at, updated_at=at,
        trials=dict(trials),
    )  # fmt: skip


def find_progress(name: str | None, runs: Path) -> Path:
    """The progress file of a sweep.

    Args:
        name: Its folder, or the beginning of its folder's name below `runs`; None: the sweep that
            was written last.
        runs: Folder of sweeps.

    Raises:
        ConfigError: If there is none.
    """
    if name is not None and (Path(name) / FILE).is_file():
        return Path(name) / FILE
    pattern = "*" if name is None else f"{name}*"
    # an arena keeps its sweeps a folder deeper
    found = [*runs.glob(f"{pattern}/{FILE}"), *runs.glob(f"{pattern}/*/{FILE}")]
    if not found:
        what = "a sweep" if name is None else f"the sweep '{name}'"
        raise ConfigError(str(runs), (
            f"{what} must have begun there, but no {FILE} was found; name its folder, or the "
            "folder of sweeps with --runs.",
        ))  # fmt: skip
    return max(found, key=lambda path: path.stat().st_mtime)


def read_progress(path: Path) -> Progress:
    """Read a progress file.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return Progress.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(str(path), (
            f"it must be the progress of a sweep, but: {first}; the sweep writes it anew.",
        )) from None  # fmt: skip
