"""One optimizer step of a site's pool in plain PyTorch; defines what is correct.

Shapes: S = seeds, n = the seeds whose weights this process holds (all, unless the pool is
sharded).

AdamW, for the rows of a seed that trains, `t` being the age of its moments after this step:

    m = b1 m + (1 - b1) g          w = (1 - lr decay) w
    v = b2 v + (1 - b2) g^2        w = w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

SGD: `m = momentum m + g; w = w - lr m`. Where the decay is not decoupled, `g = g + decay w` comes
first. Sources: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
algorithms 1 and 2; `torch.optim.AdamW`, `torch.optim.SGD`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PoolTensor(NamedTuple):
    """One tensor of a pool with its optimizer state.

    Attributes:
        weights: `[n, ...]`, fp32 or fp64, contiguous.
        grad: Like the weights; None leaves the tensor alone.
        first: First moment or momentum, like the weights; None for SGD without momentum.
        second: Second moment, like the weights; AdamW only.
        age: `[S]` fp32: steps that each seed's moments have gathered; AdamW only.
    """

    weights: Tensor
    grad: Tensor | None
    first: Tensor | None
    second: Tensor | None
    age: Tensor | None


class SeedFlags(NamedTuple):
    """What the step does with each seed.

    Attributes:
        trainable: `[S]` bool; weights and moments of the others do not move.
        fresh: `[3, S]` bool, one row a tensor: moments to begin again at 0; cleared by the step.
        lr_scale: `[S]` fp32, multiplies the learning rate.
        steps: `[1]` int32, counts the steps.
        arrivals: `[S]` int32, all 0; used by the kernel and left as it was.
    """

    trainable: Tensor
    fresh: Tensor
    lr_scale: Tensor
    steps: Tensor
    arrivals: Tensor


class Ramp(NamedTuple):
    """The grafts, which move on with the step; see `move_grafts`.

    Attributes:
        ramping: `[S]` fp32, 1 for the seeds that are being grafted, else 0.
        pace: `[S]` fp32, steps of the ramp in a step of the optimizer.
        cosine: `[S]` bool, the shape of the ramp; else linear.
        ramped_steps: `[S]` fp32, steps of the ramp so far.
        progress: `[S]` fp32 in 0..1.
        alpha: `[S]` fp32 in 0..1.
        ramp_steps: Length of a ramp, in steps.
    """

    ramping: Tensor
    pace: Tensor
    cosine: Tensor
    ramped_steps: Tensor
    progress: Tensor
    alpha: Tensor
    ramp_steps: int


class Rule(NamedTuple):
    """How weights move.

    Attributes:
        adam: AdamW; else SGD.
        lr: Learning rate; a one-element tensor on the pool's device to change it in a CUDA graph.
        decay: Weight decay.
        decoupled: Whether the decay acts on the weights themselves; else it joins the gradient.
        betas: Of AdamW.
        eps: Of AdamW.
        momentum: Of SGD.
    """

    adam: bool
    lr: float | Tensor
    decay: float = 0.0
    decoupled: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0


@torch.no_grad()
def pool_step(
    pool: tuple[PoolTensor, PoolTensor, PoolTensor],
    flags: SeedFlags,
    ramp: Ramp,
    rule: Rule,
    first_row: int = 0,
) -> None:
    """Step one site's pool in place; see `esper_kernels.ops.pool_step.pool_step`."""
    for index, tensor in enumerate(pool):
        if flags.trainable.is_cpu:
            _step_rows_that_train(tensor, flags, flags.fresh[index], rule, first_row)
        else:
            _step_under_mask(tensor, flags, flags.fresh[index], rule, first_row)
    flags.fresh.fill_(False)
    flags.steps.add_(1)
    move_grafts(ramp)


def move_grafts(ramp: Ramp) -> None:
    """Move every graft one step on, in place, without reading anything back from a device.

    Whole steps are counted, so that a ramp ends at exactly 1.
    """
    is_ramping = ramp.ramping > 0
    if is_ramping.is_cpu and not is_ramping.any():
        return
    ramp.ramped_steps.add_(ramp.ramping * ramp.pace)
    # by a tensor: a GPU multiplies by the reciprocal of a number, and 49 * (1 / 49) is below 1
    steps = torch.full((), float(ramp.ramp_steps), device=ramp.ramped_steps.device)
    progress = (ramp.ramped_steps / steps).clamp_(max=1.0)
    eased = (1 - torch.cos(math.pi * progress)) / 2
    alpha = torch.where(ramp.cosine, eased, progress)
    torch.where(is_ramping, progress, ramp.progress, out=ramp.progress)
    torch.where(is_ramping, alpha, ramp.alpha, out=ramp.alpha)


def debias(age: Tensor, beta: float | Tensor) -> Tensor:
    """`1 - beta^age` without cancellation, for ages of at least 1."""
    if isinstance(beta, Tensor):
        return -torch.expm1(age * beta.log())
    return -torch.expm1(age * (math.log(beta) if beta else -math.inf))


def _step_rows_that_train(
    tensor: PoolTensor, flags: SeedFlags, fresh: Tensor, rule: Rule, first_row: int
) -> None:
    """On a CPU data is read at no cost: the seeds that do not train are not even looked at."""
    here = slice(first_row, first_row + len(tensor.weights))
    restarted = fresh[here].nonzero().squeeze(1)
    if restarted.numel():
        for moment in (tensor.first, tensor.second):
            if moment is not None:
                moment.index_fill_(0, restarted, 0.0)
    if tensor.age is not None:
        tensor.age.masked_fill_(fresh, 0.0)
    if tensor.grad is None:
        return
    if tensor.age is not None:
        tensor.age.add_(flags.trainable)
    rows = flags.trainable[here].nonzero().squeeze(1)
    if rows.numel() == len(tensor.weights):
        _move(tensor, flags.lr_scale[here], here, rule)
    elif rows.numel():
        moving = [tensor.weights, tensor.first, tensor.second]
        moved = [None if t is None else t[rows] for t in moving]
        assert moved[0] is not None
        part = PoolTensor(moved[0], tensor.grad[rows], moved[1], moved[2], tensor.age)
        _move(part, flags.lr_scale[here][rows], rows + first_row, rule)
        for whole, new in zip(moving, moved, strict=True):
            if whole is not None and new is not None:
                whole.index_copy_(0, rows, new)


def _step_under_mask(
    tensor: PoolTensor, flags: SeedFlags, fresh: Tensor, rule: Rule, first_row: int
) -> None:
    """All rows are computed and those that train are kept: no data decides anything here."""
    here = slice(first_row, first_row + len(tensor.weights))
    shape = (-1, *[1] * (tensor.weights.ndim - 1))
    for moment in (tensor.first, tensor.second):
        if moment is not None:
            moment.masked_fill_(fresh[here].view(shape), 0.0)
    if tensor.age is not None:
        tensor.age.masked_fill_(fresh, 0.0)
    if tensor.grad is None:
        return
    if tensor.age is not None:
        tensor.age.add_(flags.trainable)
    moving = [tensor.weights, tensor.first, tensor.second]
    moved = [None if t is None else t.clone() for t in moving]
    assert moved[0] is not None
    part = PoolTensor(moved[0], tensor.grad, moved[1], moved[2], tensor.age)
    _move(part, flags.lr_scale[here], here, rule)
    for whole, new in zip(moving, moved, strict=True):
        if whole is not None and new is not None:
            torch.where(flags.trainable[here].view(shape), new, whole, out=whole)


def _move(tensor: PoolTensor, lr_scale: Tensor, rows: Tensor | slice, rule: Rule) -> None:
    """The formulas above for every row given, in place; `rows` are theirs in `age`."""
    weights, grad, first, second, age = tensor
    assert grad is not None
    shape = (-1, *[1] * (weights.ndim - 1))
    rate = (rule.lr * lr_scale).to(weights.dtype)
    if rule.decay and rule.decoupled:
        weights.mul_((1 - rate * rule.decay).view(shape))
    elif rule.decay:
        grad = grad.add(weights, alpha=rule.decay)
    if not rule.adam:
        if first is not None:
            grad = first.mul_(rule.momentum).add_(grad)
        weights.sub_(grad * rate.view(shape))
        return
    assert first is not None
    assert second is not None
    assert age is not None
    beta1, beta2 = rule.betas
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # rows that do not train are computed under a mask, and their age may be 0
    t = age[rows].clamp(min=1).to(weights.dtype)
    spread = second.sqrt().div_(debias(t, beta2).sqrt().view(shape)).add_(rule.eps)
    weights.sub_((first / spread).mul_((rate / debias(t, beta1)).view(shape)))
