"""Keeps frozen and dormant seeds still under any optimizer, weight decay and moments included.

A pool of seeds is one parameter, so an optimizer would also move the rows of frozen seeds: by
weight decay, by moments that have not faded. Hooks around every `Optimizer.step` put those rows
back, clear the moments of seeds that were just woken, and move the grafts one step on. So a
stage change is data only, in the user's own training loop as in ours.

Adam divides its moments by `1 - beta^t`, where t counts the steps of the whole parameter. For a
seed woken late the moments are young and t is old, so its first steps would be up to six times too
large. Each seed therefore gets the correction of its own age. Source: Kingma and Ba, "Adam", ICLR
2015, section 3.
"""

import math
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

if TYPE_CHECKING:
    from esper.seeds.kasmina import KasminaLayer

# a parameter of a pool: (layer, index in `layer.pool()`, parameter)
Guarded: TypeAlias = "tuple[KasminaLayer, int, Tensor]"
# rows to put back after the step: (layer, tensor, its values before the step)
Saved: TypeAlias = "tuple[KasminaLayer, Tensor, Tensor]"

_layers: "weakref.WeakSet[KasminaLayer]" = weakref.WeakSet()
# what a step in progress is about to move
_in_step: weakref.WeakKeyDictionary[Optimizer, tuple[list[Guarded], list[Saved]]] = (
    weakref.WeakKeyDictionary()
)


def watch(layer: "KasminaLayer") -> None:
    """Guard the layer's pool from now on, for as long as the layer lives."""
    _layers.add(layer)


def _guarded(optimizer: Optimizer) -> list[Guarded]:
    if not _layers:
        return []
    ours = {id(p): (layer, i, p) for layer in _layers for i, p in enumerate(layer.pool())}
    params = (p for group in optimizer.param_groups for p in group["params"])
    return [ours[id(p)] for p in params if id(p) in ours]


def _moments(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    """State of the optimizer that has one row per seed, factored moments included."""
    state = optimizer.state.get(param, {}).values()
    return [
        v for v in state if isinstance(v, Tensor) and v.ndim == param.ndim and len(v) == len(param)
    ]


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    guarded, saved = _guarded(optimizer), []
    # args holds the optimizer itself, then its closure if any
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    for layer, index, param in guarded:
        moments = _moments(optimizer, param)
        if layer.any_fresh:
            for moment in moments:
                moment[layer.fresh[index]] = 0
            layer.moment_age[index, layer.fresh[index]] = 0
            layer.fresh[index] = False
        # without a gradient, of now or of the closure, the optimizer leaves the parameter alone
        if param.grad is not None or closure is not None:
            saved += [(layer, tensor, tensor.clone()) for tensor in (param, *moments)]
    _in_step[optimizer] = guarded, saved


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    guarded, saved = _in_step.pop(optimizer, ([], []))
    if isinstance(optimizer, Adam):
        befores = {id(tensor): before for _, tensor, before in saved}
        for layer, index, param in guarded:
            if id(param) in befores and layer.any_trainable:
                layer.moment_age[index] += layer.trainable
                _correct_for_age(optimizer, layer, index, param, befores[id(param)])
    for layer, tensor, before in saved:
        torch.where(layer.trainable_like(tensor), tensor, before, out=tensor)
    known = {id(tensor) for _, tensor, _ in saved}
    for layer, index, param in guarded:
        for moment in _moments(optimizer, param):
            # made by this very step: it starts at 0 for frozen rows
            if param.grad is not None and id(moment) not in known:
                moment.masked_fill_(~layer.trainable_like(moment), 0)
        # a pool may be spread over several optimizers; the last tensor's alone counts the steps
        if index == len(layer.pool()) - 1:
            layer.after_optimizer_step()


def _correct_for_age(
    optimizer: Adam, layer: "KasminaLayer", index: int, param: Tensor, before: Tensor
) -> None:
    """Scale each seed's update from the bias correction of the parameter to that of the seed."""
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    steps, age = float(optimizer.state[param]["step"]), layer.moment_age[index].clamp(min=1)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    of_parameter = math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
    factor = torch.sqrt(1 - beta2**age) / (1 - beta1**age) / of_parameter
    # decoupled weight decay is no part of the update
    decay = group["lr"] * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
    start = before * (1 - decay)
    shape = (-1, *[1] * (param.ndim - 1))
    torch.add(start, (param - start) * factor.to(param.dtype).view(shape), out=param)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
