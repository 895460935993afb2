"""Seed-parallel training: every shard has a range of the seeds, and of the host's channels there.

At a site the host's Linear is split by its outputs and the next one by its inputs (Megatron-LM,
Shoeybi et al., 2019), by torch's own tensor parallelism. Between the two each shard holds the
channels of its own seeds and no others, so that seeds need no communication in a step: what is sent
is the host's one reduction forward and one backward. All else is computed by every shard, on the
whole batch.

Once an interval the reports of the seeds are put together. Flags and states of all seeds are in
every shard, where the same actions change them alike.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from esper.config.run import SiteConfig
from esper.seeds.local_rows import is_distributed, whole
from esper.shards.replica import Replica, is_lost_touch
from esper.shards.shard import KasminaShard, ShardSpec
from esper.surgery.lattice import Lattice
from esper.surgery.sites import find_sites
from esper.training.tasks import TaskData
from esper.training.trainer import Trainer

# samples on which the split host is compared with the whole one, and how far they may differ
COMPARED = 64
TOLERANCE = 1e-2
# of the norm of all gradients: what is smaller is noise
NOISE = 1e-5


class SeedShard(KasminaShard):
    """One of several shards that share the seeds of one model.

    Args:
        spec: What it is made of.
        replica: Which shard it is; all have met already.

    Raises:
        ConfigError: As `KasminaShard` does.
        ValueError: Likewise, or if seeds or host cannot be shared.
    """

    def __init__(self, spec: ShardSpec, replica: Replica) -> None:
        self._mesh = init_device_mesh(torch.device(spec.config.device).type, (replica.count,))
        super().__init__(spec, partial(_SharedTrainer, replica=replica))
        self._writes = replica.rank == 0

    def digest(self) -> dict[str, str]:
        """What tells shards apart, of all that they must have in common; see `KasminaShard`."""
        own = {n for n, p in self.trainer.model.named_parameters() if _is_split(p)}
        return {name: text for name, text in super().digest().items() if name not in own}

    def _attach(self, model: nn.Module, data: TaskData, spec: ShardSpec) -> Lattice:
        split_host(model, split_sites(model, spec.config.lattice), self._mesh, data)
        lattice = super()._attach(model, data, spec)
        for layer in lattice.layers():
            layer.share(self._mesh)
        return lattice


class _SharedTrainer(Trainer):
    """A trainer whose cost is a shard's mean share of what all compute."""

    def __init__(self, *args: Any, replica: Replica, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.make_counter = partial(_SharedFlops, replica, self._train[0].device)


class _SharedFlops(FlopCounterMode):
    """Counts what is computed here, of split tensors only the part; and takes the shards' mean."""

    def __init__(self, replica: Replica, device: torch.device) -> None:
        super().__init__(display=False)
        self._replica, self._device = replica, device

    def __enter__(self) -> "_SharedFlops":
        super().__enter__()  # type: ignore[no-untyped-call]
        # the counter's own mode would see a product of split tensors as that of the whole
        assert self.mode is not None
        self.mode.__exit__(None, None, None)
        self.mode = _LocalFlops(self)
        self.mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def get_total_flops(self) -> int:
        """The mean over the shards; each must ask."""
        own = torch.tensor(super().get_total_flops(), dtype=torch.float64, device=self._device)
        return int(self._replica.mean(own))


class _LocalFlops(_FlopCounterMode):
    """Passes operations on split tensors by: they come again, as what each shard computes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def split_sites(model: nn.Module, sites: tuple[SiteConfig, ...]) -> dict[str, str]:
    """The Linear at each site, which is split by its outputs, and that which takes them in.

    Args:
        model: The host, without a lattice.
        sites: Where it is to have seeds.

    Returns:
        Their paths.

    Raises:
        ValueError: If a site is a span, or is no Linear with another one after it.
    """
    found: dict[str, str] = {}
    for config in sites:
        for site in find_sites(model, config.sites, config.geometry):
            if config.geometry == "span":
                raise ValueError(
                    f"sites must be of chunk seeds for parallel: seed, but '{site.name}' is a "
                    "span, whose units learn from sums that no shard has before the host has "
                    "reduced them; use geometry 'chunk', or parallel: data."
                )
            found[site.last] = _next_linear(model, site.last)
    taken = set(found) & set(found.values())
    if taken:
        raise ValueError(
            f"sites must not follow one another for parallel: seed, but '{min(taken)}' is one and "
            "takes in what another gives: it cannot be split by outputs and inputs; leave it or "
            "the one before it without seeds, or use parallel: data."
        )
    return found


def _next_linear(model: nn.Module, path: str) -> str:
    parent = path.rpartition(".")[0]
    names = [name for name, _ in model.get_submodule(parent).named_children()]
    prefix = f"{parent}." if parent else ""
    later = [prefix + name for name in names[names.index(path.rpartition(".")[2]) + 1 :]]
    partner = next((p for p in later if isinstance(model.get_submodule(p), nn.Linear)), None)
    if partner is None or not isinstance(model.get_submodule(path), nn.Linear):
        kind = type(model.get_submodule(path)).__name__
        raise ValueError(
            "sites must be Linears with another Linear after them in the same module for "
            f"parallel: seed, but '{path}' is a {kind}"
            f"{' without one' if partner is None else ''}; choose the first Linear of a block, or "
            "use parallel: data."
        )
    return partner


def split_host(model: nn.Module, pairs: dict[str, str], mesh: DeviceMesh, data: TaskData) -> None:
    """Split a host over the shards, in place, and compare it with the whole one.

    Args:
        model: The same in every shard.
        pairs: What `split_sites` found.
        mesh: The shards.
        data: A few training samples are computed.

    Raises:
        ValueError: If the split host computes something else.
    """
    device = next(model.parameters()).device
    measure = partial(_outputs_and_gradients, model, data, device)
    before = measure()
    plan: dict[str, ParallelStyle] = {}
    for first, last in pairs.items():
        plan |= {first: ColwiseParallel(), last: RowwiseParallel()}
    parallelize_module(model, mesh, plan, src_data_rank=None)
    named = ", ".join(f"'{first}' and '{last}'" for first, last in pairs.items())
    what = (
        f"host must compute the same when {named} are split over {mesh.size()} shards, but {{}}; "
        "between the two there may be functions of single numbers only, no norm, dropout or other "
        "path: choose other sites, or parallel: data."
    )
    try:
        after = measure()
    except Exception as error:
        if is_lost_touch(error):
            raise
        raise ValueError(what.format(f"fails: {error}")) from error
    total = math.sqrt(sum(float(b.square().sum()) for b in before.values()))
    for name, wanted in before.items():
        off = float((after[name] - wanted).norm())
        if not off <= TOLERANCE * float(wanted.norm()) + NOISE * total:
            raise ValueError(what.format(f"{name} differs by {off:.3g}"))


def _outputs_and_gradients(
    model: nn.Module, data: TaskData, device: torch.device
) -> dict[str, Tensor]:
    """What the host makes of a few samples; it is left as it was."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    x, y = (t[:COMPARED].to(device) for t in data.train)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        output = model(x)
        loss = data.losses(output, y).mean()
        if loss.requires_grad:
            loss.backward()
    found = {"its output": output.detach().float()}
    for name, param in model.named_parameters():
        if param.grad is not None:
            found[f"the gradient of {name}"] = whole(param.grad).float()
            param.grad = None
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return found


def _is_split(tensor: Tensor) -> bool:
    sharded: Any = tensor
    return is_distributed(tensor) and any(not p.is_replicate() for p in sharded.placements)
