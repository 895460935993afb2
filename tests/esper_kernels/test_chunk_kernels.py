"""The kernels of fine chunk seeds against the plain reference in double precision.

On a machine without a GPU the kernels run under Triton's interpreter; the same tests run on one.
"""

import pytest
import torch

from esper_kernels import Phi
from esper_kernels.ops import chunk
from esper_kernels.reference.chunk import chunk_outputs
from esper_kernels.reference.chunk import chunk_seeds as reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# bf16 arithmetic is wrong under the interpreter, so half precision is for GPUs
DTYPES = [torch.float32, *([torch.bfloat16, torch.float16] if CUDA else [])]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = [  # T, S, C, H
    (1, 1, 1, 1),
    (33, 5, 3, 4),
    (70, 70, 1, 2),
    (63, 40, 2, 2),
    (100, 33, 4, 4),
    (65, 7, 8, 32),
    (40, 3, 24, 10),
    (32, 2, 64, 64),
    (20, 1, 100, 6),
    (48, 2, 128, 16),
]
KINDS = [Phi.IDENTITY, Phi.RELU, Phi.GELU, Phi.SILU]


def make(T, S, C, H, dtype=torch.float32, awake=0.6, kinds=None):
    """Random seeds: some awake, some in isolated training, some asleep with NaN weights."""
    torch.manual_seed(T + S)
    rare = [Phi.GLU] * (H % 2 == 0) + [Phi.DIAGONAL] * (H > 1)
    kinds = kinds or [*KINDS, Phi.ZERO, *rare]
    x = torch.randn(T, S * C).to(dtype)
    scale = C**-0.5, 0.5, H**-0.5
    pool = [
        torch.randn(shape) * s
        for shape, s in zip([(S, C, H), (S, H), (S, H, C)], scale, strict=True)
    ]
    alpha = (torch.rand(S) * 0.9 + 0.1) * (torch.rand(S) < awake)
    phi = torch.tensor(kinds, dtype=torch.int32)[torch.randint(len(kinds), (S,))]
    hidden = torch.randint(1, H + 1, (S,), dtype=torch.int32)
    hidden[phi == Phi.GLU] = H
    learning = torch.where(alpha > 0, torch.randint(0, 2, (S,)), 2 * torch.randint(0, 2, (S,)))
    for w in pool:
        w[(alpha == 0) & (learning == 0)] = float("nan")
    tensors = [x, *pool, alpha, phi, hidden, learning.to(torch.int32)]
    return [t.to(DEVICE) for t in tensors]


def error(ours, theirs):
    """Relative error of a whole tensor; a difference from exactly 0 counts in full."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def expected(dy, x, w1, b1, w2, alpha, phi, hidden, learning, objective):
    """Everything `chunk.backward` returns, from autograd on the formulas in double precision."""
    S, C, _ = w1.shape
    x, dy = x.double().cpu(), dy.double().cpu()
    alpha, phi, hidden, learning = (t.cpu() for t in (alpha, phi, hidden, learning))
    pool = [w.double().cpu().requires_grad_() for w in (w1, b1, w2)]
    x.requires_grad_()
    blend = alpha.double().requires_grad_()
    y = reference(x, *pool, blend, phi, hidden)
    inputs = [x, *pool, blend]
    if (alpha != 0).any():
        grads = torch.autograd.grad(y, inputs, dy, allow_unused=True)
    else:
        grads = [dy, *[None] * 4]
    grads = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]
    for g in grads[1:4]:
        g[learning == 0] = 0
    explained = torch.zeros(S, dtype=torch.float64)
    for s in (learning == 2).nonzero().flatten():
        chunk_x, g = (t.detach()[None, :, s * C : (s + 1) * C] for t in (x, dy))
        own = [w.detach()[s : s + 1].clone().requires_grad_() for w in pool]
        out = chunk_outputs(chunk_x, *own, phi[s : s + 1], hidden[s : s + 1])
        rms = [t.square().mean().sqrt() for t in (chunk_x, g)]
        target = chunk_x if objective else -g * (0.1 * rms[0] / rms[1])
        left = (out - target).square().sum() / target.square().sum()
        explained[s] = 1 - left.detach()
        if left.requires_grad:
            found = torch.autograd.grad(left, own, allow_unused=True)
            for grad, new in zip(grads[1:4], found, strict=True):
                grad[s] = 0 if new is None else new[0]
    return [*grads, dy.square().sum(0), explained]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("awake", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_statistics(shape, awake, dtype, poison):
    x, *pool, alpha, phi, hidden, _ = make(*shape, dtype, awake)
    x[0, 0] = 0
    with poison():
        y, stats = chunk.forward(x, *pool, alpha, phi, hidden, True)
    wide = [w.double().cpu() for w in (x, *pool)]
    theirs = reference(*wide, alpha.cpu(), phi.cpu(), hidden.cpu())
    assert error(y, theirs) < TOLERANCE[dtype]
    asleep = (alpha == 0).repeat_interleave(shape[2])
    assert torch.equal(y[:, asleep], x[:, asleep])
    wide = wide[0]
    sums = torch.stack([wide.sum(0), wide.square().sum(0), (wide.abs() < 1e-6).sum(0)])
    # sums of bf16 are those of the matrix unit, squares rounded
    rough = 2e-3 if dtype == torch.bfloat16 else 1e-5
    limits = rough, rough, 1e-5
    for ours, right, limit in zip(stats, sums, limits, strict=True):
        assert error(ours, right) < limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", [0, 1], ids=["desired_update", "reconstruction"])
@pytest.mark.parametrize("awake", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_gradient(shape, awake, objective, dtype, poison):
    x, *rest = make(*shape, dtype, awake)
    dy = torch.randn(x.shape, device=DEVICE).to(dtype)
    with poison():
        ours = chunk.backward(dy, x, *rest, objective, True)
    theirs = expected(dy, x, *rest, objective)
    names = ["dx", "dw1", "db1", "dw2", "dalpha", "grad_sq"]
    *ours, explained = ours
    for name, mine, right in zip(names, ours, theirs[:-1], strict=True):
        assert error(mine, right) < 3 * TOLERANCE[dtype], name
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(explained.double().cpu(), theirs[-1], rtol=limit, atol=limit)
    asleep = (rest[3] == 0).repeat_interleave(shape[2])
    assert torch.equal(ours[0][:, asleep], dy[:, asleep])


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    T = 2**19 + 70
    _, *rest = make(8, 1024, 4, 4, torch.bfloat16, kinds=KINDS)
    x = torch.randn(T, 4096, device=DEVICE, dtype=torch.bfloat16)
    y, stats = chunk.forward(x, *rest[:-1], True)
    dx, *grads = chunk.backward(x, x, *rest, 0, True)
    parts = []
    for rows in x.tensor_split(8):
        mine, sums = chunk.forward(rows, *rest[:-1], True)
        parts.append([sums, *chunk.backward(rows, rows, *rest, 0, True)])
        at = rows.storage_offset() // 4096
        assert torch.equal(y[at : at + len(rows)], mine)
        assert torch.equal(dx[at : at + len(rows)], parts[-1].pop(1))
    totals = [torch.stack(each).double().sum(0) for each in zip(*parts, strict=True)]
    # the isolated gradients are shares of a whole batch, so they do not add up
    task = rest[-1] != 2
    # the matrix unit truncates as it adds
    assert error(stats, totals[0]) < 2e-3
    for whole, total in zip(grads[:4], totals[1:5], strict=True):
        assert error(whole[task], total[task]) < 1e-3
    assert error(grads[4], totals[5]) < 1e-5
