"""The wide-chunk kernels against the plain reference in float64: values, gradients, exact ends.

On a machine without a GPU the kernels run under Triton's interpreter, in fp32 only.
"""

import pytest
import torch

from esper_kernels import Phi
from esper_kernels.ops import coarse
from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.reference.chunk import chunk_outputs, chunk_seeds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRET, reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned"),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = [torch.float32] if INTERPRET else list(TOLERANCE)
# T, S, C, H: one seed, edges on every side, several tiles of everything
SHAPES = [(33, 1, 7, 5), (40, 4, 20, 40)]
if not INTERPRET:
    SHAPES += [
        (70, 3, 48, 33),
        (1000, 7, 130, 200),
        (130, 2, 1030, 300),
        (2048, 4, 512, 512),
        (100, 1, 4096, 64),
    ]
FUNCTIONS = (Phi.IDENTITY, Phi.RELU, Phi.GELU, Phi.SILU)
NAMES = ("dx", "dw1", "db1", "dw2", "dalpha")


class Case:
    """Random inputs; seeds take turns: awake, isolated, asleep with NaN for weights, frozen."""

    def __init__(self, T, S, C, H, dtype=torch.float32, seed=0, fates="aisf"):
        g = torch.Generator(DEVICE).manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, device=DEVICE)

        fate = [fates[s % len(fates)] for s in range(S)]
        self.x, self.dy = draw(T, S * C).to(dtype), draw(T, S * C).to(dtype)
        # exact in the dtype: rounded weights move z across ReLU's kink, where slopes jump by 1
        w1, b1, w2 = draw(S, C, H) / C**0.5, draw(S, H), draw(S, H, C) / H**0.5
        self.pool = w1.to(dtype).float(), b1, w2.to(dtype).float()
        awake, isolated = [f in "af" for f in fate], [f == "i" for f in fate]
        self.awake = torch.tensor(awake, device=DEVICE)
        self.isolated = torch.tensor(isolated, device=DEVICE)
        self.alpha = torch.where(self.awake, draw(S).abs().clamp(0.1, 1), 0.0)
        codes = [FUNCTIONS[(s + seed) % 4] for s in range(S)]
        self.phi = torch.tensor(codes, dtype=torch.int32, device=DEVICE)
        modes = [{"a": 1, "i": 2, "s": 1, "f": 0}[f] for f in fate]
        self.learning = torch.tensor(modes, dtype=torch.int32, device=DEVICE)
        used = [max(1, H - 3 * (s % 2)) for s in range(S)]
        self.hidden = torch.tensor(used, dtype=torch.int32, device=DEVICE)
        for w in self.pool:
            w[~self.awake & ~self.isolated] = float("nan")

    def forward(self, observe=False):
        return coarse.forward(self.x, *self.pool, self.alpha, self.phi, self.hidden, observe)

    def backward(self, objective=0, observe=False):
        return coarse.backward(
            self.dy, self.x, *self.pool, self.alpha, self.phi, self.hidden, self.learning,
            objective, observe,
        )  # fmt: skip

    def reference(self):
        """Output and gradients of the task, float64."""
        leaves = [t.detach().double().requires_grad_() for t in (self.x, *self.pool, self.alpha)]
        y = chunk_seeds(*leaves, self.phi, self.hidden)
        grads = torch.autograd.grad(y, leaves, self.dy.double())
        learns = (self.awake & (self.learning == 1)).double()
        for grad in grads[1:4]:
            grad.mul_(learns.view(-1, *[1] * (grad.ndim - 1)))
        return y, list(grads)

    def isolated_reference(self, objective):
        """Explained share and gradients of the isolated seeds, float64."""
        S = len(self.alpha)
        x, dy = (
            t.double().unflatten(1, (S, -1)).transpose(0, 1)[self.isolated]
            for t in (self.x, self.dy)
        )
        target = x
        if objective == 0:
            ratio = x.square().mean((1, 2)) / dy.square().mean((1, 2))
            target = -0.1 * dy * ratio.sqrt()[:, None, None]
        leaves = [w[self.isolated].double().requires_grad_() for w in self.pool]
        out = chunk_outputs(x, *leaves, self.phi[self.isolated], self.hidden[self.isolated])
        unexplained = (out - target).square().sum((1, 2)) / target.square().sum((1, 2))
        return 1 - unexplained, torch.autograd.grad(unexplained.sum(), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_every_gradient_match_the_reference(shape, dtype, assert_near):
    case = Case(*shape, dtype)
    y, stats = case.forward()
    expected, grads = case.reference()
    assert y.dtype == dtype
    assert stats.shape == (3, 0)
    assert_near(y, expected, TOLERANCE[dtype], "y")
    outputs = case.backward()
    assert outputs[5].shape == (0,)
    for name, mine, theirs in zip(NAMES, outputs[:5], grads, strict=True):
        rows = ~case.isolated if name.startswith(("dw", "db")) else slice(None)
        assert_near(mine[rows], theirs[rows], TOLERANCE[dtype], name)
    assert not outputs[3][~case.awake & ~case.isolated].any()
    assert not outputs[4][~case.awake].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_isolated_gradients_match_the_formula(shape, objective, dtype, assert_near):
    case = Case(*shape, dtype, seed=1, fates="iasi")
    outputs = case.backward(objective)
    explained, grads = case.isolated_reference(objective)
    ours = outputs[6][case.isolated].double()
    torch.testing.assert_close(ours, explained, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not outputs[6][~case.isolated].any()
    for name, mine, theirs in zip(NAMES[1:4], outputs[1:4], grads, strict=True):
        assert_near(mine[case.isolated], theirs, TOLERANCE[dtype], name)


@pytest.mark.parametrize("objective", [0, 1])
def test_isolated_seeds_without_a_target_get_no_gradient(objective):
    case = Case(20, 2, 7, 5, fates="i")
    (case.dy if objective == 0 else case.x).zero_()
    outputs = case.backward(objective)
    for grad in outputs[1:4]:
        assert not grad.any()
    assert (outputs[6] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_sleeping_seeds_pass_bit_for_bit_whatever_the_weights_hold(dtype):
    case = Case(20, 4, 35, 9, dtype)
    case.x[3, 40] = -0.0
    for w in case.pool:
        w[case.isolated] = float("inf")
    y, _ = case.forward()
    dx, *_ = case.backward()
    asleep = (~case.awake).repeat_interleave(35)
    for out, host in ((y, case.x), (dx, case.dy)):
        assert torch.equal(
            out[:, asleep].contiguous().view(torch.uint8),
            host[:, asleep].contiguous().view(torch.uint8),
        )
        assert out.isfinite().all()


@pytest.mark.parametrize("fates", ["s", "as"])
def test_statistics_are_those_of_the_columns(fates):
    case = Case(40, 2, 35, 9, fates=fates)
    case.x[:7, 2] = 1e-7
    _, stats = case.forward(observe=True)
    x = case.x.double()
    expected = torch.stack([x.sum(0), x.square().sum(0), (x.abs() < 1e-6).double().sum(0)])
    torch.testing.assert_close(stats.double(), expected, atol=1e-4, rtol=1e-5)
    grad_sq = case.backward(observe=True)[5].double()
    torch.testing.assert_close(grad_sq, case.dy.double().square().sum(0), atol=1e-4, rtol=1e-5)


def test_two_runs_agree_bit_for_bit():
    case = Case(*SHAPES[0 if INTERPRET else -2], DTYPES[-1], fates="a")
    first = *case.forward(observe=True), *case.backward(observe=True)
    second = *case.forward(observe=True), *case.backward(observe=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
