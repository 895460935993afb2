"""The mode of the optimizer: one AdamW step of a site's pool, per seed."""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Outputs
from torch import Tensor

from esper_kernels.reference import pool_step as reference
from esper_kernels.reference.pool_step import PoolTensor, Ramp, Rule, SeedFlags

RULE = Rule(adam=True, lr=1e-3, decay=0.01)


class Optimizer:
    """AdamW over the pool: frozen rows stay, each seed has its own learning rate and age.

    `torch fused` is `torch.optim.AdamW(fused=True)`, which knows nothing of seeds and moves all.
    """

    providers: tuple[str, ...] = ("triton", "torch", "torch fused")

    def inputs(self, case: Case, device: torch.device) -> Any:
        """A pool with gradients, moments of seeds aged 1 to 100, and what each seed does."""
        S, C, H = case.S, case.C, case.H
        alpha, learning = case.seeds(device)
        pool = tuple(_tensor(shape, device) for shape in ((S, C, H), (S, H), (S, H, C)))
        flags = SeedFlags(
            trainable=learning > 0,
            fresh=torch.zeros(3, S, dtype=torch.bool, device=device),
            lr_scale=torch.rand(S, device=device) + 0.5,
            steps=torch.zeros(1, dtype=torch.int32, device=device),
            arrivals=torch.zeros(S, dtype=torch.int32, device=device),
        )
        ramping, ramped_steps, progress = torch.zeros(3, S, device=device).unbind()
        linear = torch.zeros(S, dtype=torch.bool, device=device)
        pace = torch.ones(S, device=device)
        ramp = Ramp(ramping, pace, linear, ramped_steps, progress, alpha, 100)
        return pool, flags, ramp

    def call(self, case: Case, provider: str, inputs: Any) -> Callable[[], Any]:
        """See `Mode`; returns the weights and the second moments, changed in place."""
        pool, flags, ramp = inputs
        if provider == "torch fused":
            return _fused(pool)
        if provider == "triton":
            from esper_kernels.ops.pool_step import pool_step as step
        else:
            step = reference.pool_step

        def call() -> Outputs:
            step(pool, flags, ramp, RULE)
            return tuple(t.weights for t in pool) + tuple(t.second for t in pool)

        return call

    def reference(self, case: Case, inputs: Any) -> Outputs:
        """The plain step in fp64, on copies: the timed one changes its inputs."""
        pool, flags, ramp = inputs
        copies = [PoolTensor._make([*map(_copy64, t[:4]), t.age.clone()]) for t in pool]
        flags, ramp = (type(part)(*(_copy(t) for t in part)) for part in (flags, ramp))
        reference.pool_step(tuple(copies), flags, ramp, RULE)  # type: ignore[arg-type]
        return tuple(t.weights for t in copies) + tuple(t.second for t in copies)

    def comparable(self, case: Case, inputs: Any, outputs: Outputs) -> Outputs:
        """Nothing of the fused optimizer: it computes something else."""
        return outputs

    def bytes(self, case: Case) -> int:
        """Weights and two moments in and out, gradients in, of the seeds that train."""
        each = 2 * case.C * case.H + case.H
        return 28 * case.num_awake * each + 17 * case.S

    def flops(self, case: Case) -> int:
        """None that a matrix unit would do."""
        return 0


def _tensor(shape: tuple[int, ...], device: torch.device) -> PoolTensor:
    weights, grad, first = torch.randn(3, *shape, device=device).unbind()
    age = torch.randint(1, 100, shape[:1], device=device).float()
    return PoolTensor(weights, grad, first, torch.rand(shape, device=device), age)


def _fused(pool: tuple[PoolTensor, ...]) -> Callable[[], Any]:
    params = [torch.nn.Parameter(t.weights.clone()) for t in pool]
    for param, tensor in zip(params, pool, strict=True):
        param.grad = tensor.grad
    # a rate and a count of steps that live on the device, so that a graph can hold the step
    optimizer = torch.optim.AdamW(params, lr=RULE.lr, fused=True, capturable=params[0].is_cuda)

    def call() -> Outputs:
        optimizer.step()
        return ()

    return call


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _copy64(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value.clone()
