"""The base of every configuration model, and errors that say where, what rule and what instead."""

import hashlib
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

M = TypeVar("M", bound=BaseModel)


def content_hash(content: Mapping[str, Any]) -> str:
    """sha256 of plain data as JSON: of a configuration as it is, or as it was stored."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Config(BaseModel):
    """A frozen model that refuses unknown keys and never guesses a type."""

    # pydantic's own strict mode would refuse YAML's lists for tuples and its texts for paths
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _same_kind(cls, value: Any, build: ValidatorFunctionWrapHandler) -> Any:
        result = build(value)
        if result is value:
            return result
        rule = _guessed(value, result)
        if rule is not None:
            raise PydanticCustomError("guessed", "Input should be {rule}", {"rule": rule})
        return result

    @model_validator(mode="wrap")
    @classmethod
    def _known_keys(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        """Say of an unknown key which it may have been, in Python as in a file."""
        try:
            return build(data)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            if not any(_is_unknown(p) for p in problems):
                raise
            told = [_told(p, tuple(cls.model_fields)) for p in problems]
            raise ValidationError.from_exception_data(error.title, told) from None


def _is_unknown(problem: ErrorDetails) -> bool:
    """Whether it is a key of the model itself; those inside others were told by these."""
    return problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1


def _told(problem: ErrorDetails, known: tuple[str, ...]) -> InitErrorDetails:
    """A problem as it is raised again, with the nearest of the known keys in place of one unknown.

    Kinds that pydantic does not know bring their own message.
    """
    kind: str | PydanticCustomError = problem["type"]
    if _is_unknown(problem):
        name = str(problem["loc"][0])
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}."
        rule = f"must be a known key, but got '{name}'; {hint}"
        kind = PydanticCustomError("unknown_key", "{rule}", {"rule": rule})
    elif kind in ("unknown_key", "guessed"):
        kind = PydanticCustomError(problem["type"], "{told}", {"told": problem["msg"]})
    return InitErrorDetails(
        type=kind, loc=problem["loc"], input=problem["input"], ctx=problem.get("ctx", {})
    )


def _guessed(value: Any, result: Any) -> str | None:
    """What `value` should have been, if `result` was made by reading it as another type."""
    if isinstance(result, tuple) and isinstance(value, list | tuple):
        rules = (_guessed(v, r) for v, r in zip(value, result, strict=True))
        rule = next(filter(None, rules), None)
        return rule and f"a list whose every item is {rule}"
    if not isinstance(result, bool | int | float):
        return None
    if isinstance(value, str) or isinstance(value, bool) != isinstance(result, bool):
        return "true or false" if isinstance(result, bool) else "a number without quotes"
    return None


class ConfigError(ValueError):
    """One or more wrong keys, types or values; `str()` lists each with its path and rule."""

    def __init__(self, source: str, problems: tuple[str, ...]) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(source, problems)
        self.source, self.problems = source, problems

    def __str__(self) -> str:
        return f"{self.source} is not valid:\n" + "\n".join(f"  {p}" for p in self.problems)


def validate(model: type[M], data: object, *, source: str, at: str = "") -> M:
    """Build `model` from plain data.

    Args:
        model: The pydantic model to build.
        data: Parsed YAML or JSON.
        source: What the data came from, for the error (a file path).
        at: Dotted path of `data` inside the source.

    Raises:
        ConfigError: With one line a problem: path, rule, value and the nearest valid name.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(source, explain(error, at=at)) from None


def explain(error: ValidationError, *, at: str = "") -> tuple[str, ...]:
    """One line a problem of `error`: `path must rule, but got value; what to do`."""
    return tuple(_line(dict(problem), at) for problem in error.errors())


def _line(problem: dict[str, Any], at: str) -> str:
    loc = [str(part) for part in problem["loc"]]
    path = ".".join(part for part in (at, *loc) if part) or "(top level)"
    match problem["type"]:
        case "unknown_key":
            return f"{path} {problem['msg']}"
        case "extra_forbidden":
            return f"{path} must be a known key, but got '{loc[-1]}'; remove it."
        case "missing":
            return f"{path} must be given, but is missing; add it."
        case "value_error":
            return f"{path}: {problem['ctx']['error']}"
        case _:
            rule = re.sub(r"^\w+ should ", "", problem["msg"])
            value = repr(problem["input"])
            shown = value if len(value) <= 60 else value[:57] + "..."
            return f"{path} must {rule}, but got {shown}."


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice; plain YAML keeps the last one silently."""


_MERGE = "tag:yaml.org,2002:merge"


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
    twice = next((k for k in keys if keys.count(k) > 1), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(
            None, None, f"key '{twice}' must be given once, but is given twice", node.start_mark
        )
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
# PyYAML takes 1e-3 for a text, unlike YAML 1.2: it wants the dot of 1.0e-3
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse one YAML file into a mapping.

    Raises:
        ConfigError: If the file is missing, is not YAML, or is not a mapping of keys.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(
            str(path), (f"the file must be readable, but: {error.strerror}.",)
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), (f"the file must be YAML, but: {error}",)) from None
    if not isinstance(data, Mapping):
        raise ConfigError(str(path), (f"the file must hold keys and values, but got {data!r}.",))
    return dict(data)
