"""Saving and loading a model with its lattice: safetensors and JSON, checked, atomic.

A checkpoint is a folder with `manifest.json` and one `tensors-<sha256>.safetensors`. The
tensors are written first, under a name that is their own hash; replacing the manifest is the
one step that makes the new checkpoint valid. A crash at any moment leaves the old or the new
one. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from esper.config.run import GrowthConfig
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.grafting import GRAFTS
from esper.surgery.lattice import Lattice, attach, lattice_of

FORMAT = "esper-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """The folder is no checkpoint, is damaged, or does not fit the model; nothing was changed."""


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
    """
    folder = Path(path)
    if folder.exists() and any(folder.iterdir()):
        # refuses to overwrite a foreign folder, before anything is written
        _read_manifest(folder)
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    optimizer_json: Any = None
    if optimizer is not None:
        optimizer_json, moments = _pack_optimizer(optimizer)
        tensors |= moments
    # safetensors refuses tensors that share memory, such as tied weights
    payload = to_bytes({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    digest = hashlib.sha256(payload).hexdigest()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": f"tensors-{digest}.safetensors",
        "tensors_sha256": digest,
        "lattice": _describe(lattice),
        "optimizer": optimizer_json,
    }
    manifest["manifest_sha256"] = _hash_json(manifest)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / str(manifest["tensors"]), payload)
    _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    for old in folder.glob("tensors-*.safetensors"):
        if old.name != manifest["tensors"]:
            old.unlink()
    return folder


def load(
    path: str | Path, model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None
) -> Lattice:
    """Attach the saved lattice to a host of the same architecture and restore all weights.

    The whole checkpoint is read and checked before the model or the optimizer is touched.

    Args:
        path: Folder of the checkpoint.
        model: A host without a lattice, or with one that has the same sites.
        optimizer: Restored too if given. It must hold the model's parameters, so attach the
            lattice first (or load twice: without it, then build the optimizer, then with it).

    Returns:
        The lattice's handle.

    Raises:
        CheckpointError: If the folder is no checkpoint, is damaged, or does not fit.
    """
    manifest, tensors = _read(Path(path))
    if optimizer is not None and manifest["optimizer"] is None:
        raise CheckpointError(
            f"{path} must hold an optimizer to restore one, but was saved without; "
            "pass `optimizer` to `save`, or leave it out here."
        )
    lattice = lattice_of(model)
    attached_here = lattice is None
    try:
        lattice = lattice or _rebuild(manifest["lattice"], model)
        own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        _require_fit(path, model, own)
        if optimizer is not None:
            _unpack_optimizer(optimizer, manifest["optimizer"], tensors)
    except (ValueError, AttributeError) as error:
        if attached_here and (half := lattice_of(model)) is not None:
            half.detach()
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} must fit the model, but: {error}") from error
    model.load_state_dict(_renumbered(own, manifest["lattice"]))
    _restore(lattice, manifest["lattice"])
    return lattice


def _describe(lattice: Lattice) -> dict[str, Any]:
    sites = [
        {
            "sites": name if a.layer.geometry == "chunk" else _span_pattern(name),
            "name": name,
            "seeds_per_layer": a.layer.num_seeds,
            "geometry": a.layer.geometry,
            "hidden": a.layer.hidden if a.layer.geometry == "chunk" else None,
            "channels": a.layer.channels,
            "channel_axis": a.layer.channel_axis,
            "steps": a.layer.steps,
        }
        for name, a in lattice.attached.items()
    ]
    return {
        "sites": sites,
        "blueprints": list(BLUEPRINTS),
        "grafts": list(GRAFTS),
        "growth": lattice.growth.model_dump(mode="json"),
        "seed": lattice.seed,
        "interval": lattice.interval,
        "losses": lattice._losses,
        "grad_norms": lattice._grad_norms,
    }


def _span_pattern(name: str) -> str:
    first, last = name.split("->")
    return first if first == last else name


def _rebuild(saved: dict[str, Any], model: nn.Module) -> Lattice:
    for name in saved["blueprints"]:
        BLUEPRINTS[name]
    lattice = None
    for site in saved["sites"]:
        options = {k: v for k, v in site.items() if k not in ("name", "steps")}
        lattice = attach(model, **options)
    return lattice or Lattice(model)


def _restore(lattice: Lattice, saved: dict[str, Any]) -> None:
    lattice.growth = GrowthConfig.model_validate(saved["growth"])
    lattice.seed, lattice.interval = saved["seed"], saved["interval"]
    lattice._losses, lattice._grad_norms = saved["losses"], saved["grad_norms"]
    for site in saved["sites"]:
        layer = lattice.layer(site["name"])
        layer.steps = site["steps"]
        layer.ramp_steps, layer.objective = lattice.growth.ramp_steps, lattice.growth.objective
    # checkpoints are made between intervals, so the drift counts from here
    lattice._drift_base = None
    lattice._drift()


def _require_fit(path: str | Path, model: nn.Module, saved: dict[str, Tensor]) -> None:
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


def _renumbered(tensors: dict[str, Tensor], saved: dict[str, Any]) -> dict[str, Tensor]:
    """Blueprint and graft ids are positions in a registry, which may differ in this process."""
    from esper.seeds.state import BLUEPRINT, GRAFT

    here = {BLUEPRINT: list(BLUEPRINTS), GRAFT: list(GRAFTS)}
    there = {BLUEPRINT: saved["blueprints"], GRAFT: saved["grafts"]}
    result = dict(tensors)
    for key, value in tensors.items():
        if key.endswith(".state") and "kasmina" in key:
            state = value.clone()
            for column in (BLUEPRINT, GRAFT):
                names = [there[column][int(i)] for i in state[:, column]]
                ids = [here[column].index(n) for n in names]
                state[:, column] = torch.tensor(ids, dtype=state.dtype)
            result[key] = state
    return result


def _pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Any, dict[str, Tensor]]:
    content = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, state in content["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    return {"param_groups": content["param_groups"], "numbers": numbers}, tensors


def _unpack_optimizer(
    optimizer: torch.optim.Optimizer, saved: Any, tensors: dict[str, Tensor]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    moments = {k: v for k, v in tensors.items() if k.startswith("optimizer.")}
    for name, value in [*moments.items(), *saved["numbers"].items()]:
        index, key = name.removeprefix("optimizer.").split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    manifest = _read_manifest(folder)
    file = folder / Path(manifest["tensors"]).name
    try:
        payload = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file} must be readable, but: {error.strerror}; restore the checkpoint's folder."
        ) from None
    digest = hashlib.sha256(payload).hexdigest()
    if digest != manifest["tensors_sha256"]:
        raise CheckpointError(
            f"{file} must have sha256 {manifest['tensors_sha256']}, but has {digest}; "
            "the file is damaged or truncated: take another copy."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            return manifest, {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file} must be a safetensors file, but: {error}.") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} must be a checkpoint folder with a readable {MANIFEST}, but: {error}."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} must be written by esper.save, but is something else; nothing was touched."
        )
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{file} must have version {VERSION}, but has {manifest.get('version')}; "
            "load it with the Esper version that wrote it."
        )
    digest = manifest.pop("manifest_sha256", None)
    if digest != _hash_json(manifest):
        raise CheckpointError(
            f"{file} must match its own sha256, but was changed or damaged; take another copy."
        )
    return manifest


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
