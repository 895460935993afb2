"""Matched units: what is chosen explains what it should, and nothing twice."""

import pytest
import torch
from torch.nn import functional as F

from esper.seeds.matching import Rows, chunk_units, linear_unit, pursue, span_units, without
from esper_kernels import PHI, Phi

NOTHING = torch.empty(600, 0)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(source, wanted, known=None):
    ones = torch.ones(len(source), 1)
    return Rows(source, ones if known is None else torch.cat([ones, known], 1), wanted)


@pytest.fixture
def source():
    return torch.randn(600, 6, generator=draw())


def test_pursuit_finds_the_features_that_made_the_target():
    features = torch.randn(2, 400, 30, generator=draw())
    wanted = torch.stack([3 * features[0, :, 7:8] + features[0, :, 2:3], features[1, :, 11:12]])
    chosen, gain = pursue(features, wanted, NOTHING[:400], 2)
    assert chosen[0].tolist() == [7, 2]
    assert chosen[1, 0] == 11
    assert (gain[:, 0] > gain[:, 1]).all()
    # all of the target's mean square is explained by what made it
    torch.testing.assert_close(gain.sum(1), wanted.square().mean(1).sum(1), rtol=0.02, atol=0)


def test_gains_are_those_of_least_squares():
    features, wanted = (torch.randn(1, 200, n, generator=draw(n)) for n in (8, 3))
    chosen, gain = pursue(features, wanted, NOTHING[:200], 3)
    basis = features[0][:, chosen[0]].double()
    left = wanted[0].double()
    fitted = basis @ torch.linalg.lstsq(basis, left).solution
    torch.testing.assert_close(gain.sum().double(), fitted.square().sum() / 200, rtol=5e-3, atol=0)


def test_no_more_units_than_candidates():
    with pytest.raises(ValueError, match="at most the 4 candidates, but got 5"):
        pursue(torch.randn(1, 9, 4), torch.randn(1, 9, 1), NOTHING[:9], 5)


def test_what_the_host_can_express_is_worth_nothing(source):
    known = F.relu(source @ torch.randn(6, 4, generator=draw(1)))
    inside = rows_of(source, known @ torch.randn(4, 2, generator=draw(2)), known)
    outside = rows_of(source, inside.wanted)
    possible = span_units(outside, F.relu, 1, draw()).gain.item()
    assert span_units(inside, F.relu, 1, draw()).gain.item() < 1e-3 * possible


def test_a_matched_unit_explains_more_than_a_drawn_one(source):
    teacher = torch.randn(6, generator=draw(3))
    wanted = F.relu(source @ teacher + 0.5)[:, None] * torch.randn(1, 4, generator=draw(4))
    rows = rows_of(source, wanted)
    unit = span_units(rows, F.relu, 1, draw())
    assert unit.w_in.shape == (1, 6, 1)
    assert unit.bias.shape == (1, 1)
    best = unit.gain.item() / rows.unexplained(wanted).square().sum(1).mean()
    drawn = []
    for s in range(20):
        w = (2 * torch.rand(6, generator=draw(s)) - 1) / 6**0.5
        h = F.relu(source @ w)[None, :, None]
        drawn.append(pursue(h, rows.unexplained(wanted)[None], rows.basis, 1)[1].item())
    share = torch.tensor(drawn) / rows.unexplained(wanted).square().sum(1).mean()
    assert best > 0.85
    assert best > share.max()


def test_linear_units_are_the_best_there_are(source):
    # inputs that differ in scale and hang together, as those of real layers do
    source = source @ torch.randn(6, 6, generator=draw(5))
    wanted = source @ torch.randn(6, 4, generator=draw(6)) + torch.randn(600, 4, generator=draw(7))
    units = span_units(rows_of(source, wanted), PHI[Phi.IDENTITY], 6, draw())
    features = torch.cat([torch.ones(600, 1), source], 1).double()
    fitted = features @ torch.linalg.lstsq(features, wanted.double()).solution
    # of all maps of rank n, the leading parts of the fitted change explain most
    best = torch.linalg.svdvals(fitted - fitted.mean(0)).square() / 600
    torch.testing.assert_close(units.gain[0, :4].double(), best[:4], rtol=0.01, atol=0)
    assert (units.gain[0, 4:] == 0).all()
    assert (units.bias == 0).all()
    # each really explains what is said, beyond those before it
    hidden = (source @ units.w_in[0] + units.bias[0])[None, :, :4]
    rows = rows_of(source, wanted)
    explained = pursue(rows.unexplained(hidden[0])[None], rows.unexplained(wanted)[None],
                       rows.basis, 4)[1].sum()  # fmt: skip
    torch.testing.assert_close(explained, units.gain.sum(), rtol=0.01, atol=0)


def test_the_next_unit_looks_for_what_is_left(source):
    a, b = torch.eye(6)[:2]
    wanted = torch.stack([2 * F.relu(source @ a), F.relu(source @ b)], 1)
    rows = rows_of(source, wanted)
    first = span_units(rows, F.relu, 1, draw())
    hidden = F.relu(source @ first.w_in[0] + first.bias[0])
    second = span_units(without(rows, hidden), F.relu, 1, draw(1))
    assert first.w_in[0, :, 0].abs().argmax() == 0
    assert second.w_in[0, :, 0].abs().argmax() == 1
    both = span_units(rows, F.relu, 2, draw())
    assert both.gain[0, 0] > both.gain[0, 1] > 0


def test_no_unit_is_dead_and_none_without_bias_has_one(source):
    rows = rows_of(source, torch.randn(600, 3, generator=draw(5)))
    units = span_units(rows, F.relu, 8, draw())
    assert (F.relu(source @ units.w_in[0] + units.bias[0]) > 0).any(0).all()
    assert not span_units(rows, F.relu, 8, draw(), biased=False).bias.any()


def test_chunk_seeds_are_matched_to_their_own_chunks(source):
    # only the second of three chunks of two channels wants something of itself
    wanted = torch.zeros(600, 6)
    wanted[:, 2:4] = F.relu(source[:, 2:4] @ torch.randn(2, 2, generator=draw(6)))
    rows = rows_of(source, wanted)
    units = chunk_units(rows, [0, 1, 2], 3, F.relu, 4, draw())
    assert units.w_in.shape == (3, 2, 4)
    assert units.gain.sum(1).argmax() == 1
    again = chunk_units(rows, [1], 3, F.relu, 4, draw()).gain.sum()
    torch.testing.assert_close(again, units.gain[1].sum(), rtol=0.1, atol=0)


def test_the_same_generator_gives_the_same_units(source):
    rows = rows_of(source, torch.randn(600, 3, generator=draw(5)))
    one, two = (span_units(rows, F.gelu, 3, draw(9)) for _ in range(2))
    assert torch.equal(one.w_in, two.w_in)
    assert torch.equal(one.bias, two.bias)


def test_a_constant_input_is_survived():
    rows = rows_of(torch.ones(50, 4), torch.randn(50, 2, generator=draw()))
    units = span_units(rows, F.relu, 2, draw())
    assert units.w_in.isfinite().all()
    assert units.gain.isfinite().all()


def test_what_is_not_finite_is_refused(source):
    wanted = torch.zeros(600, 2)
    wanted[3] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        rows_of(source, wanted)


def test_gradmax_takes_the_direction_of_the_largest_gradient(source):
    rows = rows_of(source, torch.randn(600, 3, generator=draw(5)))
    unit, left = linear_unit(rows, tiny=False)
    w = unit.w_in[0, :, 0] / unit.w_in.norm()
    # the gradient of the outgoing weights of a linear unit
    best = (source @ w).matmul(rows.wanted).norm()
    torch.testing.assert_close(best, torch.linalg.svdvals(source.T @ rows.wanted)[0])
    second = linear_unit(left, tiny=False)[0].w_in[0, :, 0]
    torch.testing.assert_close(second @ w, torch.tensor(0.0), atol=1e-4, rtol=0)


def test_tiny_finds_the_linear_unit_that_the_host_lacks(source):
    mixed = source @ torch.randn(6, 6, generator=draw(7))
    lacking, known = mixed[:, 0], mixed[:, 1:2]
    wanted = (lacking + 5 * known[:, 0])[:, None]
    unit, _ = linear_unit(rows_of(mixed, wanted, known), tiny=True)
    z = mixed @ unit.w_in[0]
    left = rows_of(mixed, wanted, known).unexplained(torch.stack([z[:, 0], lacking], 1))
    assert torch.corrcoef(left.T)[0, 1].abs() > 0.99
