"""The plan of a sweep: which trials, in which order, under which registered question.

Pure but for two files: `registration.json`, written once before the first trial, and the trial
records, which say what is left to do.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from esper.config.base import ConfigError
from esper.config.run import RunConfig
from esper.config.sweep import SweepConfig
from esper.environment import fingerprint
from esper.evidence.health import judges_time
from esper.evidence.records import (
    REGISTRATION,
    EvidenceError,
    Fingerprint,
    Registration,
    TrialRecord,
    read_json,
    write_json,
)
from esper.trial import TrialSpec


@dataclass(frozen=True)
class Planned:
    """One trial of the plan.

    Attributes:
        spec: Which trial.
        config: Its arm's configuration.
        waits_for: Id of the trial whose record it needs first; None if it needs none.
        is_timed: Whether the question judges times, so that the machine's speed is measured too.
    """

    spec: TrialSpec
    config: RunConfig
    waits_for: str | None
    is_timed: bool = False


def sweep_folder(sweep: SweepConfig, device: str) -> Path:
    """Where a sweep's evidence lies; another configuration or other code has another folder."""
    code = fingerprint(device)["code_hash"]
    return sweep.output_dir / f"{sweep.name}-{sweep.config_hash[:8]}-{code[:8]}"


def device_of(sweep: SweepConfig) -> str:
    """The device that all arms run on.

    Raises:
        ConfigError: If the arms name different devices.
    """
    devices = {sweep.run_config(arm).device for arm in sweep.arms}
    if len(devices) > 1:
        raise ConfigError(f"sweep '{sweep.name}'", (
            f"device must be the same for all arms, but got {', '.join(sorted(devices))}; "
            "set it once, under `run`.",
        ))  # fmt: skip
    return devices.pop()


def register(sweep: SweepConfig, folder: Path) -> Registration:
    """Write the question down before the first trial, or read what was written.

    Raises:
        EvidenceError: If the folder holds a registration that is not this sweep's.
    """
    path = folder / REGISTRATION
    draft = Registration(
        sweep=sweep.name,
        config_hash=sweep.config_hash,
        question=sweep.question,
        pairs=sweep.pairs,
        arms=list(sweep.all_arms),
        fingerprint=Fingerprint(**fingerprint(device_of(sweep))),
        registered_at=datetime.now(UTC),
        registration_hash="",
    )
    digest = draft.digest()
    if path.exists():
        stored = read_json(path, Registration, remedy="move the folder away")
        if stored.registration_hash != digest:
            raise EvidenceError(
                f"{path} must be the registration of this sweep, but its hash is "
                f"{stored.registration_hash[:12]} and not {digest[:12]}; move the folder away."
            )
        return stored
    registration = draft.model_copy(update={"registration_hash": digest})
    write_json(path, registration)
    return registration


def plan_trials(sweep: SweepConfig, registration: Registration) -> list[Planned]:
    """All trials, pair by pair; the arms of a pair in random order, followers last."""
    configs = {arm: sweep.run_config(arm) for arm in sweep.arms}
    is_timed, trials = judges_time(sweep.question), []
    for pair in range(sweep.pairs):
        # the order is a function of the registration, so that a resumed sweep has the same one
        rng = np.random.default_rng([int(registration.registration_hash[:8], 16), pair])
        shuffled = [str(arm) for arm in rng.permutation(list(configs))]
        shuffled.sort(key=lambda arm: configs[arm].follow is not None)
        for order, arm in enumerate(shuffled):
            spec = TrialSpec(
                arm=arm,
                pair=pair,
                seed=sweep.first_seed + pair,
                order=order,
                registration_hash=registration.registration_hash,
                fingerprint=registration.fingerprint,
            )
            follow = configs[arm].follow
            waits_for = None if follow is None else f"{follow}-{pair:03d}"
            trials.append(Planned(spec, configs[arm], waits_for, is_timed))
    return trials


def record_path(folder: Path, trial_id: str) -> Path:
    """Where a trial's record lies."""
    return folder / "trials" / f"{trial_id}.json"


def checkpoint_path(folder: Path, trial_id: str) -> Path:
    """Where a trial that runs keeps its checkpoint."""
    return folder / "checkpoints" / trial_id


def read_record(folder: Path, trial_id: str) -> TrialRecord:
    """The record of a finished trial.

    Raises:
        OSError: If it is not there.
        EvidenceError: If it is damaged.
    """
    remedy = "delete the file to run that trial again"
    return read_json(record_path(folder, trial_id), TrialRecord, remedy=remedy)
