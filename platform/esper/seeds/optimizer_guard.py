"""Keeps frozen and dormant seeds still under any optimizer, weight decay and moments included.

A pool of seeds is one parameter, so an optimizer would also move the rows of frozen seeds: by
weight decay, by moments that have not faded. Hooks around every `Optimizer.step` put those rows
back, clear the moments of seeds that were just woken, and move the grafts one step on. So a
stage change is data only, in the user's own training loop as in ours.

That costs a copy of the pool and its moments in every step; `SeedOptimizer` steps the seeds that
train and no others, needs no guard, and is left alone here.

Nothing is read back from a device. While a CUDA graph is captured, everything is done that any
later stage change could ask for: a replay follows the flags as they are then. A pool may be
sharded by seeds (FSDP2); each process then guards its own rows.

Adam divides its moments by `1 - beta^t`, where t counts the steps of the whole parameter. For a
seed woken late the moments are young and t is old, so its first steps would be up to six times too
large. Each seed therefore gets the correction of its own age; on top of it, a rate of its own while
it is young, if the layer asks for that. Source: Kingma and Ba, "Adam", ICLR 2015, section 3.
"""

import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from esper.seeds.local_rows import local_rows
from esper_kernels.reference.pool_step import Ramp, debias, move_grafts

if TYPE_CHECKING:
    from esper.seeds.kasmina import KasminaLayer

# a parameter of a pool: (layer, index in `layer.pool()`, parameter)
Guarded: TypeAlias = "tuple[KasminaLayer, int, Tensor]"
# rows to put back after the step: (layer, tensor, its local values before the step)
Saved: TypeAlias = "tuple[KasminaLayer, Tensor, Tensor]"

_layers: "weakref.WeakSet[KasminaLayer]" = weakref.WeakSet()
# what a step in progress is about to move
_in_step: weakref.WeakKeyDictionary[Optimizer, tuple[list[Guarded], list[Saved]]] = (
    weakref.WeakKeyDictionary()
)

# who made the last two steps of a layer
_movers: "weakref.WeakKeyDictionary[KasminaLayer, deque[weakref.ref[Optimizer]]]" = (
    weakref.WeakKeyDictionary()
)


def watch(layer: "KasminaLayer") -> None:
    """Guard the layer's pool from now on, for as long as the layer lives."""
    _layers.add(layer)


def pools() -> "dict[int, tuple[KasminaLayer, int]]":
    """Every living layer and the index in its pool, by the `id` of the parameter."""
    return {id(p): (layer, i) for layer in _layers for i, p in enumerate(layer.pool())}


def is_capturing(layer: "KasminaLayer") -> bool:
    """True while a CUDA graph records what is launched, instead of running it."""
    return layer.state.is_cuda and torch.cuda.is_current_stream_capturing()


def ramp_of(layer: "KasminaLayer") -> Ramp:
    """The layer's grafts, as the kernels take them."""
    return Ramp(
        layer.ramping, layer.pace, layer.cosine, layer.ramped_steps, layer.progress, layer.alpha,
        layer.ramp_steps,
    )  # fmt: skip


def require_one_mover(layer: "KasminaLayer", optimizer: Optimizer) -> None:
    """Refuse a SeedOptimizer that takes turns with another optimizer on the same pool.

    Raises:
        ValueError: At the third step in turns: every seed would move twice in a training step.
    """
    movers = _movers.setdefault(layer, deque(maxlen=2))
    turns = [mover() for mover in movers] + [optimizer]
    in_turns = len(turns) == 3 and turns[0] is optimizer and turns[1] not in (optimizer, None)
    if in_turns and any(getattr(mover, "steps_seeds_alone", False) for mover in turns):
        raise ValueError(
            "pools must be moved by one optimizer, but a SeedOptimizer and another take turns; "
            "give lattice.host_parameters() to the other one."
        )
    movers.append(weakref.ref(optimizer))


def count_step(layer: "KasminaLayer") -> None:
    """Count a step of training: on the device if a CUDA graph records it."""
    if is_capturing(layer):
        layer.replayed_steps.add_(1)
    else:
        layer.counted_steps += 1


def after_step(layer: "KasminaLayer") -> None:
    """Count a step of training and move every graft one step on."""
    count_step(layer)
    if is_capturing(layer) or layer.any_ramping:
        move_grafts(ramp_of(layer))


def _guarded(optimizer: Optimizer) -> list[Guarded]:
    if not _layers or getattr(optimizer, "steps_seeds_alone", False):
        return []
    ours = pools()
    params = (p for group in optimizer.param_groups for p in group["params"])
    return [(*ours[id(p)], p) for p in params if id(p) in ours]


def _moments(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    """State of the optimizer that has one row per seed, factored moments included."""
    state = optimizer.state.get(param, {}).values()
    return [
        v for v in state if isinstance(v, Tensor) and v.ndim == param.ndim and len(v) == len(param)
    ]


def _mask(flags: Tensor, ndim: int) -> Tensor:
    """`[n]` flags, broadcastable to rows with that many axes."""
    return flags.view(-1, *[1] * (ndim - 1))


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    guarded, saved = _guarded(optimizer), []
    # args holds the optimizer itself, then its closure if any
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    for layer, index, param in guarded:
        moments = _moments(optimizer, param)
        if layer.any_fresh or is_capturing(layer):
            for moment in moments:
                rows, here = local_rows(moment)
                rows.masked_fill_(_mask(layer.fresh[index][here], rows.ndim), 0)
            layer.moment_age[index].masked_fill_(layer.fresh[index], 0)
            layer.fresh[index].fill_(False)
        # without a gradient, of now or of the closure, the optimizer leaves the parameter alone
        if param.grad is not None or closure is not None:
            saved += [(layer, t, local_rows(t)[0].clone()) for t in (param, *moments)]
    # one that has only a part of a pool cannot tell whether the rest was cleared, and to ask the
    # device would mean to wait for it: until the next stage change, all are cleared in every step
    indices = [(layer, index) for layer, index, _ in guarded]
    for layer in {layer for layer, _ in indices}:
        whole = all((layer, index) in indices for index in range(len(layer.pool())))
        if whole and not is_capturing(layer):
            layer.any_fresh = False
    _in_step[optimizer] = guarded, saved


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    guarded, saved = _in_step.pop(optimizer, ([], []))
    if isinstance(optimizer, Adam):
        befores = {id(tensor): before for _, tensor, before in saved}
        for layer, index, param in guarded:
            if id(param) in befores and (layer.any_trainable or is_capturing(layer)):
                layer.moment_age[index] += layer.trainable
                _correct_for_age(optimizer, layer, index, param, befores[id(param)])
    for layer, tensor, before in saved:
        rows, here = local_rows(tensor)
        torch.where(_mask(layer.trainable[here], rows.ndim), rows, before, out=rows)
    known = {id(tensor) for _, tensor, _ in saved}
    for layer, index, param in guarded:
        for moment in _moments(optimizer, param):
            # made by this very step: it starts at 0 for frozen rows
            if param.grad is not None and id(moment) not in known:
                rows, here = local_rows(moment)
                rows.masked_fill_(~_mask(layer.trainable[here], rows.ndim), 0)
        # a pool may be spread over several optimizers; the last tensor's alone counts the steps
        if index == len(layer.pool()) - 1:
            require_one_mover(layer, optimizer)
            after_step(layer)


def _correct_for_age(
    optimizer: Adam, layer: "KasminaLayer", index: int, param: Tensor, before: Tensor
) -> None:
    """Scale each seed's update from the bias correction of the parameter to that of the seed."""
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    rows, here = local_rows(param)
    # on the device if the optimizer is capturable or fused, else on the CPU: no wait in either case
    steps = torch.as_tensor(optimizer.state[param]["step"])
    age = layer.moment_age[index][here].clamp(min=1)
    beta1, beta2 = group["betas"]
    of_parameter = debias(steps, beta2).sqrt() / debias(steps, beta1)
    factor = debias(age, beta2).sqrt() / debias(age, beta1) / of_parameter
    if layer.young_rate != 1:
        youth = (1 - (age - 1) / layer.young_steps).clamp(min=0)
        factor = factor * (1 + (layer.young_rate - 1) * youth)
    # decoupled weight decay is no part of the update
    decay = group["lr"] * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
    start = before * (1 - decay)
    torch.add(start, (rows - start) * _mask(factor.to(rows.dtype), rows.ndim), out=rows)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
