"""The legacy loop and the parallel layer compute the same, given the same seeds."""

import pytest
import torch

import esper
from esper.seeds import legacy
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import SeedState, Stage

NAMES = tuple(BLUEPRINTS)
BUILT_IN = ("noop", "scale_shift", "low_rank", "mlp_relu", "mlp_gelu", "mlp_silu", "glu")


def twins(num_seeds, width, seed):
    """A legacy layer, and its linear part followed by a parallel layer with the same seeds."""
    torch.manual_seed(seed)
    channels = num_seeds * width
    old = legacy.SequentialLayer(5, channels, num_seeds, hidden=4)
    new = KasminaLayer(channels, num_seeds, hidden=4).eval()
    stages = torch.randint(0, 2, (num_seeds,)).tolist()
    kinds = torch.randint(0, len(BUILT_IN), (num_seeds,)).tolist()
    new.write_states([
        SeedState(Stage.FINE_TUNING, NAMES.index(BUILT_IN[k])) if awake else SeedState()
        for awake, k in zip(stages, kinds, strict=True)
    ])  # fmt: skip
    with torch.no_grad():
        for weights in new.pool():
            weights.normal_()
        new.alpha.copy_(torch.rand(num_seeds) * torch.tensor(stages))
    old.copy_seeds(new)
    return old, new


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 31, 256, 1024])
@pytest.mark.parametrize("batch", [1, 7, 63])
def test_outputs_and_every_gradient_agree(num_seeds, batch):
    old, new = twins(num_seeds, width=3, seed=num_seeds + batch)
    x_old = torch.randn(batch, 5)
    x_new = x_old.clone().requires_grad_()
    x_old.requires_grad_()
    y_old = old(x_old)
    y_new = new(torch.nn.functional.linear(x_new, *old.default_transform.parameters()))
    torch.testing.assert_close(y_new, y_old)

    dy = torch.randn_like(y_old)
    linear = list(old.default_transform.parameters())
    grads_new = torch.autograd.grad(y_new, [x_new, *linear, *new.pool()], dy, allow_unused=True)
    y_old.backward(dy)
    torch.testing.assert_close(grads_new[0], x_old.grad)
    for mine, theirs in zip(grads_new[1:3], linear, strict=True):
        # sums over the batch round in different orders
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-5, atol=1e-5)
    for name, pooled in zip(("w1", "b1", "w2"), grads_new[3:], strict=True):
        for i, seed in enumerate(old.seeds):
            alone = getattr(seed, name).grad
            wanted = torch.zeros_like(getattr(seed, name)) if alone is None else alone
            mine = torch.zeros_like(wanted) if pooled is None else pooled[i]
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_alpha_zero_is_the_bare_linear_layer_even_with_nan_weights():
    layer = legacy.SequentialLayer(3, 8, 4)
    layer.load_kernel(1, "mlp_gelu")
    with torch.no_grad():
        layer.seeds[1].w1.fill_(float("nan"))
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), layer.default_transform(x))


def test_the_old_interface():
    layer = legacy.SequentialLayer(3, 8, num_seeds=4, layer_name="old")
    assert layer.load_kernel(0, "mlp_relu")
    layer.set_seed_alpha(0, 7.0)
    assert layer.alpha_blend[0] == 1.0
    layer(torch.randn(2, 3))
    stats = layer.get_layer_stats()
    assert stats["layer_name"] == "old"
    assert stats["total_forward_calls"] == stats["total_kernel_executions"] == 1
    assert stats["state_stats"]["active_seeds"] == 1
    assert stats["state_stats"]["dormant_seeds"] == 3
    layer.unload_kernel(0)
    assert layer.get_layer_stats()["state_stats"]["dormant_seeds"] == 4
    with pytest.raises(ValueError, match=r"seed_idx must be in 0..3, but got 4"):
        layer.set_seed_alpha(4, 0.5)
    with pytest.raises(ValueError, match=r"num_seeds must divide output_size \(8\), but got 3"):
        legacy.SequentialLayer(3, 8, num_seeds=3)


@pytest.mark.parametrize("num_seeds", [7, 64])
def test_seeds_that_are_handed_over_compute_the_same(num_seeds):
    old, _ = twins(num_seeds, width=3, seed=num_seeds)
    new = KasminaLayer(3 * num_seeds, num_seeds, hidden=4)
    old.give_seeds(new)
    parallel = torch.nn.Sequential(old.default_transform, new)
    x = torch.randn(63, 5)
    torch.testing.assert_close(parallel(x), old(x))
    kept = {Stage.DORMANT, Stage.GERMINATED, Stage.FINE_TUNING}
    assert set(new.states().stages()) <= kept
    for state, alpha, seed in zip(new.states(), old.alpha_blend, old.seeds, strict=True):
        assert NAMES[state.blueprint_id] == seed.blueprint.name
        assert (state.stage is Stage.FINE_TUNING) == (alpha != 0 and seed.blueprint.name != "noop")
    with pytest.raises(ValueError, match="layer must have dormant seeds only"):
        old.give_seeds(new)
    with pytest.raises(ValueError, match="layer must be a chunk layer with weights"):
        old.give_seeds(KasminaLayer(3 * num_seeds, num_seeds, hidden=5))


def test_a_loaded_seed_that_was_never_blended_in_waits_with_its_weights():
    old = legacy.SequentialLayer(3, 8, num_seeds=4)
    old.load_kernel(2, "mlp_relu")
    model = torch.nn.Sequential(old.default_transform)
    lattice = esper.attach(model, "0", 4)
    old.give_seeds(lattice.layer("0"))
    stages = [state.stage for state in lattice.layer("0").states()]
    assert stages == [Stage.DORMANT, Stage.DORMANT, Stage.GERMINATED, Stage.DORMANT]
    assert torch.equal(lattice.layer("0").w_in[2], old.seeds[2].w1)
    lattice.apply([esper.Promote("0", 2)])
    assert torch.equal(lattice.layer("0").w_in[2], old.seeds[2].w1)
