"""Configuration of an arena: methods against each other over tasks, each task a sweep.

A task names a sweep file, which stays the one home of the task's settings. A method is an arm of
that sweep, or one with some keys changed, under one name in every task.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from esper.config.base import Config, ConfigError, content_hash, validate
from esper.config.kinds import read_kind
from esper.config.sweep import Secondary, SweepConfig, TrackingConfig, load_sweep, merge


class Method(Config):
    """How a method is run in a task: an arm of the task's sweep, and what differs from it."""

    of: str | None = Field(
        None, description="Arm of the sweep; None: the one that is named as the method."
    )
    change: dict[str, Any] = Field(
        default_factory=dict, description="Keys of a run, merged into that arm."
    )
    requires: str | None = Field(
        None,
        description="Package that must be installed; without it the method stands as not "
        "applicable, with that reason.",
    )
    not_applicable: str | None = Field(
        None, min_length=1, description="Why it cannot be run; shown in place of its results."
    )

    @model_validator(mode="after")
    def _either(self) -> "Method":
        if self.not_applicable and (self.of or self.change or self.requires):
            raise ValueError(
                "not_applicable must stand alone, but other keys are given as well; remove either."
            )
        return self


class ArenaTask(Config):
    """A task: its sweep, and the methods that are run otherwise there than elsewhere."""

    sweep: Path = Field(description="Sweep file, relative to the arena's.")
    methods: dict[str, Method] = Field(
        default_factory=dict, description="In place of the arena's entry of the same name."
    )


class Scale(Config):
    """What a score of 0 and a score of 1 mean: means over the pairs of a task."""

    zero: str = Field("host", description="The method whose mean is 0.")
    one: tuple[str, ...] = Field(
        ("static-final",), min_length=1, description="The best of these is 1."
    )


class ArenaConfig(Config):
    """`esper arena CONFIG`: the file as written; `load_arena` makes the sweeps of it."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Of the arena; begins the name of its folder."
    )
    treatment: str = Field("esper", description="The method that all others are controls of.")
    methods: dict[str, Method] = Field(
        min_length=2, description="What is compared, by name; the treatment among them."
    )
    tasks: dict[str, ArenaTask] = Field(
        min_length=1, description="What they are compared on, by name."
    )
    pairs: int = Field(10, ge=2, le=64, description="Pairs of every task.")
    scale: Scale = Field(Scale(), description="How results of unlike tasks become one score.")
    mlflow: TrackingConfig = Field(
        TrackingConfig(experiment="arena"), description="Where MLflow keeps the runs."
    )
    output_dir: Path = Field(Path("runs"), description="Folder of records, verdicts and reports.")

    @model_validator(mode="after")
    def _names_exist(self) -> "ArenaConfig":
        where = {"treatment": [self.treatment], "scale": [self.scale.zero, *self.scale.one]}
        where |= {f"tasks.{name}.methods": list(t.methods) for name, t in self.tasks.items()}
        for place, names in where.items():
            for name in names:
                if name not in self.methods:
                    raise ValueError(
                        f"{place} must name methods of this arena ({', '.join(self.methods)}), "
                        f"but got '{name}'; correct the name."
                    )
        return self


@dataclass(frozen=True)
class Arena:
    """An arena that can be run.

    Attributes:
        config: The file.
        sweeps: One a task; its arms are the methods that apply there.
        absent: By task, the methods that do not apply, each with the reason.
    """

    config: ArenaConfig
    sweeps: Mapping[str, SweepConfig]
    absent: Mapping[str, Mapping[str, str]]

    @property
    def controls(self) -> tuple[str, ...]:
        """All methods but the treatment."""
        return tuple(m for m in self.config.methods if m != self.config.treatment)

    @property
    def config_hash(self) -> str:
        """sha256 of everything that decides the results, that of every sweep included."""
        config = self.config
        content = {
            "name": config.name,
            "treatment": config.treatment,
            "methods": list(config.methods),
            "scale": config.scale.model_dump(mode="json"),
            "sweeps": {task: sweep.config_hash for task, sweep in self.sweeps.items()},
            "absent": {task: dict(absent) for task, absent in self.absent.items()},
        }
        return content_hash(content)

    def only(self, tasks: Sequence[str]) -> "Arena":
        """Some of its tasks, which is another question; trials that ran before count.

        Raises:
            ConfigError: If it has no such task.
        """
        if unknown := [task for task in tasks if task not in self.sweeps]:
            raise ConfigError("--task", (
                f"it must be one of {', '.join(self.sweeps)}, but got '{unknown[0]}'.",
            ))  # fmt: skip
        kept = {t: task for t, task in self.config.tasks.items() if t in tasks}
        config = self.config.model_copy(update={"tasks": kept})
        sweeps = {t: self.sweeps[t] for t in kept}
        return Arena(config, sweeps, {t: self.absent[t] for t in kept})

    def with_pairs(self, pairs: int) -> "Arena":
        """The same with another number of pairs, which is another question.

        Raises:
            ConfigError: If that number is not allowed.
        """
        data = self.config.model_dump() | {"pairs": pairs}
        config = validate(ArenaConfig, data, source="--pairs")
        sweeps = {t: s.model_copy(update={"pairs": pairs}) for t, s in self.sweeps.items()}
        return dataclasses.replace(self, config=config, sweeps=sweeps)


def load_arena(path: Path) -> Arena:
    """Read an arena and the sweeps it names, and check every arm of every task.

    Raises:
        ConfigError: With every problem of one file, one task or one arm.
    """
    config = validate(ArenaConfig, read_kind(path, "arena"), source=str(path))
    sweeps, absent = {}, {}
    for task in config.tasks:
        base = load_sweep(path.parent / config.tasks[task].sweep)
        try:
            sweeps[task], absent[task] = _sweep_of(config, task, base)
        except ConfigError as error:
            raise ConfigError(f"{path}, task '{task}'", error.problems) from None
    return Arena(config, sweeps, absent)


def _sweep_of(
    config: ArenaConfig, task: str, base: SweepConfig
) -> tuple[SweepConfig, dict[str, str]]:
    """The task's own sweep with the arena's methods for arms, and what does not apply."""
    arms: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    for name in config.methods:
        method = config.tasks[task].methods.get(name, config.methods[name])
        reason = _absence(method)
        if reason is None:
            arms[name] = merge(_arm_of(base, task, name, method), method.change)
        else:
            absent[name] = reason
    for name in (config.treatment, config.scale.zero):
        if name in absent:
            raise ConfigError(task, (
                f"tasks.{task} must run '{name}', which everything is compared with, "
                f"but it does not apply: {absent[name]}.",
            ))  # fmt: skip
    if not set(config.scale.one) & set(arms):
        raise ConfigError(task, (
            f"tasks.{task} must run one of scale.one ({', '.join(config.scale.one)}), "
            "but none applies; name another method there.",
        ))  # fmt: skip
    first, *others = (a for a in arms if a != config.treatment)
    comparisons = tuple(Secondary(treatment=config.treatment, control=a) for a in others)
    question = base.question.model_copy(
        update={"treatment": config.treatment, "control": first, "secondary": comparisons}
    )
    data = base.model_dump() | {
        "name": f"{config.name}-{task}",
        "arms": arms,
        "searches": {},
        "pairs": config.pairs,
        "question": question.model_dump(),
        "mlflow": config.mlflow.model_dump(),
        "output_dir": config.output_dir,
    }
    sweep = validate(SweepConfig, data, source=f"task '{task}'", at=f"tasks.{task}")
    _require_equal_steps(sweep)
    return sweep, absent


def _absence(method: Method) -> str | None:
    """Why the method cannot be run here, if it cannot."""
    if method.requires is not None and find_spec(method.requires) is None:
        return f"the package '{method.requires}' is not installed"
    return method.not_applicable


def _arm_of(base: SweepConfig, task: str, name: str, method: Method) -> dict[str, Any]:
    arm = method.of or name
    if arm not in base.arms:
        raise ConfigError(task, (
            f"tasks.{task}: method '{name}' must start from an arm of {base.name} "
            f"({', '.join(base.arms)}), but got '{arm}'; name one in `of`, or say under "
            "`not_applicable` why the method cannot be run.",
        ))  # fmt: skip
    return base.arms[arm]


def _require_equal_steps(sweep: SweepConfig) -> None:
    """Every arm is a valid run, of as many steps as the others."""
    steps = {arm: sweep.run_config(arm).train.steps for arm in sweep.arms}
    if len(set(steps.values())) > 1:
        shown = ", ".join(f"{arm} {n}" for arm, n in steps.items())
        raise ConfigError(sweep.name, (
            f"train.steps must be equal for all methods of a task, but got {shown}; set it once, "
            "under the sweep's `run`.",
        ))  # fmt: skip
