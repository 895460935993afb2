"""A trainer as tensors and JSON, from which the run goes on bit for bit on the same device."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from esper.seeds.grafting import GraftSignals
from esper.seeds.local_rows import whole
from esper.surgery import files
from esper.surgery.checkpoint_folder import CheckpointError
from esper.surgery.files import under
from esper.training.snapshot import Snapshot
from esper.training.trainer import Cost, Trainer


def pack(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_checkpoint` takes; `esper.load` reads the model, lattice and optimizer of it.

    Sharded tensors are put together, for which every process that holds a part must call this.
    """
    tensors, content = files.pack(trainer.model, trainer.lattice, trainer.optimizer)
    tensors |= _numbered("random.", trainer.random_state())
    past = []
    for i, snapshot in enumerate(trainer.past):
        more, described = _pack_snapshot(snapshot, f"past.{i}.")
        tensors |= more
        past.append(described)
    content["trainer"] = {
        "step": trainer.step,
        "cost": dataclasses.asdict(trainer.cost),
        "data_sha256": trainer.data_sha256,
        "past": past,
    }
    return tensors, content


def unpack(
    path: str | Path, manifest: dict[str, Any], tensors: dict[str, Tensor], trainer: Trainer
) -> None:
    """Bring a new trainer of the same task, host and lattice to where the saved one was.

    Args:
        path: Of the checkpoint, for errors.
        manifest: As `read_checkpoint` read it.
        tensors: Likewise.
        trainer: Changed only if everything fits.

    Raises:
        CheckpointError: If the checkpoint is of another model, optimizer or data.
    """
    saved = manifest["trainer"]
    if trainer.data_sha256 != saved["data_sha256"]:
        raise CheckpointError(
            f"{path} must be continued with the data it was made with, but the task now gives "
            "other data; restore the task's files and package versions."
        )
    files.unpack(path, manifest, tensors, trainer.model, trainer.lattice, trainer.optimizer)
    trainer.step, trainer.cost = saved["step"], Cost(**saved["cost"])
    trainer.past = [
        _unpack_snapshot(described, under(f"past.{i}.", tensors), trainer, manifest["lattice"])
        for i, described in enumerate(saved["past"])
    ]
    trainer.set_random_state(_in_order(under("random.", tensors)))


def _pack_snapshot(snapshot: Snapshot, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    moments, optimizer = files.pack_optimizer(snapshot.optimizer, f"{prefix}optimizer.")
    tensors = {f"{prefix}model.{k}": whole(v) for k, v in sorted(snapshot.model.items())}
    tensors |= moments | _numbered(f"{prefix}random.", snapshot.random)
    return tensors, {
        "step": snapshot.step,
        "optimizer": optimizer,
        "signals": dataclasses.asdict(snapshot.signals),
        "grad_norms": snapshot.grad_norms,
        "grafted": sorted(snapshot.grafted),
        "note": snapshot.note,
    }


def _unpack_snapshot(
    saved: dict[str, Any], tensors: dict[str, Tensor], trainer: Trainer, lattice: dict[str, Any]
) -> Snapshot:
    model = files.renumbered(trainer.model, under("model.", tensors), lattice)
    optimizer = files.unpack_optimizer(saved["optimizer"], under("optimizer.", tensors))
    return Snapshot(
        step=saved["step"],
        model=files.placed(trainer.model, model),
        optimizer=files.placed_moments(trainer.optimizer, optimizer),
        random=_in_order(under("random.", tensors)),
        signals=GraftSignals(**saved["signals"]),
        grad_norms=saved["grad_norms"],
        grafted=frozenset((site, seed) for site, seed in saved["grafted"]),
        note=saved["note"],
    )


def _numbered(prefix: str, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"{prefix}{i}": tensor for i, tensor in enumerate(tensors)}


def _in_order(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensors[str(i)] for i in range(len(tensors)))
