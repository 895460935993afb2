"""The operators: registered as PyTorch asks, gradients against autograd, telemetry, dispatch."""

import types

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from esper_kernels import (
    Phi,
    chunk_seeds,
    column_statistics,
    gradient_energy,
    library,
    probe_size,
    register_phi,
    span_seeds,
)
from esper_kernels.learning import OBJECTIVES
from esper_kernels.reference import chunk as reference_chunk
from esper_kernels.reference import span as reference_span

T, S, C, H, I, O = 33, 6, 3, 4, 5, 7  # noqa: E741
ALPHA = (0.0, 0.5, 1.0, 0.25, 0.0, 0.7)
LEARNING = (2, 1, 0, 1, 1, 1)
OPS = torch.ops.esper


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def codes(*values):
    return torch.tensor(values, dtype=torch.int32)


def chunk_inputs(dtype=torch.float32, phi=(Phi.GELU, Phi.RELU, Phi.DIAGONAL, Phi.GLU, 2, Phi.SILU)):
    torch.manual_seed(0)
    leaves = [leaf(T, S * C, dtype=dtype), leaf(S, C, H), leaf(S, H), leaf(S, H, C)]
    return [*leaves, torch.tensor(ALPHA).requires_grad_()], (codes(*phi), codes(4, 3, 4, 4, 2, 2))


def span_inputs(dtype=torch.float32, phi=(Phi.GELU, Phi.RELU, Phi.SILU, Phi.IDENTITY, 2, 0)):
    torch.manual_seed(0)
    leaves = [leaf(T, I, dtype=dtype), leaf(T, O, dtype=dtype), leaf(S, I), leaf(S), leaf(S, O)]
    return [*leaves, torch.tensor(ALPHA).requires_grad_()], (codes(*phi),)


CASES = {
    "chunk": (chunk_inputs, chunk_seeds, reference_chunk.chunk_seeds, S * C),
    "span": (span_inputs, span_seeds, reference_span.span_seeds, O),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def new_probe(channels):
    return torch.zeros(probe_size(channels, S), requires_grad=True)


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_the_operators_are_registered_as_pytorch_asks(name, objective, observe):
    inputs, _, _, channels = CASES[name]
    leaves, rest = inputs()
    learning = codes(*LEARNING)
    options = objective, observe, False
    args = (*leaves, *rest, learning, new_probe(channels), *options)
    forward, backward = getattr(OPS, f"{name}_seeds"), getattr(OPS, f"{name}_seeds_backward")
    if name == "span":
        args = *args, True
    opcheck(forward.default, args)
    y, *more = forward(*args)
    saved = [leaf.detach() for leaf in leaves]
    opcheck(backward.default, (torch.randn_like(y), *saved, *rest, learning, *more, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_autograd_through_the_reference(case, dtype):
    inputs, ours, reference, _ = case
    leaves, rest = inputs(dtype)
    y, expected = ours(*leaves, *rest), reference(*leaves, *rest)
    dy = torch.randn_like(y)
    grads, wanted = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    assert torch.equal(y, expected)
    for mine, theirs in zip(grads[:-1], wanted[:-1], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(grads[-1], wanted[-1], rtol=1e-4, atol=1e-4)


def test_a_function_of_ones_own_gets_its_gradient_too(case):
    inputs, ours, reference, _ = case
    own = register_phi(lambda z: torch.sin(z) * z)
    leaves, rest = inputs(phi=(own, Phi.RELU, own, Phi.SILU, 2, 0))
    y, expected = ours(*leaves, *rest), reference(*leaves, *rest)
    grads, wanted = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)


def test_only_the_seeds_that_learn_get_a_gradient(case):
    inputs, ours, _, _ = case
    leaves, rest = inputs()
    y = ours(*leaves, *rest, learning_S=codes(*LEARNING))
    y.square().sum().backward()
    free = ours(*(t.detach().requires_grad_() for t in leaves), *rest)
    assert torch.equal(y, free)
    for weights in leaves[-4:-1]:
        moved = weights.grad.view(S, -1).any(1).tolist()
        # seed 0 learns alone, 2 is frozen, 4 asleep; seed 5 of the span computes zero
        assert moved[:5] == [True, True, False, True, False]
    assert leaves[-1].grad[[1, 2, 3]].all()
    assert leaves[-1].grad[[0, 4]].count_nonzero() == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_of_the_probe_is_what_the_pass_measured(case, objective):
    inputs, ours, _, D = case
    leaves, rest = inputs()
    probe, learning = new_probe(D), codes(*LEARNING)
    options = {"learning_S": learning, "probe": probe, "objective": objective, "observe": True}
    y = ours(*leaves, *rest, **options)
    dy = torch.randn_like(y)
    y.backward(dy)
    told = probe.grad
    before = (leaves[0] if D == S * C else leaves[1]).detach()
    torch.testing.assert_close(told[: 3 * D].view(3, D), column_statistics(before))
    torch.testing.assert_close(told[3 * D : 4 * D], T * dy.square().sum(0))
    torch.testing.assert_close(gradient_energy(dy), T * dy.square().sum(0))
    explained = told[4 * D : 4 * D + S]
    assert explained[0] != 0
    assert explained[1:].count_nonzero() == 0
    assert told[-3:].tolist() == [T, 1, 1]

    ours(*leaves, *rest, **options).backward(dy)
    torch.testing.assert_close(probe.grad[: 4 * D + S], 2 * told[: 4 * D + S] / 2)
    assert probe.grad[-3:].tolist() == [2 * T, 2, 2]

    probe.grad = None
    ours(*leaves, *rest, **{**options, "observe": False}).backward(dy)
    assert probe.grad[: 4 * D].count_nonzero() == 0
    torch.testing.assert_close(probe.grad[4 * D : 4 * D + S] * 2, explained)
    assert probe.grad[-3:].tolist() == [0, 0, 1]


def test_a_frozen_host_still_teaches_its_seeds(case):
    inputs, ours, _, D = case
    leaves, rest = inputs()
    frozen, probe = [t.detach() for t in leaves], new_probe(D)
    y = ours(*frozen, *rest, probe=probe, learning_S=codes(*LEARNING), observe=True)
    y.sum().backward()
    assert probe.grad[-3:].tolist() == [T, 1, 1]


def test_without_a_gradient_nothing_is_recorded(case):
    inputs, ours, _, _ = case
    leaves, rest = inputs()
    with torch.no_grad():
        assert not ours(*leaves, *rest).requires_grad
    with torch.inference_mode():
        y = ours(*leaves, *rest)
    assert torch.equal(y, ours(*leaves, *rest))


def test_a_second_derivative_is_refused(case):
    inputs, ours, _, _ = case
    leaves, rest = inputs()
    (dx,) = torch.autograd.grad(ours(*leaves, *rest).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_autocast_changes_nothing(case):
    inputs, ours, _, _ = case
    leaves, rest = inputs()
    learning, results = codes(*LEARNING), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = ours(*leaves, *rest, learning_S=learning)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(map(torch.equal, *results))


def test_gradients_in_other_layouts_are_taken(case):
    inputs, ours, _, _ = case
    leaves, rest = inputs()
    y = ours(*leaves, *rest)
    broad = torch.autograd.grad(y, leaves, torch.ones(()).expand_as(y), retain_graph=True)
    dense = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(map(torch.equal, broad, dense))


def test_the_cost_is_that_of_the_awake_seeds():
    """As torch counts the products of the reference, which autograd differentiates."""
    for inputs, ours, reference, _ in CASES.values():
        leaves, rest = inputs(phi=[Phi.GELU] * S)
        alpha = leaves.pop().detach()
        counts = []
        for run in (ours, reference):
            with FlopCounterMode(display=False) as counter:
                run(*leaves, alpha, *rest).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_S": torch.ones(S)}, r"learning_S must be of torch.int32, but got torch.float"),
        ({"learning_S": codes(1)}, r"learning_S must have one value per seed, shape \(6,\)"),
        ({"probe": torch.zeros(3)}, r"probe must have shape \(\d+,\) .* but got \(3,\)"),
        ({"probe": torch.zeros(81, dtype=torch.float64)}, r"but got \(81,\) of torch.float64"),
        ({"objective": "fame"}, r"objective must be 'desired_update' or 'reconstruction', but got"),
    ],
)
def test_wrong_arguments_are_refused_by_name(case, change, message):
    inputs, ours, _, _ = case
    leaves, rest = inputs()
    with pytest.raises(ValueError, match=message):
        ours(*leaves, *rest, **change)


def test_statistics_of_something_else_than_a_matrix_are_refused():
    with pytest.raises(ValueError, match=r"x_TD must be a matrix .* got shape \(3,\)"):
        column_statistics(torch.zeros(3))
    with pytest.raises(ValueError, match=r"dy_TD must be a matrix .* torch.int64"):
        gradient_energy(torch.zeros(3, 3, dtype=torch.int64))


class TestDispatch:
    """A stand-in for the kernels: which calls reach them, and with what."""

    @pytest.fixture
    def kernels(self, monkeypatch):
        calls = []

        def forward(x, w1, b1, w2, alpha, phi, hidden, observe):
            calls.append(("forward", x, w1))
            return x + 1, torch.ones(3, S * C if observe else 0)

        def backward(dy, x, w1, b1, w2, alpha, phi, hidden, learning, objective, observe):
            calls.append(("backward", dy, w1))
            grad_sq = torch.full((S * C if observe else 0,), 2.0)
            grads = (torch.ones_like(t) for t in (w1, b1, w2, alpha))
            return dy, *grads, grad_sq, torch.full((S,), 3.0)

        stub = types.SimpleNamespace(forward=forward, backward=backward)
        monkeypatch.setattr(library, "_chunk_kernels", lambda w1, dtype: stub)
        return calls

    @pytest.fixture
    def forced(self):
        dispatch = pytest.importorskip("esper_kernels.ops.dispatch")
        with dispatch.force_triton():
            yield

    @pytest.mark.skipif(torch.cuda.is_available(), reason="kernels do not run on CPU tensors")
    def test_kernels_get_contiguous_tensors_and_fp32_weights(self, kernels, forced):
        leaves, rest = chunk_inputs()
        x = leaves[0].detach().t().contiguous().t().requires_grad_()
        pool = [w.detach().bfloat16().requires_grad_() for w in leaves[1:4]]
        probe = new_probe(S * C)
        y = chunk_seeds(x, *pool, leaves[4], *rest, probe=probe, observe=True, plain=False)
        assert torch.equal(y, x + 1)
        y.sum().backward()
        assert [name for name, *_ in kernels] == ["forward", "backward"]
        for _, rows, w1 in kernels:
            assert rows.is_contiguous()
            assert w1.dtype == torch.float32
        assert pool[0].grad.dtype == torch.bfloat16
        D = S * C
        expected = [torch.ones(3 * D), torch.full((D,), 2.0 * T), torch.full((S,), 3.0)]
        assert torch.equal(probe.grad, torch.cat([*expected, torch.tensor([T, 1.0, 0.0])]))

    @pytest.mark.parametrize("case", ["plain", "fp64", "fp64 weights", "custom phi", "cpu"])
    def test_all_else_runs_in_plain_pytorch(self, kernels, case, request):
        if case != "cpu":
            request.getfixturevalue("forced")
        phi = (64 if case == "custom phi" else 1,) * S
        if case == "custom phi":
            register_phi(torch.sin)
        leaves, rest = chunk_inputs(torch.float64 if case == "fp64" else torch.float32, phi=phi)
        if case == "fp64 weights":
            leaves[1:4] = [w.detach().double() for w in leaves[1:4]]
        chunk_seeds(*leaves, *rest, plain=True if case == "plain" else None).sum().backward()
        assert not kernels
