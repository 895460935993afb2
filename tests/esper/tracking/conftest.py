"""A synthetic sweep as a real one leaves it: five arms, paired seeds, growth logs."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from esper.config.sweep import Question, Secondary
from esper.evidence.records import (
    Fingerprint,
    Registration,
    TransitionRecord,
    TrialRecord,
)
from esper.evidence.verdict import Verdict, judge_all

FOLLOWERS = frozenset({"static-final", "random", "schedule"})
ARMS = ("host", "static-final", "random", "schedule", "esper")
CEILING = {"host": 0.80, "static-final": 0.978, "random": 0.93, "schedule": 0.965, "esper": 0.996}
STARTED = datetime(2026, 11, 22, 9, 0, tzinfo=UTC)
FINGERPRINT = Fingerprint(
    code_hash="c0de" * 16, commit="abc1234", versions={"torch": "2.13.0"}, device="test CPU"
)
QUESTION = Question(
    treatment="esper",
    control="static-final",
    metric="test_accuracy",
    margin=0.01,
    secondary=tuple(
        Secondary(treatment="esper", control=arm) for arm in ("random", "schedule", "host")
    ),
)
LIFE = ("TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED")


def register(pairs: int = 8) -> Registration:
    draft = Registration(
        sweep="spirals",
        config_hash="c0ffee" * 10,
        question=QUESTION,
        pairs=pairs,
        arms=list(ARMS),
        fingerprint=FINGERPRINT,
        registered_at=STARTED - timedelta(minutes=1),
        registration_hash="",
    )
    return draft.model_copy(update={"registration_hash": draft.digest()})


def transition(
    step: int, seed: int, before: str, after: str, site: str = "fc1"
) -> TransitionRecord:
    return TransitionRecord(
        interval=step // 100 - 1,
        step=step,
        site=site,
        seed=seed,
        action="Advance",
        before=before,
        after=after,
        blueprint="relu",
        reason="ready",
    )


def growth_log(rng: np.random.Generator, num_seeds: int, sites: int = 2) -> list[TransitionRecord]:
    """A few seeds wake each fifth interval; most fossilise, some are culled."""
    log = []
    for wave in range(4):
        for number in range(2 if wave % 2 else 1):
            step, before = 500 * (wave + 1), "DORMANT"
            seed, site = (wave * 7 + number * 3) % num_seeds, f"fc{1 + wave % sites}"
            culled = rng.random() < 0.25
            for after in ("GERMINATED", *(("TRAINING", "GRAFTING", "CULLED") if culled else LIFE)):
                if step > 3000:
                    break
                log.append(transition(step, seed, before, after, site))
                before, step = after, step + 100 * int(rng.integers(1, 5))
    return sorted(log, key=lambda t: t.step)


def trial(
    arm: str, pair: int, *, num_intervals: int = 30, num_seeds: int = 32, collapsed: bool = False
) -> TrialRecord:
    rng = np.random.default_rng(1000 * pair + ARMS.index(arm) if arm in ARMS else pair)
    grows = arm in ("random", "schedule", "esper")
    log = growth_log(rng, num_seeds) if grows else []
    steps = 100 * np.arange(1, num_intervals + 1)
    woken = np.array([sum(t.step <= s and t.after == "GERMINATED" for t in log) for s in steps])
    parameters = (354 if arm == "static-final" else 74) + 46 * woken
    ceiling = CEILING.get(arm, 0.9) - abs(rng.normal(0, 0.012))
    rate = 700 if not grows else 900
    noise = rng.normal(0, 0.004, len(steps))
    accuracy = 0.5 + (ceiling - 0.5) * (1 - np.exp(-steps / rate)) + noise
    loss = 0.02 + 0.7 * np.exp(-steps / rate) * np.exp(rng.normal(0, 0.05, len(steps)))
    if collapsed:
        loss[-3:] = np.nan
    final = float("nan") if collapsed else float(accuracy[-1])
    curves = {
        "step": steps,
        "train_loss": loss,
        "test_accuracy": np.minimum(accuracy, 1.0),
        "parameters": parameters,
        "awake_seeds": woken,
        "drift_frac": 0.1 * loss,
        "grad_norm": 3 * loss,
        "learning_rate": np.full(len(steps), 0.01),
        "throughput_steps_per_s": rng.normal(800, 20, len(steps)),
        "bottleneck": loss**2,
        "alpha_mean": woken / 8,
    }
    started = STARTED + timedelta(minutes=pair)
    return TrialRecord(
        trial_id=f"{arm}-{pair:03d}",
        arm=arm,
        pair=pair,
        seed=pair,
        order=(pair + ARMS.index(arm)) % len(ARMS) if arm in ARMS else 0,
        registration_hash=register().registration_hash,
        fingerprint=FINGERPRINT,
        started_at=started,
        ended_at=started + timedelta(seconds=40),
        status="collapsed" if collapsed else "finished",
        collapse_reason="train_loss is NaN at step 2800" if collapsed else None,
        metrics={
            "test_accuracy": final,
            "test_loss": final,
            "parameters": float(parameters[-1]),
            "steps": 3000.0,
            "train_flops": 4.4e9,
            "train_seconds": 40.0,
        },
        curves={name: [float(v) for v in values] for name, values in curves.items()},
        transitions=log,
        sites={"fc1": num_seeds, "fc2": num_seeds},
    )


@pytest.fixture
def make_trial() -> Callable[..., TrialRecord]:
    return trial


@pytest.fixture(scope="session")
def registration() -> Registration:
    return register()


@pytest.fixture(scope="session")
def sweep_records() -> list[TrialRecord]:
    """Five arms of eight pairs; one random-growth trial collapsed."""
    return [
        trial(arm, pair, collapsed=(arm, pair) == ("random", 3))
        for arm in ARMS
        for pair in range(8)
    ]


@pytest.fixture(scope="session")
def verdicts(sweep_records: list[TrialRecord], registration: Registration) -> list[Verdict]:
    """esper against static-final, then against random, schedule and host."""
    return judge_all(sweep_records, registration, FOLLOWERS)
