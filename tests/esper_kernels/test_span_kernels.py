"""The span kernels against the plain reference in float64: values, every gradient, exact ends.

On a machine without a GPU the kernels run under Triton's interpreter, in fp32 only.
"""

import pytest
import torch

from esper_kernels import Phi
from esper_kernels.ops import span
from esper_kernels.ops.dispatch import INTERPRET
from esper_kernels.reference.span import span_hidden, span_seeds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRET, reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned"),
]
# 16 bits: of a sum over 33 rows of rounded values, as dalpha of the only unit of a site
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DTYPES = [torch.float32] if INTERPRET else list(TOLERANCE)
# T, I, O, S: one tile, edges on every side, one unit, several tiles of everything
SHAPES = [(33, 7, 5, 1), (40, 17, 33, 70)]
ISOLATED_SHAPES = [(20, 17, 33, 70)]
if not INTERPRET:
    SHAPES += [
        (63, 33, 45, 40),
        (1000, 200, 100, 300),
        (130, 63, 1030, 1024),
        (4096, 512, 768, 600),
    ]
    ISOLATED_SHAPES = SHAPES[1:]
FUNCTIONS = (Phi.IDENTITY, Phi.RELU, Phi.GELU, Phi.SILU)
NAMES = ("dx", "dw_in", "db", "dw_out", "dalpha")


class Case:
    """Random inputs: some units awake, some isolated, some asleep with NaN for weights."""

    def __init__(self, T, I, O, S, dtype=torch.float32, awake=0.5, isolated=0.3, seed=0):  # noqa: E741
        g = torch.Generator(DEVICE).manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, device=DEVICE)

        self.x, self.z, self.dy = (draw(T, n).to(dtype) for n in (I, O, O))
        # exact in the dtype: rounded weights move z across ReLU's kink, where slopes jump by 1
        w_in, w_out = (draw(S, n) / k**0.5 for n, k in ((I, I), (O, S)))
        self.w_in, self.w_out = w_in.to(dtype).float(), w_out.to(dtype).float()
        self.b = draw(S)
        fate = torch.rand(S, generator=g, device=DEVICE)
        if awake:
            fate[-1] = 0.0
        self.awake = fate < awake
        self.isolated = (fate >= awake) & (fate < awake + isolated)
        self.alpha = torch.where(self.awake, draw(S).abs().clamp(0.1, 1), 0.0)
        choice = torch.randint(0, 4, (S,), generator=g, device=DEVICE)
        self.phi = torch.tensor(FUNCTIONS, dtype=torch.int32, device=DEVICE)[choice]
        frozen = torch.rand(S, generator=g, device=DEVICE) < 0.3
        self.learning = torch.where(self.isolated, 2, torch.where(frozen, 0, 1)).int()
        asleep = ~self.awake & ~self.isolated
        for w in (self.w_in, self.b, self.w_out):
            w[asleep] = float("nan")

    def run(self, observe, keep):
        pool = self.w_in, self.b, self.w_out
        rest = self.alpha, self.phi, self.learning, observe, keep
        return span.forward(self.x, self.z, *pool, *rest)

    def forward(self, observe=False):
        return self.run(observe, keep=False)[:2]

    def backward(self, objective=0, observe=False):
        z = self.z if objective == 1 else self.z.new_empty(0)
        z_sq = self.z.float().square().sum()
        pool = self.w_in, self.b, self.w_out
        kept = self.run(observe, keep=True)[2]
        return span.backward(
            self.dy, self.x, z, z_sq, *pool, self.alpha, self.phi, *kept, objective, observe
        )

    def reference(self):
        """Output and gradients of the task, float64."""
        leaves = [
            t.detach().double().requires_grad_()
            for t in (self.x, self.w_in, self.b, self.w_out, self.alpha)
        ]
        x, w_in, b, w_out, alpha = leaves
        y = span_seeds(x, self.z.double(), w_in, b, w_out, alpha, self.phi)
        if not self.awake.any():
            return y, [torch.zeros_like(leaf) for leaf in leaves]
        grads = torch.autograd.grad(y, leaves, self.dy.double())
        learns = (self.awake & (self.learning == 1)).double()
        for grad in grads[1:4]:
            grad.mul_(learns.view(-1, *[1] * (grad.ndim - 1)))
        return y, list(grads)

    def isolated_reference(self, objective):
        """Explained share and gradients of the isolated units, float64."""
        z, dy = self.z.double(), self.dy.double()
        target = z
        if objective == 0:
            target = -0.1 * dy * (z.square().mean() / dy.square().mean()).sqrt()
        leaves = [w[self.isolated].double().requires_grad_() for w in (self.w_in, self.b)]
        leaves.append(self.w_out[self.isolated].double().requires_grad_())
        h = span_hidden(self.x.double(), *leaves[:2], self.phi[self.isolated])
        left = target[None] - h.t()[:, :, None] * leaves[2][:, None, :]
        unexplained = left.square().sum((1, 2)) / target.square().sum()
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
    *ours, grad_sq, _ = case.backward()
    assert grad_sq.shape == (0,)
    task = ~case.isolated
    for name, mine, theirs in zip(NAMES, ours, grads, strict=True):
        rows = task if name.startswith(("dw", "db")) else slice(None)
        assert_near(mine[rows], theirs[rows], TOLERANCE[dtype], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("shape", ISOLATED_SHAPES, ids=str)
def test_isolated_gradients_match_the_formula(shape, objective, dtype, assert_near):
    case = Case(*shape, dtype, seed=1)
    outputs = case.backward(objective)
    explained, grads = case.isolated_reference(objective)
    # the explained share may be near 0: it is compared on the scale of 1
    ours = outputs[6][case.isolated].double()
    torch.testing.assert_close(ours, explained, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not outputs[6][~case.isolated].any()
    for name, mine, theirs in zip(NAMES[1:4], outputs[1:4], grads, strict=True):
        assert_near(mine[case.isolated], theirs, TOLERANCE[dtype], name)


@pytest.mark.parametrize("objective", [0, 1])
def test_isolated_units_without_a_target_get_no_gradient(objective):
    case = Case(20, 7, 5, 12)
    (case.dy if objective == 0 else case.z).zero_()
    outputs = case.backward(objective)
    for grad in outputs[1:4]:
        assert not grad[case.isolated].any()
    assert (outputs[6][case.isolated] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_no_unit_awake_the_output_is_the_host_bit_for_bit(dtype):
    case = Case(33, 20, 45, 40, dtype, awake=0, isolated=0.5)
    case.z[3, 4] = -0.0
    case.z[5, 6] = float("nan")
    y, _ = case.forward()
    assert torch.equal(y.view(torch.uint8), case.z.view(torch.uint8))
    dx, *_ = case.backward()
    assert not dx.any()


def test_isolated_units_with_nan_weights_do_not_touch_the_host():
    case = Case(20, 20, 33, 50, seed=2)
    before = case.forward()[0], *case.backward()
    case.w_in[case.isolated] = float("nan")
    case.w_out[case.isolated] = float("inf")
    after = case.forward()[0], *case.backward()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[5], after[5])
    for mine, theirs in zip(before[2:5], after[2:5], strict=True):
        assert torch.equal(mine[~case.isolated], theirs[~case.isolated])


def test_frozen_and_sleeping_units_get_a_gradient_of_exactly_zero():
    case = Case(20, 15, 12, 40)
    case.phi[:] = Phi.SILU
    _, dw_in, db, dw_out, dalpha, _, _ = case.backward()
    still = (case.learning == 0) | ((case.alpha == 0) & (case.learning == 1))
    assert still.any()
    for grad in (dw_in, db, dw_out):
        assert not grad[still].any()
    assert dalpha[case.awake].all()
    assert not dalpha[~case.awake].any()


@pytest.mark.parametrize("awake", [0.0, 0.5])
def test_statistics_are_those_of_the_columns(awake):
    case = Case(40, 15, 45, 20, awake=awake)
    case.z[:7, 2] = 1e-7
    _, stats = case.forward(observe=True)
    z = case.z.double()
    expected = torch.stack([z.sum(0), z.square().sum(0), (z.abs() < 1e-6).double().sum(0)])
    torch.testing.assert_close(stats.double(), expected, atol=1e-4, rtol=1e-5)
    grad_sq = case.backward(observe=True)[5]
    torch.testing.assert_close(grad_sq.double(), case.dy.double().square().sum(0),
                               atol=1e-4, rtol=1e-5)  # fmt: skip


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs programs one after another")
def test_two_runs_agree_bit_for_bit():
    case = Case(*SHAPES[-1], DTYPES[-1])
    first = *case.forward(observe=True), *case.backward(observe=True)
    second = *case.forward(observe=True), *case.backward(observe=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_awake_units_decide_the_result_wherever_they_lie():
    case = Case(20, 20, 24, 70, isolated=0, seed=3)
    y, _ = case.forward()
    rows = case.awake.nonzero().squeeze(1)
    case.w_in, case.b, case.w_out = (w[rows].clone() for w in (case.w_in, case.b, case.w_out))
    case.alpha, case.phi = case.alpha[rows], case.phi[rows]
    case.learning = case.learning[rows]
    assert torch.equal(y, case.forward()[0])


def test_what_is_kept_has_the_promised_shapes_and_survives_a_backward():
    case = Case(40, 17, 33, 70)
    y, _, kept = case.run(observe=False, keep=True)
    assert torch.equal(y, case.forward()[0])
    assert [t.shape for t in kept] == list(span.kept_shapes(40, 17, 33, 70, torch.float32))
    before = [t.clone() for t in kept]
    rest = case.z.new_empty(0), torch.ones((), device=DEVICE), case.w_in, case.b, case.w_out
    runs = [
        span.backward(case.dy, case.x, *rest, case.alpha, case.phi, *kept, 0, False)
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))
    for now, then in zip(kept, before, strict=True):
        assert torch.equal(now.view(torch.uint8), then.view(torch.uint8))
