"""What training and Tamiyo's service say to each other: one form, shared by both sides.

A body is JSON or MessagePack. A column of telemetry holds one value a seed; where all seeds have
the same, that value alone is enough, so that a site of thousands of dormant seeds stays small. In
MessagePack a column is its little-endian bytes, and so it is in JSON as base64 if the sender likes.

Seeds' blueprints and graft strategies are indices into the sender's own registries; the names go
with them, and the receiver looks them up in its own.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, Self

import msgpack
import numpy as np
from numpy.typing import NDArray
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from esper.config.base import Config
from esper.config.run import GrowthConfig
from esper.controller.adaptations import Draw, FieldReport
from esper.registry import Registry, UnknownNameError
from esper.seeds.actions import Action
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.grafting import GRAFTS
from esper.seeds.report import Floats, Ints, Report, SiteReport
from esper.seeds.state import Stage
from esper.surgery.growth_log import pack_action, unpack_action

JSON, MSGPACK = "application/json", "application/msgpack"
DEADLINE_HEADER = "Esper-Deadline-Ms"
MAX_SEEDS = 4096
MAX_SITES = 1024

_INTS = {f.name for f in fields(SiteReport) if f.type is Ints}
_FLOATS = {f.name for f in fields(SiteReport) if f.type is Floats}
_COLUMNS = _FLOATS | _INTS

Column = Annotated[
    Any,
    WithJsonSchema({
        "anyOf": [
            {"type": ["number", "null"]},
            {"type": "array", "items": {"type": ["number", "null"]}, "maxItems": MAX_SEEDS},
            {"type": "string", "contentEncoding": "base64"},
        ],
        "description": "One value for all seeds, one for each (null: not measured), or little-"
        "endian float32 (int32 for stage, blueprint_id, epochs, graft_id) as base64.",
    }),
]  # fmt: skip
Name = Annotated[str, Field(min_length=1, max_length=200)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


# settings that were checked, by how they were written
_GROWTH: dict[str, GrowthConfig] = {}
_GROWTH_KEPT = 256


class WireError(ValueError):
    """A body that cannot be read; the message says what it must be."""


class SiteWire(Config):
    """Telemetry of one site; see `esper.seeds.report.SiteReport` for what the columns mean."""

    name: Name = Field(description="The site's name.")
    geometry: Literal["chunk", "span"] = Field(description="chunk or span.")
    seeds: int = Field(ge=1, le=MAX_SEEDS, description="Seeds of the site.")
    columns: dict[str, Column] = Field(
        description="Every column of the report: " + ", ".join(sorted(_COLUMNS)) + ".",
        json_schema_extra={"required": [*sorted(_COLUMNS)]},
    )
    seed_parameters: dict[str, NonNegativeInt] = Field(
        description="Parameters of one seed by blueprint, for those that fit the site."
    )
    unexplained: float | None = Field(description="None: not measured.")
    scored_blueprint: Name | None = Field(
        None, description="Blueprint that the bottleneck is of; None: not measured."
    )

    @field_validator("columns")
    @classmethod
    def _arrays(cls, columns: dict[str, Any], info: ValidationInfo) -> dict[str, NDArray[Any]]:
        if missing := sorted(_COLUMNS - set(columns)):
            raise ValueError(f"{missing[0]} must be given, but is missing; add the column.")
        if unknown := sorted(set(columns) - _COLUMNS):
            raise ValueError(
                f"a column must be one of {', '.join(sorted(_COLUMNS))}, but got "
                f"'{unknown[0][:60]}'; leave it out."
            )
        # without a number of seeds that field's error is enough
        seeds = info.data.get("seeds")
        return {} if seeds is None else {k: _column(k, v, seeds) for k, v in columns.items()}

    @classmethod
    def of(cls, site: SiteReport) -> "SiteWire":
        """The wire form of a site's telemetry."""
        return SiteWire.model_construct(
            name=site.name,
            geometry=site.geometry,
            seeds=len(site.stage),
            columns={name: getattr(site, name) for name in _COLUMNS},
            seed_parameters=dict(site.seed_parameters),
            unexplained=None if np.isnan(site.unexplained) else float(site.unexplained),
            scored_blueprint=site.scored_blueprint,
        )

    def dump(self, binary: bool) -> dict[str, Any]:
        """As plain values; each column as short as it can be told exactly."""
        columns = {k: _short(v, binary) for k, v in self.columns.items()}
        return {**self.model_dump(exclude={"columns"}), "columns": columns}

    def report(self) -> SiteReport:
        """The telemetry again."""
        unexplained = float("nan") if self.unexplained is None else self.unexplained
        return SiteReport(
            name=self.name,
            geometry=self.geometry,
            seed_parameters=self.seed_parameters,
            unexplained=unexplained,
            scored_blueprint=self.scored_blueprint,
            **self.columns,
        )


class ReportWire(Config):
    """One interval of one run; see `esper.seeds.report.Report`."""

    interval: PositiveInt = Field(description="Number of the interval, from 1.")
    step: NonNegativeInt = Field(description="Optimizer steps done.")
    loss: float | None = Field(description="Mean training loss of the interval; null: not finite.")
    held_out_loss: float | None = Field(description="Loss on held-out samples; null: not measured.")
    grad_norm: float | None = Field(description="Norm of the host's gradient; null: not measured.")
    host_drift_frac: float | None = Field(
        description="Relative change of the host's weights in the interval; null: not measured."
    )
    host_parameters: NonNegativeInt = Field(description="Parameters of the host.")
    parameters: NonNegativeInt = Field(description="Parameters of host and awake seeds.")
    growth: GrowthConfig = Field(description="The run's settings of growth.")
    blueprints: tuple[Name, ...] = Field(
        max_length=256, description="The sender's blueprints; blueprint_id counts in this list."
    )
    grafts: tuple[Name, ...] = Field(
        max_length=256, description="The sender's graft strategies, for graft_id."
    )
    sites: tuple[SiteWire, ...] = Field(max_length=MAX_SITES, description="Telemetry of each site.")
    affordable_parameters: NonNegativeInt | None = Field(
        None, description="Parameters that a budget of operations has room for; None: no budget."
    )

    @field_validator("growth", mode="wrap")
    @classmethod
    def _seen_before(cls, given: Any, build: ValidatorFunctionWrapHandler) -> GrowthConfig:
        """A run's reports have the same settings, and there are many of them to look at."""
        if not isinstance(given, dict):
            checked: GrowthConfig = build(given)
            return checked
        key = repr(given)
        if (known := _GROWTH.get(key)) is None:
            known = build(given)
            if len(_GROWTH) >= _GROWTH_KEPT:
                _GROWTH.clear()
            _GROWTH[key] = known
        return known

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [site.name for site in self.sites]
        if len(set(names)) < len(names):
            raise ValueError("sites must have names of their own, but one is given twice.")
        limits = {
            "stage": len(Stage), "blueprint_id": len(self.blueprints), "graft_id": len(self.grafts),
            "epochs": 2**31,
        }  # fmt: skip
        for i, site in enumerate(self.sites):
            for column, limit in limits.items():
                values = site.columns[column]
                if values.min() < 0 or values.max() >= limit:
                    raise ValueError(
                        f"sites.{i}.columns.{column} must be in 0..{limit - 1}, but got "
                        f"{values.min()}..{values.max()}."
                    )
        return self

    @classmethod
    def of(cls, report: Report) -> Self:
        """The wire form of a report.

        Raises:
            WireError: If a site has more seeds, or the report more sites, than a body may hold.
        """
        for site in report.sites:
            if len(site.stage) > MAX_SEEDS:
                raise WireError(
                    f"a site must have at most {MAX_SEEDS} seeds to be decided on over HTTP, but "
                    f"'{site.name}' has {len(site.stage)}; use a local controller."
                )
        if len(report.sites) > MAX_SITES:
            raise WireError(
                f"a report must have at most {MAX_SITES} sites to be decided on over HTTP, but "
                f"this one has {len(report.sites)}; use a local controller."
            )
        plain = {f.name: getattr(report, f.name) for f in fields(Report) if f.name != "sites"}
        return cls(
            **plain,
            blueprints=tuple(BLUEPRINTS),
            grafts=tuple(GRAFTS),
            sites=tuple(SiteWire.of(site) for site in report.sites),
        )

    def dump(self, binary: bool) -> dict[str, Any]:
        """As plain values."""
        plain = self.model_dump(mode="json", exclude={"sites"})
        return {**plain, "sites": [site.dump(binary) for site in self.sites]}

    def report(self) -> Report:
        """The report again, in terms of the receiver's registries.

        Raises:
            WireError: If a seed has a blueprint or graft strategy that is not registered here.
        """
        sites = []
        for i, wire in enumerate(self.sites):
            site = wire.report()
            at = f"report.sites.{i}.columns."
            sites.append(replace(
                site,
                blueprint_id=_here(site.blueprint_id, self.blueprints, BLUEPRINTS, at),
                graft_id=_here(site.graft_id, self.grafts, GRAFTS, at),
            ))  # fmt: skip
        plain = {f.name: getattr(self, f.name) for f in fields(Report) if f.name != "sites"}
        return Report(**plain, sites=tuple(sites))


class DecideRequest(Config):
    """What is to be decided, and what the policy remembers of this run."""

    request_id: RequestId = Field(description="Of this decision; a retry bears the same one.")
    model: Name = Field(description="Name of the model or run, which rollouts mean.")
    policy: Name | None = Field(None, description="Version of the policy; null: the active one.")
    seed: NonNegativeInt = Field(0, le=2**63 - 1, description="Seed of the policy's draws.")
    memory: dict[str, Any] | None = Field(
        None, description="As the last answer gave it; null at the start of a run."
    )
    report: ReportWire = Field(description="What the interval measured.")

    def dump(self, binary: bool) -> dict[str, Any]:
        """As plain values."""
        plain = {name: getattr(self, name) for name in type(self).model_fields if name != "report"}
        return {**plain, "report": self.report.dump(binary)}


class ActionWire(Config):
    """One action; `fields` are those of its class in `esper.seeds.actions`."""

    action: Literal["Germinate", "Promote", "Advance", "Cull", "Cancel", "Rollback"] = Field(
        description="Name of the action."
    )
    fields: dict[str, str | int] = Field(description="Its fields, by name.")
    draw: Draw | None = Field(
        None, description="How a germination was drawn, for the field report; null: it was not."
    )

    @staticmethod
    def of(action: Action, draw: Draw | None) -> "ActionWire":
        """The wire form of an action, and of how it was drawn."""
        return ActionWire.model_construct(**pack_action(action), draw=draw)

    def unpack(self) -> Action:
        """The action again.

        Raises:
            WireError: If its fields are not those of its class.
        """
        try:
            return unpack_action(self.model_dump(exclude={"draw"}))
        except TypeError:
            raise WireError(f"{self.action} must have its fields, but got {self.fields}.") from None


class DecideResponse(Config):
    """What the policy decided."""

    request_id: RequestId = Field(description="That of the request.")
    policy: Name = Field(description="Version that decided.")
    report_hash: str = Field(description="See `report_hash`.")
    actions: tuple[ActionWire, ...] = Field(description="In the order of their application.")
    vetoes: tuple[str, ...] = Field(description="What the shield did not let through, and why.")
    memory: dict[str, Any] = Field(description="To be sent with the run's next report.")
    may_grow: bool = Field(
        description="Whether the policy may germinate at the end of the next interval; if not, "
        "nothing need be measured for it."
    )
    deadline_ms: int | None = Field(description=f"The request's {DEADLINE_HEADER}; null: none.")


class FeedbackRequest(Config):
    """What became of adaptations."""

    reports: tuple[FieldReport, ...] = Field(
        max_length=256, description="Field reports; each request id is stored once."
    )


class FeedbackResponse(Config):
    """What was done with them."""

    stored: NonNegativeInt = Field(description="Reports that are stored now.")
    known: NonNegativeInt = Field(description="Reports whose request id was stored before.")


def report_hash(report: ReportWire, memory: Mapping[str, Any] | None, seed: int) -> str:
    """Digest of everything that a policy decides by, whatever form it came in.

    Args:
        report: The report.
        memory: What the policy remembers of the run; None at its start.
        seed: Seed of the policy's draws.

    Returns:
        32 hexadecimal digits of BLAKE2b. Two requests with the same digest get the same actions
        from the same version of a policy.
    """
    sites = [
        [s.name, s.geometry, s.seeds, sorted(s.seed_parameters.items()), s.unexplained]
        for s in report.sites
    ]
    promising = [s.scored_blueprint for s in report.sites]
    rest = json.dumps([memory, seed, sites, promising], sort_keys=True)
    head = report.model_dump_json(exclude={"sites"}) + rest
    digest = hashlib.blake2b(head.encode(), digest_size=16)
    for site in report.sites:
        for names, kind in ((sorted(_FLOATS), "<f4"), (sorted(_INTS), "<i4")):
            values = np.concatenate([site.columns[name] for name in names]).astype(kind)
            # any two NaN are the same
            if kind == "<f4":
                values[np.isnan(values)] = np.nan
            digest.update(values.tobytes())
    return digest.hexdigest()


def pack(content: Mapping[str, Any], content_type: str) -> bytes:
    """Encode plain values as a body.

    Raises:
        WireError: If the content type is neither JSON nor MessagePack.
    """
    if content_type == JSON:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    if content_type == MSGPACK:
        packed: bytes = msgpack.packb(content)
        return packed
    raise WireError(f"the content type must be {JSON} or {MSGPACK}, but got '{content_type}'.")


def unpack(body: bytes, content_type: str) -> Any:
    """Decode a body into plain values.

    Raises:
        WireError: If it is not what its content type says.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (JSON, MSGPACK):
        raise WireError(f"the content type must be {JSON} or {MSGPACK}, but got '{kind[:80]}'.")
    try:
        return json.loads(body) if kind == JSON else msgpack.unpackb(body)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"the body must be {kind}, but: {str(error)[:200]}.") from None


def _kind(name: str) -> str:
    return "<i4" if name in _INTS else "<f4"


def _short(values: NDArray[Any], binary: bool) -> Any:
    first = values[0]
    # as bits, so that a column of NaN is short as well
    if (values.view(np.int32) == first.view(np.int32)).all() and not np.isinf(first):
        return None if np.isnan(first) else first.item()
    raw = values.astype("<i4" if values.dtype.kind == "i" else "<f4").tobytes()
    return raw if binary else base64.b64encode(raw).decode()


def _column(name: str, given: Any, seeds: int) -> NDArray[Any]:
    """One value a seed, shape `[seeds]`, int32 or float32."""
    kind = _kind(name)
    if isinstance(given, str):
        try:
            given = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"{name} must be base64 if it is a text, but is not.") from None
    if isinstance(given, bytes):
        if len(given) != 4 * seeds:
            raise ValueError(
                f"{name} must be {4 * seeds} bytes for {seeds} seeds, but got {len(given)}."
            )
        return np.frombuffer(given, kind).astype(kind[1:])
    if isinstance(given, list):
        if len(given) != seeds:
            raise ValueError(f"{name} must have one value for each of the {seeds} seeds, "
                             f"but got {len(given)}.")  # fmt: skip
        return np.array([_value(name, v) for v in given], kind[1:])
    return np.full(seeds, _value(name, given), kind[1:])


def _value(name: str, value: Any) -> float:
    if name in _INTS:
        if type(value) is not int or not -(2**31) <= value < 2**31:
            raise ValueError(f"{name} must be whole numbers, but got {str(value)[:60]}.")
    elif value is None:
        return float("nan")
    elif type(value) not in (int, float) or not abs(value) <= 3.4e38:
        raise ValueError(f"{name} must be numbers or null, but got {str(value)[:60]}.")
    return float(value)


def _here(ids: Ints, names: tuple[str, ...], registry: Registry[Any], at: str) -> Ints:
    """The receiver's indices for the sender's."""
    known = {name: i for i, name in enumerate(registry)}
    if names == tuple(known):
        return ids
    used = np.unique(ids)
    for i in used:
        if names[i] not in known:
            raise WireError(f"{at} {UnknownNameError(registry.kind, names[i], tuple(known))}")
    table = np.array([known.get(name, -1) for name in names], dtype=np.int32)
    return table[ids]
