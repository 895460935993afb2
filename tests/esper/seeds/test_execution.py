"""Kernels, plain PyTorch and the legacy loop run the same seeds, and give the same."""

import copy
import math

import pytest
import torch

from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import SeedState, Stage
from esper_kernels import register_phi

NAMES = tuple(BLUEPRINTS)
STAGES = (
    Stage.DORMANT, Stage.TRAINING, Stage.GRAFTING, Stage.FINE_TUNING, Stage.FOSSILIZED,
    Stage.EVALUATING, Stage.CULLED,
)  # fmt: skip


def site(geometry, dtype=torch.float32, seed=0, stages=STAGES):
    """A layer with seeds in many stages, and what goes through it."""
    torch.manual_seed(seed)
    S, rows = len(stages), 9
    layer = KasminaLayer(
        S * 3, S, geometry=geometry, dtype=dtype,
        **({"hidden": 4} if geometry == "chunk" else {"in_features": 5}),
    )  # fmt: skip
    kinds = [n for n in NAMES if geometry in BLUEPRINTS[n].geometries]
    layer.write_states(
        [SeedState(s, NAMES.index(kinds[i % len(kinds)])) for i, s in enumerate(stages)]
    )
    with torch.no_grad():
        for weights in layer.pool():
            weights.normal_()
        awake = [s in (Stage.GRAFTING, Stage.FINE_TUNING, Stage.FOSSILIZED, Stage.EVALUATING)
                 for s in stages]  # fmt: skip
        layer.alpha.copy_(torch.rand(S) * torch.tensor(awake))
    kind = torch.float32 if dtype == torch.float32 else dtype
    x = torch.randn(rows, S * 3, dtype=kind)
    source = torch.randn(rows, 5, dtype=kind) if geometry == "span" else None
    return layer, x, source, torch.randn_like(x)


def passed(layer, execution, x, source, dy):
    """Output, gradients of everything, and telemetry of one training pass."""
    layer = copy.deepcopy(layer)
    layer.execution = execution
    ins = [t.clone().requires_grad_() for t in (x, source) if t is not None]
    y = layer(*ins)
    y.backward(dy)
    told = layer.telemetry()
    return [y, *(t.grad for t in ins), *(w.grad for w in layer.pool())], told


@pytest.mark.parametrize("geometry", ["chunk", "span"])
@pytest.mark.parametrize("objective", ["desired_update", "reconstruction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loop_gives_what_the_others_give(geometry, objective, dtype):
    layer, x, source, dy = site(geometry, dtype)
    layer.objective = objective
    wanted, told = passed(layer, "kernels", x, source, dy)
    for execution in ("vectorised", "loop"):
        got, told_now = passed(layer, execution, x, source, dy)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
        assert told_now.keys() == told.keys()
        for name in told:
            torch.testing.assert_close(
                told_now[name], told[name], rtol=1e-4, atol=1e-5, equal_nan=True
            )


@pytest.mark.parametrize("geometry", ["chunk", "span"])
def test_sleeping_seeds_with_nan_leave_the_host_alone(geometry):
    layer, x, source, dy = site(geometry)
    layer.execution = "loop"
    with torch.no_grad():
        for weights in layer.pool():
            weights[layer.alpha == 0] = math.nan
    x.requires_grad_()
    y = layer(x, source)
    y.backward(dy)
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    if geometry == "chunk":
        still = (layer.alpha == 0).repeat_interleave(3)
        assert torch.equal(y[:, still], x[:, still])
        assert torch.equal(x.grad[:, still], dy[:, still])


@pytest.mark.parametrize("geometry", ["chunk", "span"])
@pytest.mark.parametrize("stage", [Stage.DORMANT, Stage.TRAINING])
def test_the_loop_returns_the_hosts_bits_and_gradient_while_all_sleep(geometry, stage):
    layer, x, source, dy = site(geometry, stages=[stage] * 4)
    layer.execution = "loop"
    with torch.no_grad():
        layer.w_out.fill_(math.nan)
    x.requires_grad_()
    y = layer(x * 1, source)
    y.backward(dy)
    assert torch.equal(y, x)
    assert torch.equal(x.grad, dy)


def test_only_awake_seeds_are_computed_one_at_a_time():
    seen = []

    def noted(z):
        seen.append(z.shape)
        return z

    layer, x, source, dy = site("chunk", stages=[Stage.FINE_TUNING] * 3 + [Stage.DORMANT])
    layer.phi.fill_(register_phi(noted))
    passed(layer, "loop", x, source, dy)
    assert seen == [(9, 4)] * 3


def test_half_precision_is_computed_in_fp32():
    layer, x, source, dy = site("chunk")
    x, dy = x.bfloat16(), dy.bfloat16()
    wanted, _ = passed(layer, "vectorised", x, source, dy)
    got, _ = passed(layer, "loop", x, source, dy)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_wrong_name_is_refused():
    with pytest.raises(ValueError, match="execution must be one of kernels, vectorised, loop"):
        KasminaLayer(4, 2, execution="fast")


def test_a_loop_is_not_compiled():
    layer, x, source, _ = site("chunk")
    layer.execution = "loop"
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="execution must be 'kernels' in a compiled model"):
        compiled(x, source)
