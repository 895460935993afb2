"""Running a trial to its end, over whatever its shards lose on the way."""

from collections.abc import Callable
from pathlib import Path

from esper.evidence.records import TrialRecord
from esper.shards.errors import RepeatedFailureError, ReplicasDifferError, ShardLostError
from esper.shards.shard import Shards
from esper.surgery.checkpoint_folder import CheckpointNotWrittenError
from esper.training.trainer import CollapseError
from esper.trial import Trial


def run_through(
    trial: Trial,
    folder: str | Path | None = None,
    *,
    every: int = 10,
    retries: int = 0,
    again: Shards | None = None,
    on_interval: Callable[[Trial], None] = lambda trial: None,
    on_lost: Callable[[Exception], None] = lambda error: None,
    on_unwritten: Callable[[CheckpointNotWrittenError], None] | None = None,
) -> tuple[Trial, TrialRecord]:
    """Run a trial to its end; when its shards fail, go on from the last checkpoint with new ones.

    What was trained since then is trained again, bit for bit on as many devices of the same kind;
    no decision is lost. Checkpoints are written while the trial goes on: a failure in the middle of
    one costs the steps since the one before.

    A failure is a lost shard, shards that are not equal any more, and, with several shards, a loss
    that is no number: one of them may be broken. If that comes again at the same step, it is the
    model's, and treated as in a trial of one shard.

    Args:
        trial: The trial, at its start or resumed.
        folder: Where checkpoints go; None: there are none, and a failure ends the run.
        every: Intervals from one checkpoint to the next; there is always one at the end.
        retries: How often it may go on so. There is then a checkpoint before the first interval.
        again: Makes the shards that replace those that failed; None: as the trial's own.
        on_interval: Called after every interval; after a failure with what is run again, too.
        on_lost: Called with the failure before the trial goes on from a checkpoint.
        on_unwritten: Called when a checkpoint could not be written, after which the trial goes on
            with the former one; None: that ends the run. The first must be written.

    Returns:
        The trial that ended, which is another object after a failure, and its record.

    Raises:
        RepeatedFailureError: If the same failure comes twice in one interval.
        ShardLostError: If shards are lost once more than `retries` allows.
        ReplicasDifferError: Likewise.
        CheckpointNotWrittenError: If the disk is full or fails; see `on_unwritten`.
    """

    def settle() -> None:
        try:
            trial.shard.settle()
        except CheckpointNotWrittenError as error:
            if on_unwritten is None:
                raise
            on_unwritten(error)

    if folder is None:
        retries = 0
    elif retries:
        trial.save(folder)
    again = again or trial.shards
    failures: set[tuple[type[Exception], int]] = set()
    collapses: set[int] = set()
    failed = False
    while True:
        trial.known_collapses = collapses if retries else None
        try:
            if failed:
                assert folder is not None
                trial, failed = Trial.resume(folder, again), False
                continue
            if trial.done:
                settle()
                return trial, trial.record()
            trial.run_for(0.0)
            if folder is not None and (len(trial.curves["step"]) % every == 0 or trial.done):
                # so that one that failed does not take the place of this one
                settle()
                trial.save(folder, wait=False)
        except (ShardLostError, ReplicasDifferError, CollapseError) as error:
            trial.shard.close()
            if not retries:
                raise
            if isinstance(error, CollapseError):
                collapses.add(error.step)
            elif not failed:
                # shards that cannot be replaced yet are no failure of an interval
                failure = type(error), len(trial.curves.get("step", ()))
                if failure in failures:
                    raise RepeatedFailureError(failure[1] + 1, str(error)) from error
                failures.add(failure)
            failed, retries = True, retries - 1
            on_lost(error)
        else:
            on_interval(trial)
