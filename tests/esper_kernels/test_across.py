"""Seeds that learn alone on a batch that is spread: the mean of the parts is the whole.

On a machine without a GPU the kernels run under Triton's interpreter, and plain PyTorch anywhere.
"""

from contextlib import nullcontext

import pytest
import torch

from esper_kernels import Phi, across
from esper_kernels.ops.dispatch import INTERPRET, force_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.param(
    False,
    marks=[
        pytest.mark.skipif(DEVICE == "cpu" and not INTERPRET, reason="needs a GPU"),
        # the interpreter takes its time
        *([pytest.mark.slow] if INTERPRET else []),
    ],
)
T, S = 24, 3


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def flags(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def chunk(C, H, objective, plain):
    """The backward pass of some rows: gradients of the pool, and the explained shares."""
    x, dy, pool = draw(T, S * C), draw(T, S * C), (draw(S, C, H), draw(S, H), draw(S, H, C))
    alpha = torch.tensor([0.5, 0.0, 0.0], device=DEVICE)
    seeds = alpha, flags(Phi.RELU, Phi.GELU, Phi.SILU), flags(H, H, H - 1), flags(1, 2, 2)
    ops = torch.ops.esper

    def backward(rows, scale):
        stats = x.new_empty(3, 0)
        out = ops.chunk_seeds_backward.default(
            dy[rows] * scale, x[rows], *pool, *seeds, stats, objective, False, plain
        )
        return *out[1:4], out[5][4 * S * C :][:S]

    return backward


def span(I, O, objective, plain):  # noqa: E741 (input and output features)
    """The same of a span."""
    x, z, dy, pool = draw(T, I), draw(T, O), draw(T, O), (draw(S, I), draw(S), draw(S, O))
    alpha = torch.tensor([0.5, 0.0, 0.0], device=DEVICE)
    seeds = alpha, flags(Phi.RELU, Phi.GELU, Phi.SILU), flags(1, 2, 2)
    ops = torch.ops.esper

    def backward(rows, scale):
        given = x[rows], z[rows], *pool, *seeds
        _, *kept = ops.span_seeds.default(*given, None, objective, False, plain, True)
        out = ops.span_seeds_backward.default(
            dy[rows] * scale, *given, *kept, objective, False, plain
        )
        return *out[1:4], out[5][4 * O :][:S]

    return backward


def mean_of_halves(backward):
    """Two processes, one after the other: what each tells is what the other heard a round before.

    The second thing that they tell may depend on the first, so that the third round is settled.
    """
    heard = [[], []]
    for _ in range(3):
        told, results = [[], []], []
        for half in (0, 1):

            def mean(local, half=half, told=told, heard=heard):
                at = len(told[half])
                told[half].append(local.clone())
                known = [calls[at] for calls in heard if at < len(calls)]
                return torch.stack(known).mean(0) if known else local

            # the loss is a mean over the rows, of which each has half
            with across.processes(mean):
                results.append(backward(slice(half * T // 2, (half + 1) * T // 2), 2.0))
        heard = told
    assert all(heard)
    return [torch.stack(parts).mean(0) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("plain", [True, kernels])
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize(("make", "sizes"), [(chunk, (8, 6)), (chunk, (160, 20)), (span, (9, 7))])
def test_the_mean_of_two_halves_is_the_whole_batch(make, sizes, objective, plain):
    torch.manual_seed(1)
    backward = make(*sizes, objective, plain)
    with nullcontext() if plain else force_triton():
        whole, halves = backward(slice(0, T), 1.0), mean_of_halves(backward)
        # of two that tell each other nothing
        alone = [backward(slice(half * T // 2, (half + 1) * T // 2), 2.0) for half in (0, 1)]
    for ours, wanted in zip(halves, whole, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose((alone[0][0] + alone[1][0]) / 2, whole[0], rtol=1e-3)
