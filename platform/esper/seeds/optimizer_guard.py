"""Keeps frozen and dormant seeds still under any optimizer, weight decay and moments included.

A pool of seeds is one parameter, so an optimizer would also move the rows of frozen seeds: by
weight decay, by moments that have not faded. Hooks around every `Optimizer.step` put those rows
back, clear the moments of seeds that were just woken, and move the grafts one step on. So a
stage change is data only, in the user's own training loop as in ours.
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

if TYPE_CHECKING:
    from esper.seeds.kasmina import KasminaLayer

_layers: "weakref.WeakSet[KasminaLayer]" = weakref.WeakSet()
# rows to put back after the step: (layer, tensor, its values before the step)
_saved: "weakref.WeakKeyDictionary[Optimizer, list[tuple[KasminaLayer, Tensor, Tensor]]]" = (
    weakref.WeakKeyDictionary()
)


def watch(layer: "KasminaLayer") -> None:
    """Guard the layer's pool from now on, for as long as the layer lives."""
    _layers.add(layer)


def _guarded(optimizer: Optimizer) -> "list[tuple[KasminaLayer, Tensor]]":
    if not _layers:
        return []
    ours = {id(p): (layer, p) for layer in _layers for p in layer.pool()}
    params = (p for group in optimizer.param_groups for p in group["params"])
    return [ours[id(p)] for p in params if id(p) in ours]


def _moments(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    """State of the optimizer that has one value per weight."""
    state = optimizer.state.get(param, {}).values()
    return [v for v in state if isinstance(v, Tensor) and v.shape == param.shape]


@torch.no_grad()
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    saved = []
    for layer, param in _guarded(optimizer):
        moments = _moments(optimizer, param)
        if layer.fresh_rows:
            for moment in moments:
                moment[layer.fresh_rows] = 0
        # without a gradient the optimizer does not touch the parameter
        if param.grad is not None:
            saved += [(layer, tensor, tensor.clone()) for tensor in (param, *moments)]
    _saved[optimizer] = saved


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    saved = _saved.pop(optimizer, [])
    for layer, tensor, before in saved:
        torch.where(layer.trainable_like(tensor), tensor, before, out=tensor)
    known = {id(tensor) for _, tensor, _ in saved}
    guarded = _guarded(optimizer)
    for layer, param in guarded:
        for moment in _moments(optimizer, param):
            # made by this very step: it starts at 0 for frozen rows
            if param.grad is not None and id(moment) not in known:
                moment.mul_(layer.trainable_like(moment))
    for layer in {id(layer): layer for layer, _ in guarded}.values():
        layer.after_optimizer_step()


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
