"""The phases of the migration: what each must reach, how it is rolled out, and who answers for it.

Everything that a phase demands is an assertion on a measured quantity, with its unit, so that
nothing can be called done by opinion: `esper gate` evaluates targets and gates, `esper rollout`
evaluates alerts and guards on every interval.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from esper.config.base import Config, ConfigError, read_yaml, validate
from esper.evidence.records import Record
from esper.release.errors import ReleaseError, nearest
from esper.release.flags import FULL_BP, FlagFile, Name, Text, load_flags

PHASES = (
    "foundation",
    "logical_physical_separation",
    "extended_lifecycle",
    "performance",
    "bus_and_control",
    "advanced_features",
)
MAX_CANARY_BP = 500
COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}


class Quantity(Record):
    """A measured number and its unit."""

    value: float
    unit: str


class Assertion(Config):
    """`metric` compared with `value`, in `unit`."""

    metric: Text = Field(description="Name of the quantity in the evidence.")
    comparison: Literal["<", "<=", ">", ">=", "=="] = Field(
        description="How the quantity must compare with `value`."
    )
    value: float = Field(description="What it is compared with.")
    unit: Text = Field(
        description="Unit that the quantity must have; in another it counts as not measured."
    )

    def __str__(self) -> str:
        return f"{self.metric} {self.comparison} {self.value:g} {self.unit}"


class Alert(Assertion):
    """A quantity of a running rollout that must not be so; its assertion is the alarm."""

    name: Name = Field(description="Name of the alert.")
    on_firing: Literal["rollback", "hold"] = Field(
        description="What the judge decides when it fires."
    )
    owner: Text = Field(description="Who is called.")


class Guard(Config):
    """A metric that is measured in pairs, new against old, and how much worse it may get."""

    metric: Text = Field(description="Name of the measured pairs in the evidence.")
    unit: Text = Field(description="Unit of the measured values.")
    compare: Literal["ratio", "difference"] = Field(
        description="ratio: logarithm of new over old; difference: new minus old."
    )
    worse: Literal["higher", "lower"] = Field(description="Which direction is harm.")
    margin: PositiveFloat = Field(
        description="What is tolerated: a fraction of the old value for a ratio, else in `unit`."
    )
    fault: PositiveFloat = Field(
        description="What must be rolled back within one interval; in the terms of `margin`."
    )
    pair_sd: PositiveFloat = Field(
        description="Standard deviation between pairs that is planned for; in the same terms."
    )

    @model_validator(mode="after")
    def _fault_beyond_margin(self) -> "Guard":
        if self.fault <= self.margin:
            raise ValueError(
                f"fault must be beyond the margin ({self.margin:g}), but got {self.fault:g}."
            )
        if self.compare == "ratio" and self.worse == "lower" and self.fault >= 1:
            raise ValueError(f"fault must be below 1 for a ratio that falls, but got {self.fault}.")
        return self

    def scaled(self, amount: float) -> float:
        """An amount in the terms in which pairs are compared, positive where it is worse."""
        if self.compare == "difference":
            return amount
        return math.log1p(amount) if self.worse == "higher" else -math.log1p(-amount)


class Policy(Config):
    """What the judge needs to know besides the evidence."""

    guards: Annotated[tuple[Guard, ...], Field(min_length=1)] = Field(
        description="Metrics that must not get worse."
    )
    alpha_rollback: float = Field(
        gt=0,
        le=0.05,
        description="Chance that a rollout at the margin of a guard is ever rolled back.",
    )
    alpha_advance: float = Field(
        gt=0, le=0.05, description="Chance that a guard beyond its margin passes an interval."
    )
    planned_intervals: PositiveInt = Field(
        description="Intervals of a whole rollout among which alpha_rollback is shared."
    )
    min_pairs: int = Field(ge=8, description="Pairs without which an interval decides nothing.")
    max_age_s: PositiveFloat = Field(
        description="Time since the last pair after which evidence says nothing of the present."
    )
    max_gate_age_s: PositiveFloat = Field(
        description="The same for what targets and gates are held against."
    )

    @model_validator(mode="after")
    def _metrics_once(self) -> "Policy":
        names = [g.metric for g in self.guards]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise ValueError(f"a metric must have one guard, but '{twice}' has more.")
        return self


class Rollout(Config):
    """Which flag is ramped up, and by which shares."""

    flag: Name = Field(description="The flag that is ramped up.")
    steps_bp: Annotated[tuple[int, ...], Field(min_length=2)] = Field(
        description="Shares of models in basis points: a canary of at most 5 %, up to 100 %."
    )

    @model_validator(mode="after")
    def _a_ramp(self) -> "Rollout":
        steps = self.steps_bp
        if not 0 < steps[0] <= MAX_CANARY_BP:
            raise ValueError(
                f"steps_bp must begin with a canary of 1 to {MAX_CANARY_BP}, but got {steps[0]}."
            )
        if steps[-1] != FULL_BP or any(a >= b for a, b in pairwise(steps)):
            raise ValueError(f"steps_bp must rise to {FULL_BP}, but got {list(steps)}.")
        return self


class Phase(Config):
    """One phase."""

    number: int = Field(description="From 0 on.")
    name: Text = Field(description="A fixed name for each number.")
    goal: Text = Field(description="What is better when it is done, for people.")
    owners: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        description="Who decides and who is called."
    )
    targets: Annotated[tuple[Assertion, ...], Field(min_length=1)] = Field(
        description="What the phase is for."
    )
    gates: Annotated[tuple[Assertion, ...], Field(min_length=1)] = Field(
        description="What must hold besides, before any model is given the new path."
    )
    rollout: Rollout = Field(description="Its flag and the shares.")
    alerts: Annotated[tuple[Alert, ...], Field(min_length=1)] = Field(
        description="What stops the rollout while it runs."
    )


class PhaseFile(Config):
    """All phases, in order."""

    version: Literal[1] = Field(description="Of the file's format.")
    phases: tuple[Phase, ...] = Field(description="All phases, from 0 on.")

    @model_validator(mode="after")
    def _all_in_order(self) -> "PhaseFile":
        got = [(p.number, p.name) for p in self.phases]
        wanted = list(enumerate(PHASES))
        if got != wanted:
            raise ValueError(f"phases must be {wanted}, but got {got}; add or rename them.")
        return self

    def phase(self, number: int) -> Phase:
        """The phase of that number.

        Raises:
            ReleaseError: If there is none.
        """
        if not 0 <= number < len(self.phases):
            raise ReleaseError(f"phase must be 0 to {len(self.phases) - 1}, but got {number}.")
        return self.phases[number]


class Migration(Config):
    """The migration's settings; paths are relative to the file that holds them."""

    version: Literal[1] = Field(description="Of the file's format.")
    flags: Path = Field(description="The file of flags.")
    phases: Path = Field(description="The file of phases.")
    policy: Policy = Field(description="How a rollout is judged.")


class Plan(NamedTuple):
    """Everything that rules the migration, read and checked together."""

    migration: Migration
    phases: PhaseFile
    flags_path: Path
    flags: FlagFile


def load_phases(path: Path) -> PhaseFile:
    """Read the phases alone.

    Raises:
        ConfigError: With every problem of the file.
    """
    return validate(PhaseFile, read_yaml(path), source=str(path))


def load_migration(path: Path) -> Plan:
    """Read the migration with its phases and flags.

    Raises:
        ConfigError: If one of the files is wrong, or a phase ramps up a flag that is not there.
    """
    migration = validate(Migration, read_yaml(path), source=str(path))
    phases_path, flags_path = path.parent / migration.phases, path.parent / migration.flags
    phases, flags = load_phases(phases_path), load_flags(flags_path)
    unknown = [
        f"phases.{p.number}.rollout.flag must be a flag of {flags_path}, "
        f"but got '{p.rollout.flag}'; {nearest(p.rollout.flag, flags.flags)}"
        for p in phases.phases
        if p.rollout.flag not in flags.flags
    ]
    if unknown:
        raise ConfigError(str(phases_path), tuple(unknown))
    return Plan(migration, phases, flags_path, flags)


class Checked(NamedTuple):
    """One assertion and what came of it; `measured` is None where there is nothing to compare."""

    assertion: Assertion
    measured: float | None
    holds: bool | None
    why: str


def check(assertions: Sequence[Assertion], measured: Mapping[str, Quantity]) -> list[Checked]:
    """Compare what was measured with what is asserted.

    Returns:
        One result each; `holds` is None if the quantity is missing, has another unit or is no
        number. Neither true nor false then: it was not measured.
    """
    return [_checked(assertion, measured.get(assertion.metric)) for assertion in assertions]


def _checked(assertion: Assertion, quantity: Quantity | None) -> Checked:
    if quantity is None:
        return Checked(assertion, None, None, f"{assertion}: not measured")
    if quantity.unit != assertion.unit:
        why = f"{assertion}: measured in {quantity.unit}"
        return Checked(assertion, None, None, why)
    if not math.isfinite(quantity.value):
        return Checked(assertion, None, None, f"{assertion}: measured as {quantity.value}")
    holds = bool(COMPARISONS[assertion.comparison](quantity.value, assertion.value))
    why = f"{assertion}: {'yes' if holds else 'no'}, {quantity.value:g} {quantity.unit}"
    return Checked(assertion, quantity.value, holds, why)
