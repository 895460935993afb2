"""The rows of a pool that this process holds: all of them, or its shard.

FSDP2 (`torch.distributed.fsdp.fully_shard`) splits every parameter on axis 0, which for a pool is
the axis of its seeds. What is done to single seeds is then done to local rows; flags, masks and
books of all seeds are kept whole, and equal, in every process.
"""

import sys
from typing import Any

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


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all shards of a sharded one, so that every process decides alike."""
    if not is_distributed(tensor):
        return tensor
    sharded: Any = tensor
    together: Tensor = sharded.full_tensor()
    return together


def is_distributed(tensor: Tensor) -> bool:
    """True for a DTensor; without loading `torch.distributed` for those who do not use it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_by_seed(placement: Any) -> bool:
    # _StridedShard, of FSDP over tensor parallelism, orders its rows otherwise
    return type(placement).__name__ == "Shard" and placement.dim == 0
