"""The modes of a chunk site: forward, backward, isolated training, dormant statistics."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import baselines
import torch
from baselines import Chunks
from cases import CODES, Case, Outputs, SkipError, compile_once, energy, weight_bytes, wide
from torch import Tensor

from esper_kernels import Phi
from esper_kernels.ops.statistics import column_statistics
from esper_kernels.support import fits_a_tile

# above this the loop takes minutes
LEGACY_SEEDS = 4096


class Forward:
    """`y = x + alpha * phi(x W1 + b1) W2` and the statistics of x."""

    providers: tuple[str, ...] = (
        "triton",
        "torch",
        "torch.compile",
        "torch.compile sums",
        "legacy",
    )

    def inputs(self, case: Case, device: torch.device) -> Any:
        """Fresh random inputs; the weights keep the size of the activations."""
        S, C, H = case.S, case.C, case.H
        x = torch.randn(case.T, case.D, device=device, dtype=case.torch_dtype)
        # some dead values, so that counting them is tested
        x *= x.abs() > 0.01
        w1 = torch.randn(S, C, H, device=device) / C**0.5
        w2 = torch.randn(S, H, C, device=device) / H**0.5
        b1 = torch.randn(S, H, device=device) / 2
        alpha, _ = case.seeds(device)
        codes = torch.tensor(CODES[case.phi], device=device, dtype=torch.int32)
        phi = codes[torch.arange(S, device=device) % len(codes)].contiguous()
        used = torch.where(phi == Phi.IDENTITY, max(1, H // 2), H).int()
        return Chunks(x, w1, b1, w2, alpha, phi, used)

    def call(self, case: Case, provider: str, inputs: Any) -> Callable[[], Any]:
        """What is timed: one call over these inputs."""
        codes, observe = CODES[case.phi], case.observe
        match provider:
            case "triton":
                kernel = chunk_kernel(case)
                return lambda: kernel.forward(*inputs, observe)
            case "torch":
                return lambda: baselines.chunk_forward(inputs, codes, observe)
            case "torch.compile":
                compiled = compile_once(baselines.chunk_forward)
                return lambda: compiled(inputs, codes, observe)
            case "torch.compile sums":
                if case.C * case.H > 64:
                    raise SkipError("written out as sums this would be thousands of products")
                compiled = compile_once(baselines.chunk_forward_sums)
                return lambda: compiled(inputs, codes, observe)
            case "legacy":
                return legacy_call(case, inputs)
        raise ValueError(f"provider must be one of {self.providers}, but got {provider!r}.")

    def reference(self, case: Case, inputs: Any) -> Outputs:
        """What every provider's outputs are compared with, in fp64."""
        return baselines.chunk_forward(wide(inputs), CODES[case.phi], case.observe)

    def comparable(self, case: Case, inputs: Any, outputs: Outputs) -> Outputs:
        """All of the outputs."""
        return outputs

    def bytes(self, case: Case) -> int:
        """Bytes that must move."""
        return 2 * case.stream_bytes + weight_bytes(case) + 12 * case.D * case.observe

    def flops(self, case: Case) -> int:
        """Floating-point operations of the awake seeds' products."""
        return 4 * case.T * case.num_awake * case.C * case.H


class Backward(Forward):
    """dx, dW1, db1, dW2, dalpha and the gradient's energy per channel."""

    providers: tuple[str, ...] = ("triton", "torch", "torch.compile", "legacy")

    def inputs(self, case: Case, device: torch.device) -> Any:
        """The gradient of the output, the inputs of the forward, and what each seed learns."""
        site = super().inputs(case, device)
        alpha, learning = case.seeds(device)
        dy = torch.randn(case.T, case.D, device=device, dtype=case.torch_dtype)
        return dy, site._replace(alpha_S=alpha), learning

    def call(self, case: Case, provider: str, inputs: Any) -> Callable[[], Any]:
        """See `Forward`."""
        dy, site, learning = inputs
        codes, observe = CODES[case.phi], case.observe
        match provider:
            case "triton":
                kernel = chunk_kernel(case)
                return lambda: kernel.backward(dy, *site, learning, 0, observe)
            case "torch":
                return lambda: baselines.chunk_backward(dy, site, codes, observe)
            case "torch.compile":
                compiled = compile_once(baselines.chunk_backward)
                return lambda: compiled(dy, site, codes, observe)
            case "legacy":
                return legacy_backward(case, dy, site)
        raise ValueError(f"provider must be one of {self.providers}, but got {provider!r}.")

    def reference(self, case: Case, inputs: Any) -> Outputs:
        """See `Forward`; by autograd, so that no formula is checked against itself."""
        dy, site, learning = inputs
        site64 = wide(site)
        leaves = [t.requires_grad_() for t in site64[:5]]
        with torch.enable_grad():
            y, _ = baselines.chunk_forward(site64, CODES[case.phi], False)
            grads = list(torch.autograd.grad(y, leaves, dy.double()))
        # alpha has a gradient where a seed is awake
        grads[4] = grads[4] * (site.alpha_S != 0)
        if case.isolated:
            rows = (learning == 2).nonzero().squeeze(1)
            *own, explained = baselines.chunk_isolated(dy, site64, CODES[case.phi], rows)
            for i, grad in enumerate(own):
                grads[1 + i] = grads[1 + i].index_copy(0, rows, grad)
            explained_S = torch.zeros_like(grads[4]).index_copy(0, rows, explained)
            return (*grads, energy(dy) if case.observe else None, explained_S)
        return (*grads, energy(dy) if case.observe else None)

    def bytes(self, case: Case) -> int:
        """Bytes that must move: x, dy, dx, weights in, gradients of all seeds out."""
        gradients = 4 * case.S * (2 * case.C * case.H + case.H + 1)
        return 3 * case.stream_bytes + weight_bytes(case) + gradients + 4 * case.D * case.observe

    def flops(self, case: Case) -> int:
        """Hidden units again, their gradient, and three gradients of the awake seeds."""
        return 10 * case.T * case.num_awake * case.C * case.H


class Isolated(Backward):
    """The backward with seeds in isolated training: their own objective, on detached input."""

    providers: tuple[str, ...] = ("triton", "torch")

    def call(self, case: Case, provider: str, inputs: Any) -> Callable[[], Any]:
        """See `Forward`."""
        if provider == "triton":
            return super().call(case, provider, inputs)
        dy, site, learning = inputs
        rows, codes = (learning == 2).nonzero().squeeze(1), CODES[case.phi]

        def both() -> Outputs:
            own = baselines.chunk_isolated(dy, site, codes, rows)
            grads = baselines.chunk_backward(dy, site, codes, case.observe)
            weights = (
                g.index_copy(0, rows, o.to(g.dtype))
                for g, o in zip(grads[1:4], own[:3], strict=True)
            )
            return grads[0], *weights, *grads[4:]

        return both

    def flops(self, case: Case) -> int:
        """The target is linear in the gradient, so one pass can keep two sums for each weight."""
        return super().flops(case) + 14 * case.T * case.isolated * case.C * case.H


class Dormant(Forward):
    """Read-only statistics of a site with no seed awake."""

    providers: tuple[str, ...] = ("triton", "torch", "torch.compile")

    def inputs(self, case: Case, device: torch.device) -> Any:
        """An activation."""
        x = torch.randn(case.T, case.D, device=device, dtype=case.torch_dtype)
        return x * (x.abs() > 0.01)

    def call(self, case: Case, provider: str, inputs: Any) -> Callable[[], Any]:
        """See `Forward`."""
        what: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "triton": lambda: column_statistics,
            "torch": lambda: baselines.statistics,
            "torch.compile": lambda: compile_once(baselines.statistics),
        }
        function = what[provider]()
        return lambda: (function(inputs),)

    def reference(self, case: Case, inputs: Any) -> Outputs:
        """See `Forward`."""
        return (baselines.statistics(inputs.double()),)

    def bytes(self, case: Case) -> int:
        """One read of the activation."""
        return case.stream_bytes + 12 * case.D

    def flops(self, case: Case) -> int:
        """None that a matrix unit would do."""
        return 0


def chunk_kernel(case: Case) -> Any:
    """The module that serves chunks of this size: fine ones share tiles, coarse ones do not."""
    fine = fits_a_tile(case.C, case.H, case.torch_dtype)
    return import_module(f"esper_kernels.ops.{'chunk' if fine else 'coarse'}")


def legacy_seeds(case: Case, site: Chunks) -> tuple[list[Any], list[float]]:
    """Separate little weights of each seed, and their alphas as Python numbers."""
    if case.S > LEGACY_SEEDS:
        raise SkipError(f"a loop over more than {LEGACY_SEEDS:,} seeds takes minutes")
    if len(CODES[case.phi]) > 1:
        raise SkipError("the loop is timed with one function")
    weights = (w.to(site.x_TD.dtype).unbind() for w in site[1:4])
    return [tuple(w.clone() for w in seed) for seed in zip(*weights, strict=True)], (
        site.alpha_S.tolist()
    )


def legacy_call(case: Case, site: Chunks) -> Callable[[], Any]:
    """The loop's forward; it has no statistics."""
    seeds, alphas = legacy_seeds(case, site)
    code = CODES[case.phi][0]
    return lambda: (baselines.chunk_loop(site.x_TD, seeds, alphas, code), None)


def legacy_backward(case: Case, dy: Tensor, site: Chunks) -> Callable[[], Any]:
    """The loop's backward by autograd; its forward is not timed."""
    seeds, alphas = legacy_seeds(case, site)
    x = site.x_TD.detach().requires_grad_()
    leaves = [x, *(w.requires_grad_() for seed in seeds for w in seed)]
    with torch.enable_grad():
        y = baselines.chunk_loop(x, seeds, alphas, CODES[case.phi][0])

    def backward() -> Outputs:
        dx, *grads = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        return dx, *(torch.stack(grads[i::3]) for i in range(3)), None, None

    return backward
