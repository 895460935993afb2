"""Feature flags as a file describes them, and what makes a file wrong.

A flag is on or off for one model at a time; off is always the path that was there before. How a
flag is answered is in `esper.release.snapshot`, how a file is changed in `esper.release.change`.
"""

from collections.abc import Mapping
from datetime import date
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from esper.config.base import Config, ConfigError, read_yaml, validate
from esper.release.errors import UnknownFlagError, nearest

FULL_BP = 10_000
VARIABLE_PREFIX = "ESPER_FLAG_"
ENVIRONMENT_VARIABLE = "ESPER_ENVIRONMENT"

Name = Annotated[
    str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*$", max_length=100)
]
# a model, an owner, a salt: anything that can be seen
Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000, pattern=r"\S")]
Attribute = str | int | bool


class Rule(Config):
    """On or off for the models whose attributes all are among the given values."""

    when: Annotated[
        dict[Text, Annotated[tuple[Attribute, ...], Field(min_length=1)]], Field(min_length=1)
    ] = Field(description="Attribute to the values it may have: `device: [cuda]`.")
    serve: bool = Field(description="The answer where the rule fits.")


class Flag(Config):
    """One flag. The fields that decide are listed in the order in which they are asked."""

    description: Text = Field(description="What the flag switches, for people.")
    owner: Text = Field(description="Who acts when it expires.")
    expires: date = Field(description="Day after which the flag should be gone from the code.")
    environments: dict[Text, bool] = Field(
        default_factory=dict, description="Answer for a whole environment, whatever else is said."
    )
    killed: bool = Field(False, description="Kill switch: off for every model.")
    blocked: tuple[Text, ...] = Field((), description="Models for which it is off.")
    prerequisites: tuple[Name, ...] = Field(
        (), description="Flags that must be on for the same model, or this one is off."
    )
    allowed: tuple[Text, ...] = Field((), description="Models for which it is on.")
    rules: tuple[Rule, ...] = Field((), description="The first that fits decides.")
    rollout_bp: int | None = Field(
        None,
        ge=0,
        le=FULL_BP,
        description="Share of models for which it is on, in basis points (500 is 5 %).",
    )
    salt: Text | None = Field(None, description="Of the buckets; None: the flag's name.")
    default: bool = Field(False, description="Global on or off, where nothing else decides.")

    @model_validator(mode="after")
    def _one_answer(self) -> "Flag":
        both = sorted({*self.allowed} & {*self.blocked})
        if both:
            raise ValueError(f"a model must be allowed or blocked, but '{both[0]}' is both.")
        if self.rollout_bp is not None and self.default:
            raise ValueError(
                "default must be false beside rollout_bp, but is true: models outside the share "
                "would be on too; remove one of them."
            )
        return self


class FlagFile(Config):
    """All flags, and the names of the environments they may speak of."""

    version: Literal[1] = Field(description="Of the file's format.")
    environments: tuple[Text, ...] = Field(
        (), description="Names that a flag's `environments` may use."
    )
    flags: dict[Name, Flag] = Field(description="The flags by name.")

    @model_validator(mode="after")
    def _known_names(self) -> "FlagFile":
        variables: dict[str, str] = {}
        for name, flag in self.flags.items():
            for needed in flag.prerequisites:
                if needed not in self.flags:
                    raise ValueError(
                        f"prerequisites of {name} must be flags, but got '{needed}'; "
                        f"{nearest(needed, self.flags)}"
                    )
            for environment in flag.environments:
                _require_environment(self, environment, f"environments of {name}")
            other = variables.setdefault(variable_of(name), name)
            if other != name:
                raise ValueError(
                    f"flags must have variables of their own, but {other} and {name} share "
                    f"{variable_of(name)}; rename one."
                )
        return self

    @model_validator(mode="after")
    def _no_cycle(self) -> "FlagFile":
        try:
            TopologicalSorter({n: f.prerequisites for n, f in self.flags.items()}).prepare()
        except CycleError as error:
            # graphlib names a flag after what needs it
            path = " needs ".join(reversed(error.args[1]))
            raise ValueError(
                f"prerequisites must not run in a circle, but {path}; remove one of them."
            ) from None
        return self

    def flag(self, name: str) -> Flag:
        """The flag of that name.

        Raises:
            UnknownFlagError: If there is none.
        """
        if name not in self.flags:
            raise UnknownFlagError(name, self.flags)
        return self.flags[name]

    def expired(self, today: date) -> list[str]:
        """Names of the flags whose day has passed."""
        return [name for name, flag in self.flags.items() if flag.expires < today]


def load_flags(path: Path) -> FlagFile:
    """Read and check a file of flags.

    Raises:
        ConfigError: With every problem of the file.
    """
    return validate(FlagFile, read_yaml(path), source=str(path))


def variable_of(name: str) -> str:
    """The environment variable that decides a flag for one process."""
    return VARIABLE_PREFIX + name.replace(".", "_").upper()


def overrides_of(file: FlagFile, environ: Mapping[str, str]) -> dict[str, bool]:
    """Flags that a process's variables decide, such as `ESPER_FLAG_KASMINA_TRITON=off`.

    Raises:
        ConfigError: If a variable names no flag, or its value is neither on nor off.
    """
    flags = {variable_of(name): name for name in file.flags}
    values = {"on": True, "off": False}
    problems, overrides = [], {}
    for variable in sorted(v for v in environ if v.startswith(VARIABLE_PREFIX)):
        value = environ[variable].strip().lower()
        if variable not in flags:
            problems.append(f"{variable} must name a flag; {nearest(variable, flags)}")
        elif value not in values:
            problems.append(f"{variable} must be on or off, but got '{environ[variable]}'.")
        else:
            overrides[flags[variable]] = values[value]
    if problems:
        raise ConfigError("the process's environment", tuple(problems))
    return overrides


def environment_of(file: FlagFile, environ: Mapping[str, str]) -> str | None:
    """The environment that `ESPER_ENVIRONMENT` names, None if it is not set.

    Raises:
        ConfigError: If the file knows no such environment.
    """
    name = environ.get(ENVIRONMENT_VARIABLE)
    if name is not None:
        try:
            _require_environment(file, name, ENVIRONMENT_VARIABLE)
        except ValueError as error:
            raise ConfigError("the process's environment", (str(error),)) from None
    return name


def _require_environment(file: FlagFile, name: str, what: str) -> None:
    if name not in file.environments:
        raise ValueError(
            f"{what} must be among the file's environments, but got '{name}'; "
            f"{nearest(name, file.environments)}"
        )
