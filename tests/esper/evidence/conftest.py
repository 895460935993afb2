"""Planted sweeps: records and a registration with known values in them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from esper.config.sweep import Guardrail, Question, Secondary
from esper.evidence.records import Fingerprint, Registration, TrialRecord
from esper.evidence.verdict import Verdict, judge_all

FINGERPRINT = Fingerprint(
    code_hash="c0de", commit="abc123", versions={"torch": "2.10"}, device="cpu"
)
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Sweep:
    """A planted sweep; `primary()` judges it."""

    records: list[TrialRecord]
    registration: Registration

    def primary(self, **options: Any) -> Verdict:
        return judge_all(self.records, self.registration, **options)[0]

    def change(self, trial_id: str, **update: Any) -> "Sweep":
        """The same sweep with some fields of one record replaced."""
        assert any(r.trial_id == trial_id for r in self.records)
        return replace(
            self,
            records=[
                r.model_copy(update=update) if r.trial_id == trial_id else r for r in self.records
            ],
        )

    def without(self, trial_id: str) -> "Sweep":
        assert any(r.trial_id == trial_id for r in self.records)
        return replace(self, records=[r for r in self.records if r.trial_id != trial_id])


def register(question: Question, pairs: int, arms: list[str]) -> Registration:
    draft = Registration(
        sweep="planted",
        config_hash="0" * 64,
        question=question,
        pairs=pairs,
        arms=arms,
        fingerprint=FINGERPRINT,
        registered_at=START,
        registration_hash="",
    )
    return draft.model_copy(update={"registration_hash": draft.digest()})


def plant(
    values: Mapping[str, Sequence[float]],
    *,
    guarded: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    guardrails: Sequence[Guardrail] = (),
    secondary: Sequence[tuple[str, str] | Secondary] = (),
    margin: float = 0.1,
    higher_is_better: bool = True,
    test: str = "sign_flip",
    looks: Sequence[int] = (),
) -> Sweep:
    """A healthy sweep whose first arm is the treatment and whose second is the control.

    Args:
        values: Of the metric 'score', one a pair for each arm; NaN is a collapsed run.
        guarded: Further metrics: metric -> arm -> one value a pair.
        guardrails: On those metrics.
        secondary: Pairs of arm names, or comparisons with a metric of their own.
        margin: Of equivalence.
        higher_is_better: Of the score.
        test: The registered test.
        looks: Numbers of pairs after which the sweep is judged.
    """
    arms = list(values)
    question = Question(
        treatment=arms[0],
        control=arms[1],
        metric="score",
        higher_is_better=higher_is_better,
        margin=margin,
        test=test,
        guardrails=tuple(guardrails),
        secondary=tuple(
            c if isinstance(c, Secondary) else Secondary(treatment=c[0], control=c[1])
            for c in secondary
        ),
        looks=tuple(looks),
    )
    pairs = len(values[arms[0]])
    registration = register(question, pairs, arms)
    records = [
        _record(registration, arm, place, pair, value, guarded or {})
        for place, arm in enumerate(arms)
        for pair, value in enumerate(values[arm])
    ]
    return Sweep(records, registration)


def _record(
    registration: Registration,
    arm: str,
    place: int,
    pair: int,
    value: float,
    guarded: Mapping[str, Mapping[str, Sequence[float]]],
) -> TrialRecord:
    num_arms = len(registration.arms)
    started = START + timedelta(seconds=1 + pair)
    metrics = {"score": value, "parameters": 100.0, "steps": 50.0, "train_seconds": 2.0}
    metrics |= {name: by_arm[arm][pair] for name, by_arm in guarded.items()}
    collapsed = not math.isfinite(value)
    return TrialRecord(
        trial_id=f"{arm}-{pair:03d}",
        arm=arm,
        pair=pair,
        seed=1000 + pair,
        order=(place + pair) % num_arms,
        registration_hash=registration.registration_hash,
        fingerprint=FINGERPRINT,
        started_at=started,
        ended_at=started + timedelta(seconds=2),
        status="collapsed" if collapsed else "finished",
        collapse_reason="the loss is NaN" if collapsed else None,
        metrics=metrics | {"train_flops": 1e6},
        curves={"step": [50.0]},
        reference_ms=10.0,
        transitions=[],
        sites={},
    )


@pytest.fixture(scope="session", name="plant")
def plant_fixture() -> Callable[..., Sweep]:
    return plant
