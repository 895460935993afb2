"""The reference against one seed at a time in plain loops: values, every gradient, exact ends."""

import pytest
import torch

from esper_kernels import PHI, Phi, chunk_seeds, span_seeds

CHUNK_SHAPES = [(1, 1, 2, 1), (33, 3, 4, 5), (63, 1024, 1, 2), (100, 7, 6, 8)]  # T, S, C, H


def chunk_inputs(T, S, C, H, dtype=torch.float32):
    torch.manual_seed(S)
    pool = torch.randn(S, C, H), torch.randn(S, H), torch.randn(S, H, C)
    alpha = torch.rand(S) * (torch.rand(S) < 0.6)
    alpha[0] = 0.5
    phi = torch.randint(0, 5, (S,), dtype=torch.int32)
    if H % 2 == 0:
        phi[torch.rand(S) < 0.2] = int(Phi.GLU)
        phi[torch.rand(S) < 0.2] = int(Phi.DIAGONAL)
    hidden = torch.randint(1, H + 1, (S,), dtype=torch.int32)
    hidden[phi == Phi.GLU] = H
    leaves = [t.to(dtype).requires_grad_() for t in (torch.randn(T, S * C), *pool)]
    return leaves, (alpha, phi, hidden)


def loop(x, w1, b1, w2, alpha, phi, hidden):
    """One seed after the other, as the formula reads."""
    C = w1.shape[1]
    out = []
    for s in range(len(w1)):
        chunk = x[:, s * C : (s + 1) * C]
        if phi[s] == Phi.DIAGONAL:
            delta = chunk * w2[s, 0] + w2[s, 1]
        else:
            used = int(hidden[s])
            delta = PHI[int(phi[s])](chunk @ w1[s] + b1[s])[:, :used] @ w2[s, :used]
        out.append(chunk + alpha[s] * delta if alpha[s] else chunk)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("shape", CHUNK_SHAPES, ids=str)
def test_chunk_seeds_match_the_loop_in_values_and_gradients(shape):
    ours, rest = chunk_inputs(*shape)
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    y, expected = chunk_seeds(*ours, *rest), loop(*theirs, *rest)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, torch.zeros_like(mine) if reference.grad is None
                                   else reference.grad)  # fmt: skip


def test_chunk_gradients_are_those_of_finite_differences():
    leaves, rest = chunk_inputs(5, 3, 2, 4, torch.float64)
    rest[1][:] = torch.tensor([Phi.GELU, Phi.GLU, Phi.DIAGONAL])
    rest[0][:] = torch.tensor([0.3, 1.0, 0.7])
    rest[2][:] = 4
    torch.autograd.gradcheck(lambda *leaves: chunk_seeds(*leaves, *rest), leaves)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_alpha_zero_is_the_input_bit_for_bit_whatever_the_weights_hold(bad):
    (x, w1, b1, w2), (alpha, phi, hidden) = chunk_inputs(33, 8, 4, 4)
    alpha[:] = 0
    asleep = (w.detach() * bad for w in (w1, b1, w2))
    unchanged = chunk_seeds(x, *asleep, alpha, phi, hidden)
    assert torch.equal(unchanged, x)
    assert unchanged.data_ptr() != x.data_ptr()
    alpha[3] = 1
    w1, b1, w2 = (w.detach().clone() for w in (w1, b1, w2))
    for w in (w1, b1, w2):
        w[:3] = bad
        w[4:] = bad
    y = chunk_seeds(x, w1, b1, w2, alpha, phi, hidden)
    asleep = torch.ones(32, dtype=torch.bool)
    asleep[12:16] = False
    assert torch.equal(y[:, asleep], x[:, asleep])
    assert y.isfinite().all()


def test_bf16_activations_accumulate_in_fp32():
    (x, *pool), rest = chunk_inputs(64, 8, 8, 8)
    y = chunk_seeds(x.bfloat16(), *pool, *rest)
    assert y.dtype == torch.bfloat16
    exact = chunk_seeds(x.bfloat16().float(), *pool, *rest)
    assert torch.equal(y, exact.bfloat16())


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (33, 5, 7, 12), (64, 40, 3, 256)], ids=str)
def test_span_seeds_match_the_sum_over_units(shape):
    T, I, O, S = shape  # noqa: E741
    torch.manual_seed(0)
    x, z = torch.randn(T, I, requires_grad=True), torch.randn(T, O, requires_grad=True)
    w_in, b, w_out = (torch.randn(S, I), torch.randn(S), torch.randn(S, O))
    alpha = torch.rand(S) * (torch.rand(S) < 0.7)
    alpha[0] = 1
    phi = torch.randint(0, 5, (S,), dtype=torch.int32)
    y = span_seeds(x, z, w_in, b, w_out, alpha, phi)
    expected = z
    for s in range(S):
        unit = PHI[int(phi[s])](x @ w_in[s] + b[s])
        expected = expected + alpha[s] * unit[:, None] * w_out[s]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(y.square().sum(), (x, z))
    wanted = torch.autograd.grad(expected.square().sum(), (x, z))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-3)


def test_a_span_with_no_awake_unit_is_its_output():
    x, z, w = torch.randn(4, 3), torch.randn(4, 2), torch.full((6, 3), float("nan"))
    zero = torch.zeros(6)
    y = span_seeds(x, z, w, zero, torch.randn(6, 2), zero, zero.int())
    assert torch.equal(y, z)
    assert y.data_ptr() != z.data_ptr()


def test_wrong_shapes_are_refused_with_the_shape_that_is_needed():
    (x, w1, b1, w2), (alpha, phi, hidden) = chunk_inputs(4, 3, 2, 2)
    with pytest.raises(
        ValueError, match=r"shape \[T, 6\] \(3 seeds of 2 channels\), but got \(4, 5"
    ):
        chunk_seeds(x[:, :5], w1, b1, w2, alpha, phi, hidden)
    with pytest.raises(ValueError, match=r"one value per seed, shape \(3,\), but got \(2,\)"):
        chunk_seeds(x, w1, b1, w2, alpha[:2], phi, hidden)
    with pytest.raises(ValueError, match=r"must have shapes \(3, 2\) and \(3, 2, 2\)"):
        chunk_seeds(x, w1, b1[:, :1], w2, alpha, phi, hidden)
    with pytest.raises(ValueError, match=r"must share their positions"):
        span_seeds(torch.randn(4, 2), torch.randn(5, 2), torch.randn(1, 2), torch.zeros(1),
                   torch.randn(1, 2), torch.ones(1), torch.ones(1).int())  # fmt: skip
    with pytest.raises(ValueError, match=r"w_out_SO must have 2 rows, one per unit, but got 3"):
        span_seeds(torch.randn(4, 2), torch.randn(4, 2), torch.randn(2, 2), torch.zeros(2),
                   torch.randn(3, 2), torch.ones(2), torch.ones(2).int())  # fmt: skip
