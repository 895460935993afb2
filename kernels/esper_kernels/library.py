"""The seed lattice as PyTorch operators: `torch.ops.esper.*`, with gradients and fake versions.

An operator is opaque to `torch.compile`, so that a model with a lattice stays one graph, and
which seeds are awake is data. Nothing is mutated: what a pass measures arrives as the gradient
of `probe` (`esper_kernels.probe`).

Registered by hand rather than by `torch.library.custom_op`, whose wrappers cost more host time
than the kernels take.

Shapes: T = rows, D = channels, C = D / S, H = hidden units, I and O = features of a span,
S = seeds.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from esper_kernels.learning import ISOLATED, RECONSTRUCTION
from esper_kernels.probe import probe_size
from esper_kernels.reference import backward as reference_backward
from esper_kernels.reference import chunk as reference_chunk
from esper_kernels.reference import span as reference_span
from esper_kernels.reference import statistics as reference_statistics
from esper_kernels.support import fits_a_tile

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_OPTIONS = "int objective, bool observe, bool plain"
_CHUNK = "Tensor w1, Tensor b1, Tensor w2, Tensor alpha, Tensor phi, Tensor hidden, Tensor learning"
_SPAN = "Tensor w_in, Tensor b, Tensor w_out, Tensor alpha, Tensor phi, Tensor learning"
# what the kernels' forward keeps for their backward (`esper_kernels.ops.span.Kept`); else empty
_KEPT = "Tensor hidden, Tensor kept_w_in, Tensor kept_w_out, Tensor norm_sq, Tensor table"
_SCHEMAS = (
    f"chunk_seeds(Tensor x, {_CHUNK}, Tensor? probe, {_OPTIONS}) -> (Tensor y, Tensor stats)",
    f"chunk_seeds_backward(Tensor dy, Tensor x, {_CHUNK}, Tensor stats, {_OPTIONS})"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor dalpha, Tensor telemetry)",
    f"span_seeds(Tensor x, Tensor z, {_SPAN}, Tensor? probe, {_OPTIONS}, bool keep)"
    f" -> (Tensor y, Tensor stats, {_KEPT})",
    f"span_seeds_backward(Tensor dy, Tensor x, Tensor z, {_SPAN}, Tensor stats, {_KEPT},"
    f" {_OPTIONS})"
    " -> (Tensor dx, Tensor dw_in, Tensor db, Tensor dw_out, Tensor dalpha, Tensor telemetry)",
)
_library = torch.library.Library("esper", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def use_triton(x: Tensor, weights: Tensor, plain: bool) -> bool:
    """True if the kernels run; else the plain implementation does.

    The plain one serves the CPU, fp64, and functions of the hidden units that only exist in
    Python.
    """
    if plain or weights.dtype == torch.float64:
        return False
    # without a GPU, only tests that already imported the dispatcher ask for kernels
    if not x.is_cuda and "esper_kernels.ops.dispatch" not in sys.modules:
        return False
    from esper_kernels.ops import dispatch

    return dispatch.use_triton(x)


def _chunk_kernels(w1: Tensor, dtype: torch.dtype) -> Any:
    from esper_kernels.ops import chunk, coarse

    return chunk if fits_a_tile(w1.shape[1], w1.shape[2], dtype) else coarse


def _launch(kernels: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """Call a launcher with contiguous tensors, on the device of x."""
    args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in (x, *args))
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return kernels(*args)
    return kernels(*args)


def _wide(*weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(w.float() for w in weights)


def _statistics(rows: Tensor, observe: bool) -> Tensor:
    if observe:
        return reference_statistics.column_statistics(rows)
    return rows.new_empty(3, 0, dtype=torch.float32)


def _telemetry(
    stats: Tensor, explained: Tensor, learning: Tensor, dy: Tensor, observe: bool
) -> Tensor:
    """What one pass measured, in the layout of `probe`."""
    isolated = (learning == ISOLATED).any().float().view(1)
    rows, channels = dy.shape
    if not observe:
        unseen = explained.new_zeros(4 * channels), explained.new_zeros(2)
        return torch.cat([unseen[0], explained, unseen[1], isolated])
    energy = reference_statistics.gradient_energy(dy)
    counts = explained.new_full((1,), rows), explained.new_ones(1)
    return torch.cat([stats.reshape(-1), energy, explained, *counts, isolated])


def _packed(
    stats: Tensor, grad_sq: Tensor, explained: Tensor, learning: Tensor, dy: Tensor
) -> Tensor:
    """The same of what the kernels measured."""
    from esper_kernels.ops import telemetry

    told: Tensor = _launch(telemetry.pack, stats, grad_sq, explained, learning, *dy.shape)
    return told


def _chunk_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, phi: Tensor, hidden: Tensor,
    learning: Tensor, probe: Tensor | None, objective: int, observe: bool, plain: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if use_triton(x, w1, plain):
        kernels = _chunk_kernels(w1, x.dtype)
        pool = _wide(w1, b1, w2)
        y, stats = _launch(kernels.forward, x, *pool, alpha, phi, hidden, observe)
        return y, stats
    with _exact(x):
        y = reference_chunk.chunk_seeds(x, w1, b1, w2, alpha, phi, hidden)
        return _own(y, x), _statistics(x, observe)


def _chunk_backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, phi: Tensor,
    hidden: Tensor, learning: Tensor, stats: Tensor, objective: int, observe: bool, plain: bool,
) -> Gradients:  # fmt: skip
    if use_triton(x, w1, plain):
        kernels = _chunk_kernels(w1, x.dtype)
        dx, *grads, dalpha, grad_sq, explained = _launch(
            kernels.backward, dy, x, *_wide(w1, b1, w2), alpha, phi, hidden, learning,
            objective, observe,
        )  # fmt: skip
        told = _packed(stats, grad_sq, explained, learning, dy)
    else:
        with _exact(x):
            dx, *grads, dalpha, explained = reference_backward.chunk_seeds_backward(
                dy, x, w1, b1, w2, alpha, phi, hidden, learning, objective
            )
            told = _telemetry(stats, explained, learning, dy, observe)
    dw1, db1, dw2 = (g.to(w.dtype) for g, w in zip(grads, (w1, b1, w2), strict=True))
    return _own(dx, dy), dw1, db1, dw2, dalpha, told


def _span_forward(
    x: Tensor, z: Tensor, w_in: Tensor, b: Tensor, w_out: Tensor, alpha: Tensor, phi: Tensor,
    learning: Tensor, probe: Tensor | None, objective: int, observe: bool, plain: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if use_triton(z, w_in, plain):
        from esper_kernels.ops import span

        # under autocast, the span's input may be wider than its output
        y, stats, kept = _launch(
            span.forward, x.to(z.dtype), z, *_wide(w_in, b, w_out), alpha, phi, learning, observe,
            keep,
        )  # fmt: skip
        return y, stats, *(kept or _nothing_kept(z))
    with _exact(x):
        y = reference_span.span_seeds(x, z, w_in, b, w_out, alpha, phi)
        return _own(y, z), _statistics(z, observe), *_nothing_kept(z)


def _nothing_kept(z: Tensor) -> tuple[Tensor, ...]:
    words = (z.new_empty(0) for _ in range(3))
    return *words, z.new_empty(0, dtype=torch.float32), z.new_empty(0, dtype=torch.int32)


def _span_backward(
    dy: Tensor, x: Tensor, z: Tensor, w_in: Tensor, b: Tensor, w_out: Tensor, alpha: Tensor,
    phi: Tensor, learning: Tensor, stats: Tensor, hidden: Tensor, kept_w_in: Tensor,
    kept_w_out: Tensor, norm_sq: Tensor, table: Tensor, objective: int, observe: bool, plain: bool,
) -> Gradients:  # fmt: skip
    if use_triton(dy, w_in, plain):
        from esper_kernels.ops import span

        if not table.numel():
            raise ValueError(
                "esper::span_seeds_backward needs what esper::span_seeds kept, but got nothing; "
                "call the forward with keep=True."
            )
        z_sq = stats[1].sum() if observe else torch.linalg.vector_norm(z, dtype=torch.float32) ** 2
        reads_z = objective == RECONSTRUCTION
        dx, *grads, dalpha, grad_sq, explained = _launch(
            span.backward, dy, x.to(dy.dtype), z if reads_z else z.new_empty(0), z_sq,
            *_wide(w_in, b, w_out), alpha, phi, hidden, kept_w_in, kept_w_out, norm_sq, table,
            objective, observe,
        )  # fmt: skip
        told = _packed(stats, grad_sq, explained, learning, dy)
    else:
        with _exact(x):
            dx, *grads, dalpha, explained = reference_backward.span_seeds_backward(
                dy, x, z, w_in, b, w_out, alpha, phi, learning, objective
            )
            told = _telemetry(stats, explained, learning, dy, observe)
    dw_in, db, dw_out = (g.to(w.dtype) for g, w in zip(grads, (w_in, b, w_out), strict=True))
    dx = _own(dx.to(x.dtype), dy)
    return dx, dw_in, db, dw_out, dalpha, told


def _exact(x: Tensor) -> AbstractContextManager[Any]:
    # autocast would compute in half precision what is promised in fp32
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _own(result: Tensor, source: Tensor) -> Tensor:
    """The result in its own contiguous memory: an operator must not return its argument."""
    return result.clone(memory_format=torch.contiguous_format) if result is source else (
        result.contiguous()
    )  # fmt: skip


def _fake_forward(y: Tensor, observe: bool) -> tuple[Tensor, Tensor]:
    stats = y.new_empty(3, y.shape[1] if observe else 0, dtype=torch.float32)
    return torch.empty_like(y, memory_format=torch.contiguous_format), stats


def _fake_backward(dy: Tensor, x: Tensor, *pool_and_alpha: Tensor) -> tuple[Tensor, ...]:
    size = probe_size(dy.shape[1], pool_and_alpha[0].shape[0])
    like = (x, *pool_and_alpha)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]
    return (*grads, dy.new_empty(size, dtype=torch.float32))


def _fake_chunk(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_forward(x, rest[-2])


def _fake_span(
    x: Tensor, z: Tensor, w_in: Tensor, b: Tensor, w_out: Tensor, alpha: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    observe, plain, keep = rest[-3:]
    kept = _nothing_kept(z)
    if keep and use_triton(z, w_in, plain):
        from esper_kernels.ops import span

        shapes = span.kept_shapes(len(x), w_in.shape[1], z.shape[1], len(w_in), z.dtype)
        kept = tuple(k.new_empty(shape) for k, shape in zip(kept, shapes, strict=True))
    return *_fake_forward(z, observe), *kept


def _fake_chunk_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_backward(dy, x, *rest[:4])


def _fake_span_backward(dy: Tensor, x: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_backward(dy, x, *rest[:4])


class _ChunkSeeds(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with _AutoDispatchBelowAutograd():
            y, stats = torch.ops.esper.chunk_seeds.default(*args)
        *tensors, _, ctx.objective, ctx.observe, ctx.plain = args
        return _saved(ctx, tensors, y, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        options = ctx.objective, ctx.observe, ctx.plain
        *grads, telemetry = torch.ops.esper.chunk_seeds_backward.default(
            dy, *ctx.saved_tensors, *options
        )
        return _wanted(ctx, *grads, None, None, None, telemetry, None, None, None)


class _SpanSeeds(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, probe, ctx.objective, ctx.observe, ctx.plain, _ = args
        options = ctx.objective, ctx.observe, ctx.plain, True
        with _AutoDispatchBelowAutograd():
            y, *more = torch.ops.esper.span_seeds.default(*tensors, probe, *options)
        z, w_in = tensors[1:3]
        known = ctx.observe and ctx.objective != RECONSTRUCTION
        if known and use_triton(z, w_in, ctx.plain):
            # the statistics hold all that the kernels need to know of z
            tensors[1] = z.new_empty(0)
        return _saved(ctx, tensors, y, *more)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        options = ctx.objective, ctx.observe, ctx.plain
        dx, *grads, telemetry = torch.ops.esper.span_seeds_backward.default(
            dy, *ctx.saved_tensors, *options
        )
        return _wanted(ctx, dx, dy, *grads, None, None, telemetry, None, None, None, None)


def _saved(ctx: Any, tensors: list[Tensor], y: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    ctx.save_for_backward(*tensors, *more)
    ctx.mark_non_differentiable(*more)
    ctx.set_materialize_grads(False)
    return y, *more


def _wanted(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=True))


def _with_autograd(function: type[Function], op: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        with _AutoDispatchBelowAutograd():
            return op(*args)

    return call


for _name, _function, _fake in (
    ("chunk_seeds", _chunk_forward, _fake_chunk),
    ("chunk_seeds_backward", _chunk_backward, _fake_chunk_backward),
    ("span_seeds", _span_forward, _fake_span),
    ("span_seeds_backward", _span_backward, _fake_span_backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"esper::{_name}", _fake, lib=_library)
_library.impl(
    "chunk_seeds", _with_autograd(_ChunkSeeds, torch.ops.esper.chunk_seeds.default), "Autograd"
)
_library.impl(
    "span_seeds", _with_autograd(_SpanSeeds, torch.ops.esper.span_seeds.default), "Autograd"
)
