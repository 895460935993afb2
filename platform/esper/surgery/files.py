"""Saving and loading a model with its lattice and its optimizer; see `checkpoint_folder`."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.config.run import GrowthConfig
from esper.registry import Registry, UnknownNameError
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.grafting import GRAFTS, GraftSignals
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.local_rows import placed_as, whole
from esper.seeds.state import BLUEPRINT, GRAFT
from esper.surgery.attach import attach, biased_as_host
from esper.surgery.checkpoint_folder import CheckpointError, read_checkpoint, write_checkpoint
from esper.surgery.growth_log import pack_log, unpack_log
from esper.surgery.lattice import Attached, Lattice, lattice_of


def save(
    path: str | Path,
    model: nn.Module,
    lattice: Lattice,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Path:
    """Write a model, its lattice and optionally its optimizer; a former checkpoint is replaced.

    Args:
        path: Folder of the checkpoint.
        model: The host with its lattice.
        lattice: Its handle.
        optimizer: Saved too if given.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder exists and holds something else.
        ValueError: If the lattice is not the model's.
    """
    folder = Path(path)
    write_checkpoint(folder, *pack(model, lattice, optimizer))
    return folder


def pack(
    model: nn.Module, lattice: Lattice, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` writes: tensors by name, and the rest as JSON.

    Sharded tensors are put together, for which every process that holds a part must call this.

    Raises:
        ValueError: If the lattice is not the model's.
    """
    if lattice.model is not model:
        raise ValueError("lattice must be the model's own to be saved with it, but is another's.")
    tensors = {f"model.{k}": whole(v) for k, v in model.state_dict().items()}
    optimizer_json: Any = None
    if optimizer is not None:
        moments, packed = pack_optimizer(optimizer.state_dict(), "optimizer.")
        tensors |= moments
        names = _parameter_names(optimizer, model)
        optimizer_json = {"class": type(optimizer).__name__, "parameters": names, **packed}
    return tensors, {"lattice": _describe(lattice), "optimizer": optimizer_json}


def load(
    path: str | Path, model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None
) -> Lattice:
    """Attach the saved lattice to a host of the same architecture and restore all weights.

    The whole checkpoint is read and checked before the model or the optimizer is touched.

    Args:
        path: Folder of the checkpoint, or its URI (`s3://bucket/name`).
        model: A host without a lattice, or with one that has the same sites.
        optimizer: Restored too if given. It must hold the model's parameters, so attach the
            lattice first (or load twice: without it, then build the optimizer, then with it).

    Returns:
        The lattice's handle.

    Raises:
        CheckpointError: If the folder is no checkpoint, is damaged, or does not fit.
    """
    manifest, tensors = read_checkpoint(path)
    return unpack(path, manifest, tensors, model, lattice_of(model), optimizer)


def unpack(
    path: str | Path, manifest: dict[str, Any], tensors: dict[str, Tensor],
    model: nn.Module, before: Lattice | None, optimizer: torch.optim.Optimizer | None,
) -> Lattice:  # fmt: skip
    """Restore what `pack` made and `read_checkpoint` read; see `load`.

    Args:
        path: For errors.
        manifest: What was read.
        tensors: Likewise.
        model: As `load` takes it.
        before: The lattice it has; None to have the saved one attached.
        optimizer: As `load` takes it.
    """
    if optimizer is not None and manifest["optimizer"] is None:
        raise CheckpointError(
            f"{path} must hold an optimizer to restore one, but was saved without; "
            "pass `optimizer` to `save`, or leave it out here."
        )
    try:
        lattice = before or _rebuild(manifest["lattice"], model)
        own = under("model.", tensors)
        _require_fit(path, model, lattice, own, manifest["lattice"])
        own = renumbered(model, own, manifest["lattice"])
        growth = GrowthConfig.model_validate(manifest["lattice"]["growth"])
        log = unpack_log(manifest["lattice"].get("log", []))
        if optimizer is not None:
            _require_same_parameters(path, optimizer, model, manifest["optimizer"])
    except (ValueError, AttributeError, UnknownNameError) as error:
        if before is None and (half := lattice_of(model)) is not None:
            half.detach()
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} must fit the model, but: {error}") from error
    model.load_state_dict(placed(model, own))
    lattice.growth, lattice.log = growth, log
    _restore(lattice, manifest["lattice"])
    if optimizer is not None:
        moments = under("optimizer.", tensors)
        content = unpack_optimizer(manifest["optimizer"], moments)
        optimizer.load_state_dict(placed_moments(optimizer, content))
    return lattice


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, named by the rest."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _describe(lattice: Lattice) -> dict[str, Any]:
    return {
        "sites": _describe_sites(lattice),
        "steps": [layer.steps for layer in lattice.layers()],
        "blueprints": list(BLUEPRINTS),
        "grafts": list(GRAFTS),
        "growth": lattice.growth.model_dump(mode="json"),
        "seed": lattice.seed,
        "interval": lattice.interval,
        "signals": dataclasses.asdict(lattice.signals),
        "grad_norms": lattice.grad_norms,
        "log": pack_log(lattice.log),
    }


def _describe_sites(lattice: Lattice) -> list[dict[str, Any]]:
    return [_describe_site(lattice.model, name, a) for name, a in lattice.attached.items()]


def _describe_site(model: nn.Module, name: str, attached: Attached) -> dict[str, Any]:
    layer = attached.layer
    usual = biased_as_host(model, attached.site.first, layer.geometry)
    return {
        "name": name,
        "seeds_per_layer": layer.num_seeds,
        "geometry": layer.geometry,
        "hidden": layer.hidden if layer.geometry == "chunk" else None,
        "channels": layer.channels,
        "channel_axis": layer.channel_axis,
        # only where it was asked for: older files have no such line
        **({} if layer.biased == usual else {"biased": layer.biased}),
    }


def _span_pattern(name: str) -> str:
    first, last = name.split("->")
    return first if first == last else name


def _rebuild(saved: dict[str, Any], model: nn.Module) -> Lattice:
    lattice = Lattice(model)
    for site in saved["sites"]:
        options = {k: v for k, v in site.items() if k != "name"}
        pattern = site["name"] if site["geometry"] == "chunk" else _span_pattern(site["name"])
        lattice = attach(model, pattern, **options)
    return lattice


def _restore(lattice: Lattice, saved: dict[str, Any]) -> None:
    lattice.seed, lattice.interval = saved["seed"], saved["interval"]
    lattice.signals = GraftSignals(**saved["signals"])
    lattice.grad_norms = saved["grad_norms"]
    for layer, steps in zip(lattice.layers(), saved["steps"], strict=True):
        layer.steps = steps
        layer.reset_telemetry()
    lattice.configure_layers()
    # checkpoints are made between intervals, so the drift counts from here
    lattice.restart_drift()


def _require_fit(
    path: str | Path, model: nn.Module, lattice: Lattice,
    saved: dict[str, Tensor], lattice_saved: dict[str, Any],
) -> None:  # fmt: skip
    sites = _describe_sites(lattice)
    if sites != lattice_saved["sites"]:
        raise CheckpointError(
            f"{path} must hold the model's own sites {[s['name'] for s in sites]}, but has "
            f"{[s['name'] for s in lattice_saved['sites']]}, or with other sizes; "
            "give a host without a lattice to have the saved one attached."
        )
    own = model.state_dict()
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    shapes = [
        f"{k}: {tuple(saved[k].shape)} saved, {tuple(v.shape)} in the model"
        for k, v in own.items()
        if k in saved and saved[k].shape != v.shape
    ]
    if missing or extra or shapes:
        raise CheckpointError(
            f"{path} must hold the model's own tensors, but it lacks {missing or 'none'}, has "
            f"{extra or 'none'} besides, and differs in {shapes or 'no shape'}; "
            "build the host as it was when it was saved."
        )


def renumbered(
    model: nn.Module, tensors: dict[str, Tensor], saved: dict[str, Any]
) -> dict[str, Tensor]:
    """Blueprint and graft ids are positions in a registry, which may differ in this process."""
    result = dict(tensors)
    for path, module in model.named_modules():
        if isinstance(module, KasminaLayer):
            state = tensors[f"{path}.state"].clone()
            for column, here, there in (
                (BLUEPRINT, BLUEPRINTS, saved["blueprints"]),
                (GRAFT, GRAFTS, saved["grafts"]),
            ):
                state[:, column] = _ids_here(state[:, column], here, there)
            result[f"{path}.state"] = state
    return result


def placed(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose tensors are sharded where those of the model are."""
    own = model.state_dict()
    return {name: placed_as(tensor, own[name]) for name, tensor in tensors.items()}


def placed_moments(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> dict[str, Any]:
    """A state dict of an optimizer, with moments sharded where its parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            key: placed_as(value, params[index])
            if isinstance(value, Tensor) and value.shape == params[index].shape
            else value
            for key, value in own.items()
        }
        for index, own in content["state"].items()
    }
    return {**content, "state": state}


def _ids_here(ids: Tensor, here: Registry[Any], there: list[str]) -> Tensor:
    moved = {i: here.index(there[i]) for i in set(ids.tolist())}
    return torch.tensor([moved[i] for i in ids.tolist()], dtype=ids.dtype)


def pack_optimizer(
    content: dict[str, Any], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors, named with the prefix, and JSON."""
    tensors, numbers = {}, {}
    # in an order that all processes have, though a file that was read may give it in any
    for index, state in sorted(content["state"].items()):
        for key, value in sorted(state.items()):
            if isinstance(value, Tensor):
                tensors[f"{prefix}{index}.{key}"] = whole(value)
            else:
                numbers[f"{index}.{key}"] = value
    return tensors, {"param_groups": content["param_groups"], "numbers": numbers}


def unpack_optimizer(saved: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state dict that `pack_optimizer` packed; tensors are named without the prefix."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *saved["numbers"].items()]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": saved["param_groups"]}


def _parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str | None]]:
    """Names of the optimizer's parameters by group; None for one that is not the model's."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def _require_same_parameters(
    path: str | Path, optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, Any]
) -> None:
    kind = type(optimizer).__name__
    if kind != saved["class"]:
        raise CheckpointError(
            f"{path} must hold the state of the same kind of optimizer, but has that of a "
            f"{saved['class']}, not {kind}; build that one, or leave `optimizer` out."
        )
    if _parameter_names(optimizer, model) != saved["parameters"]:
        raise CheckpointError(
            f"{path} must hold the state of an optimizer over the same parameters in the same "
            "order and groups, but does not; attach the lattice before you build the optimizer, "
            "and build it as it was when it was saved."
        )
