"""A worker process of a sweep on Ray Tune: it runs one planned trial after the other."""

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from esper.config.sweep import Resources
from esper.environment import code_hash
from esper.evidence.records import TrialRecord, write_json
from esper.evidence.reference import TRIAL_REQUESTS, median_ms, reference_s
from esper.monitoring.runs import RunMetrics
from esper.shards.group import groups
from esper.shards.shard import KasminaShard
from esper.surgery.checkpoint_folder import CheckpointError, CheckpointNotWrittenError
from esper.trial import Trial
from esper_experiments.peers import trial_of
from esper_experiments.plan import Planned, checkpoint_path, read_record, record_path
from esper_experiments.ray_metrics import RayExporter

# how much of a trial one call from the driver runs: long enough for calls to cost nothing, short
# enough for the progress display
SLICE_S = 1.0


class TrialWorker(tune.Trainable):
    """A thin shell around `Trial`; one process runs many of them, one after the other."""

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        plan: dict[str, Planned],
        folder: str,
        resources: Resources,
    ) -> None:
        """Called once a process, with the first trial."""
        torch.set_num_threads(max(1, int(resources.cpus_per_trial / resources.shards)))
        self._plan, self._folder = plan, Path(folder)
        self._shards, self._checkpoint_s = resources.shards_config, resources.checkpoint_s
        self._trial: Trial | None = None
        self._exporter = RayExporter()
        self._start(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called for every further trial."""
        self._start(new_config["trial"])
        return True

    def _start(self, trial_id: str) -> None:
        planned = self._plan[trial_id]
        expected = planned.spec.fingerprint.code_hash
        if code_hash() != expected:
            raise RuntimeError(
                f"the worker's code must be the driver's (sha256 {expected[:12]}), but is "
                f"{code_hash()[:12]}; install the same version on every node."
            )
        self._close()
        self._saved = time.monotonic()
        self._unwritten = ""
        self._checkpoint = checkpoint_path(self._folder, trial_id)
        self._trial = self._resumed(planned) or self._new(planned)
        self._timed = planned.is_timed
        self._reference_s = self._reference()
        run = f"{self._folder.name} {trial_id}"
        self._trial.on_interval = RunMetrics(self._exporter, run, self._trial).interval

    def _reference(self) -> list[float]:
        """How fast the machine is just now, where the question judges times."""
        assert self._trial is not None
        return reference_s(self._trial.config.device, TRIAL_REQUESTS) if self._timed else []

    def _new(self, planned: Planned) -> Trial:
        followed = planned.waits_for and read_record(self._folder, planned.waits_for)
        kind = trial_of(planned.config)
        given = (planned.config, planned.spec, followed or None)
        # a peer's network is none that a shard could hold
        trial = Trial(*given, shards=self._makes_shards()) if kind is Trial else kind(*given)
        return self._marked(trial)

    def _resumed(self, planned: Planned) -> Trial | None:
        """The trial where a lost worker or driver left it, if that can be continued here."""
        if not self._checkpoint.exists():
            return None
        try:
            trial = Trial.resume(self._checkpoint, self._makes_shards())
        except CheckpointError:
            # it is a matter of time alone: run again, the trial is the same
            return None
        then = trial.spec.fingerprint
        if self._marked(trial).spec.fingerprint != then or trial.config != planned.config:
            trial.shard.close()
            return None
        return trial

    def _makes_shards(self) -> Any:
        return KasminaShard if self._shards is None else groups(self._shards)

    def _marked(self, trial: Trial) -> Trial:
        """Put down what it really runs on, which need not be the driver's machine."""
        device, libraries = trial.shard.where()
        mark = trial.spec.fingerprint.model_copy(update={"device": device, "versions": libraries})
        trial.spec = dataclasses.replace(trial.spec, fingerprint=mark)
        return trial

    def step(self) -> dict[str, Any]:
        """Run for a while; write the record when the trial is done."""
        trial = self._trial
        assert trial is not None
        latest = trial.run_for(SLICE_S)
        if trial.done:
            path = record_path(self._folder, trial.spec.trial_id)
            # a worker that was cut off from the cluster may come later than who took its place
            if not path.exists():
                write_json(path, self._record(trial))
            self._close()
            shutil.rmtree(self._checkpoint, ignore_errors=True)
        elif time.monotonic() - self._saved > self._checkpoint_s and type(trial) is Trial:
            self._save(trial)
        where = (
            ray.util.get_node_ip_address(),
            f"pid {os.getpid()}",
            trial.spec.fingerprint.device,
        )
        place = " ".join(where)
        return {"done": trial.done, "latest": latest, "place": place, "unwritten": self._unwritten}

    def _record(self, trial: Trial) -> TrialRecord:
        record = trial.record()
        if not self._timed:
            return record
        reference = median_ms([*self._reference_s, *self._reference()])
        return record.model_copy(update={"reference_ms": reference})

    def _save(self, trial: Trial) -> None:
        self._saved = time.monotonic()
        try:
            trial.save(self._checkpoint, wait=False)
        except CheckpointNotWrittenError as error:
            # of this one or the one before; the trial loses nothing but its insurance
            self._unwritten = str(error)

    def _close(self) -> None:
        if self._trial is not None:
            self._trial.shard.close()
        self._trial = None

    def cleanup(self) -> None:
        """Called when the process is not needed any more."""
        self._close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Trials keep their own checkpoints, which a new driver finds, too."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""
