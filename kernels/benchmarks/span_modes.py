"""The modes of a span site: forward and backward of its awake units.

The baselines get the awake units only, gathered beforehand: their best case.
"""

from collections.abc import Callable
from typing import Any

import baselines
import torch
from baselines import Span
from cases import CODES, Case, Outputs, compile_once, energy, weight_bytes, wide


class SpanForward:
    """`y = z + (phi(x W_in + b) * alpha) W_out` and the statistics of z."""

    providers: tuple[str, ...] = ("triton", "torch", "torch.compile")

    def inputs(self, case: Case, device: torch.device) -> Any:
        """See `Mode`."""
        T, S, D, dtype = case.T, case.S, case.D, case.torch_dtype
        x, z = torch.randn(2, T, D, device=device, dtype=dtype).unbind()
        z *= z.abs() > 0.01
        w_in = torch.randn(S, D, device=device) / D**0.5
        w_out = torch.randn(S, D, device=device) / max(1, case.num_awake) ** 0.5
        alpha, _ = case.seeds(device)
        codes = torch.tensor(CODES[case.phi], device=device, dtype=torch.int32)
        phi = codes[torch.arange(S, device=device) % len(codes)].contiguous()
        return Span(x, z, w_in, torch.randn(S, device=device) / 2, w_out, alpha, phi)

    def call(self, case: Case, provider: str, inputs: Any) -> Callable[[], Any]:
        """See `Mode`."""
        codes, observe = CODES[case.phi], case.observe
        if provider == "triton":
            from esper_kernels.ops import span

            # as in a training step: the backward's inputs are kept
            arguments = (*inputs, (inputs.alpha_S != 0).int(), observe, True)
            return lambda: span.forward(*arguments)[:2]
        few = awake_units(inputs)
        if provider == "torch":
            return lambda: baselines.span_forward(few, codes, observe)
        compiled = compile_once(baselines.span_forward)
        return lambda: compiled(few, codes, observe)

    def reference(self, case: Case, inputs: Any) -> Outputs:
        """See `Mode`."""
        return baselines.span_forward(wide(awake_units(inputs)), CODES[case.phi], case.observe)

    def comparable(self, case: Case, inputs: Any, outputs: Outputs) -> Outputs:
        """All of the outputs."""
        return outputs

    def bytes(self, case: Case) -> int:
        """x and z in, y out, the awake units' weights in."""
        return 3 * case.stream_bytes + weight_bytes(case) + 12 * case.D * case.observe

    def flops(self, case: Case) -> int:
        """Two matrix products."""
        return 4 * case.T * case.num_awake * case.D


class SpanBackward(SpanForward):
    """dx, dW_in, db, dW_out, dalpha and the gradient's energy; the gradient of z is dy itself.

    `x W_in + b` is kept from the forward, by every provider.
    """

    def inputs(self, case: Case, device: torch.device) -> Any:
        """The gradient of the output, and the inputs of the forward."""
        site = super().inputs(case, device)
        dy = torch.randn(case.T, case.D, device=device, dtype=case.torch_dtype)
        learning = (site.alpha_S != 0).int()
        nothing = torch.empty(0, device=device, dtype=case.torch_dtype)
        return dy, site, learning, nothing, torch.zeros((), device=device)

    def call(self, case: Case, provider: str, inputs: Any) -> Callable[[], Any]:
        """See `Mode`."""
        dy, site, learning, nothing, z_sq = inputs
        codes, observe = CODES[case.phi], case.observe
        if provider == "triton":
            from esper_kernels.ops import span

            *_, kept = span.forward(*site, learning, observe, True)
            arguments = (dy, site.x_TI, nothing, z_sq, *site[2:], *kept, 0, observe)
            return lambda: span.backward(*arguments)
        few = awake_units(site)
        hidden = baselines.span_hidden(few)
        if provider == "torch":
            return lambda: baselines.span_backward(dy, few, hidden, codes, observe)
        compiled = compile_once(baselines.span_backward)
        return lambda: compiled(dy, few, hidden, codes, observe)

    def reference(self, case: Case, inputs: Any) -> Outputs:
        """See `Mode`; by autograd."""
        dy, site, *_ = inputs
        few = wide(awake_units(site))
        names = ("x_TI", "w_in_SI", "b_S", "w_out_SO", "alpha_S")
        leaves = [getattr(few, name).requires_grad_() for name in names]
        with torch.enable_grad():
            y, _ = baselines.span_forward(few, CODES[case.phi], False)
            grads = torch.autograd.grad(y, leaves, dy.double())
        return (*grads, energy(dy) if case.observe else None)

    def comparable(self, case: Case, inputs: Any, outputs: Outputs) -> Outputs:
        """The rows of the awake units; all others must be 0."""
        alpha = inputs[1].alpha_S
        if outputs[1] is None or len(outputs[1]) != case.S:
            return outputs
        rows = alpha.nonzero().squeeze(1)
        dx, *grads = outputs
        few = [g if g is None or len(g) != case.S else g[rows] for g in grads[:4]]
        return dx, *few, *grads[4:]

    def bytes(self, case: Case) -> int:
        """x, dy and the kept hidden units in, dx out, weights in, gradients of all units out."""
        gradients = 4 * case.S * (2 * case.D + 2)
        gradients += case.T * case.num_awake * case.torch_dtype.itemsize
        return 3 * case.stream_bytes + weight_bytes(case) + gradients + 4 * case.D * case.observe

    def flops(self, case: Case) -> int:
        """Four matrix products."""
        return 8 * case.T * case.num_awake * case.D


def awake_units(site: Span) -> Span:
    """The site with its awake units only."""
    rows = site.alpha_S.nonzero().squeeze(1)
    x, z, *pool = site
    return Span(x, z, *(t[rows] for t in pool))
