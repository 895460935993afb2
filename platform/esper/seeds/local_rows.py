"""The rows of a pool that this process holds: all of them, or its shard.

FSDP2 (`torch.distributed.fsdp.fully_shard`) splits every parameter on axis 0, which for a pool is
the axis of its seeds; so does `KasminaLayer.share`, whose processes also compute their own seeds
alone. What is done to single seeds is then done to local rows; flags, masks and books of all seeds
are kept whole, and equal, in every process.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def local_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """The rows held here and which seeds they are; in-place changes reach the tensor.

    Args:
        tensor: `[S, ...]`, plain or a DTensor.

    Returns:
        A plain `[n, ...]` tensor and the seeds `start:start + n`; n may be 0.

    Raises:
        ValueError: If the tensor is sharded otherwise than by whole seeds over one mesh axis.
    """
    if not is_distributed(tensor):
        return tensor, slice(0, len(tensor))
    sharded: Any = tensor
    mesh, placements = sharded.device_mesh, sharded.placements
    axes = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(axes) > 1 or any(not _is_by_seed(placements[i]) for i in axes):
        raise ValueError(
            f"pools must be sharded by whole seeds over one mesh axis, but got {placements}; "
            "leave `shard_placement_fn` out for the lattice's parameters."
        )
    local: Tensor = sharded.to_local()
    start = 0
    if axes:
        # as torch.chunk splits: equal shards, the last ones shorter or empty
        size = -(-len(tensor) // mesh.size(axes[0]))
        start = min(len(tensor), size * mesh.get_local_rank(axes[0]))
    return local, slice(start, start + len(local))


def put_rows(tensor: Tensor, rows: Mapping[int, Tensor]) -> None:
    """Replace some seeds' rows, as far as they are held here, in place.

    Args:
        tensor: `[S, ...]`, plain or a DTensor.
        rows: New rows by seed; shorter ones replace the first columns. Of a span, the one unit of a
            row may have a last axis that the tensor lacks.
    """
    local, held = local_rows(tensor)
    mine = [seed for seed in rows if held.start <= seed < held.stop]
    if not mine:
        return
    at = torch.as_tensor([seed - held.start for seed in mine], device=local.device)
    together = torch.stack([rows[seed] for seed in mine]).to(local)
    if local.ndim < together.ndim:
        together = together.squeeze(-1)
    if local.ndim == 1:
        local[at] = together
    else:
        local[at, ..., : together.shape[-1]] = together


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all shards of a sharded one, so that every process decides alike."""
    if not is_distributed(tensor):
        return tensor
    sharded: Any = tensor
    together: Tensor = sharded.full_tensor()
    return together


def all_rows(local: Tensor, like: Tensor) -> Tensor:
    """What every process knows of its own rows, put together; each process must ask.

    Args:
        local: One row for each that is held here, `[n, ...]`.
        like: The tensor whose rows they are, `[S, ...]`.

    Returns:
        `[S, ...]`, the same in every process; `local` itself if `like` is not sharded.
    """
    if not is_distributed(like):
        return local
    sharded: Any = like
    from torch.distributed.tensor import DTensor

    local = local.contiguous()
    shape = torch.Size((len(like), *local.shape[1:]))
    together = DTensor.from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=shape,
        stride=local.stride(),
    )  # fmt: skip
    return whole(together)


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as another of its shape is; nothing is sent."""
    if not is_distributed(like) or is_distributed(tensor):
        return tensor
    sharded: Any = like
    return by_process(tensor.to(like.device), sharded.device_mesh, sharded.placements)


def by_process(tensor: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """A tensor that every process has whole, as a DTensor of which each keeps its part."""
    from torch.distributed.tensor import distribute_tensor

    # no rank is the source: all have it
    sharded: Tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return sharded


def is_distributed(tensor: Tensor) -> bool:
    """True for a DTensor; without loading `torch.distributed` for those who do not use it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_by_seed(placement: Any) -> bool:
    # _StridedShard, of FSDP over tensor parallelism, orders its rows otherwise
    return type(placement).__name__ == "Shard" and placement.dim == 0
