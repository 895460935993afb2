"""Settings and bodies as tables: every field of a pydantic model, as a reader of YAML knows it."""

import json
import re
from collections.abc import Iterable, Iterator
from inspect import getdoc
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def section(model: type[BaseModel], level: int = 4) -> list[str]:
    """Heading, summary and table of a model, as lines of Markdown."""
    anchor = f"{{#{_anchor(model)}}}"
    return [f"{'#' * level} `{model.__name__}` {anchor}", "", summary(model), "",
            *table(model), ""]  # fmt: skip


def table(model: type[BaseModel]) -> list[str]:
    """Key, type, default and meaning of every field.

    Raises:
        ValueError: If a field has no description.
    """
    if not model.model_fields:
        return ["No options."]
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if not field.description:
            raise ValueError(
                f"{model.__module__}.{model.__name__}.{name} must have a description, but has "
                "none; add Field(description=...)."
            )
        required = field.is_required()
        key = f"`{name}`{' *' if required else ''}"
        default = "" if required else f"`{_cell(_default(field))}`"
        kind = _bounded(_type(field.annotation), field.metadata)
        lines.append(f"| {key} | {kind} | {default} | {_meaning(field.description)} |")
    return lines


def _default(field: Any) -> str:
    missing = field.default is PydanticUndefined
    value = field.default_factory() if missing else field.default
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True) or "{}"
    if isinstance(value, dict):
        value = {k: v.model_dump(exclude_defaults=True) if isinstance(v, BaseModel) else v
                 for k, v in value.items()}  # fmt: skip
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return json.dumps([str(v) if not isinstance(v, str | int | float) else v for v in value])
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _bounded(kind: str, metadata: Iterable[Any]) -> str:
    """A type with the bounds of its numbers or lengths, as people write them."""
    what = "characters" if kind.startswith("text") else "items"
    told = {
        "gt": "> {:,}", "ge": "≥ {:,}", "lt": "< {:,}", "le": "≤ {:,}",
        "min_length": f"at least {{:,}} {what}", "max_length": f"at most {{:,}} {what}",
    }  # fmt: skip
    found = [
        text.format(value)
        for m in metadata
        for name, text in told.items()
        if (value := getattr(m, name, None)) is not None
    ]
    first = " " if found and found[0][0] in "<>≤≥" else ", "
    return kind + first + ", ".join(found) if found else kind


def _type(kind: Any) -> str:
    """A type as a reader of YAML knows it; models are links to their keys."""
    origin, inside = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"[{kind.__name__}](#{_anchor(kind)})"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join("null" if a is type(None) else _type(a) for a in inside)
    if hasattr(kind, "__metadata__"):
        return _bounded(_type(kind.__origin__), kind.__metadata__)
    if origin in (tuple, list, frozenset):
        item = [a for a in inside if a is not Ellipsis]
        if origin is tuple and Ellipsis not in inside:
            return "[" + ", ".join(map(_type, item)) + "]"
        return f"list of {_type(item[0])}"
    if origin is dict or (origin is not None and issubclass(origin, dict)):
        return f"map of {_type(inside[0])} to {_type(inside[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything",
             Path: "path"}  # fmt: skip
    return names.get(kind) or getattr(kind, "__name__", str(kind))


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from _models_in(inner)


def models_inside(models: Iterable[type[BaseModel]]) -> list[type[BaseModel]]:
    """Models that the fields of others hold, each once, in the order in which they are met."""
    met: list[type[BaseModel]] = []
    waiting = list(models)
    while waiting:
        model = waiting.pop(0)
        found = [m for f in model.model_fields.values() for m in _models_in(f.annotation)]
        new = [m for m in dict.fromkeys(found) if m not in met]
        met += new
        waiting += new
    return met


def _anchor(model: type[BaseModel]) -> str:
    return model.__name__.lower()


def summary(thing: Any) -> str:
    """First paragraph of a docstring, in one line.

    Raises:
        ValueError: If there is none.
    """
    text = getdoc(thing)
    if not text:
        raise ValueError(f"{thing!r} must have a docstring, but has none; write one.")
    return _cell(text.split("\n\n")[0])


def _meaning(description: str) -> str:
    """A description as a reader of YAML needs it."""
    return re.sub(r"\bNone\b", "null", _cell(description))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
