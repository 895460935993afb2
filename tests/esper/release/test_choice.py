"""The flags of the migration choose the implementation, and whatever they choose computes the same.

`kasmina.parallel` chooses between the legacy loop and the layer that replaces it, `kasmina.triton`
between plain PyTorch and the kernels.
"""

import pytest
import torch

from esper.release.change import change_flag
from esper.release.snapshot import snapshot
from esper.seeds import legacy
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import SeedState, Stage
from esper_kernels.ops.dispatch import INTERPRET, force_triton
from esper_kernels.seeds import chunk_seeds

MODELS = [f"model-{i}" for i in range(40)]


def layers():
    """One set of seeds in both layers."""
    torch.manual_seed(0)
    old, new = legacy.SequentialLayer(5, 12, 4, hidden=4), KasminaLayer(12, 4, hidden=4).eval()
    relu = list(BLUEPRINTS).index("mlp_relu")
    new.write_states([SeedState(Stage.FINE_TUNING, relu)] * 4)
    with torch.no_grad():
        for weights in new.pool():
            weights.normal_()
        new.alpha.fill_(0.5)
    old.copy_seeds(new)
    return old, torch.nn.Sequential(old.default_transform, new)


def test_a_share_of_models_gets_the_parallel_layer(flags_path):
    change_flag(flags_path, "kasmina.parallel", {"rollout_bp": 5_000}, actor="a", reason="test")
    flags = snapshot(flags_path, {})
    old, new = layers()
    x = torch.randn(7, 5)
    chosen = {m: new if flags.evaluate("kasmina.parallel", m).enabled else old for m in MODELS}
    assert {*chosen.values()} == {old, new}
    for layer in chosen.values():
        torch.testing.assert_close(layer(x), old(x))


@pytest.mark.skipif(not INTERPRET, reason="needs kernels in Triton's interpreter")
def test_the_kernels_run_where_the_flag_and_the_device_say_so(flags_path):
    for name in ("kasmina.parallel", "kasmina.triton"):
        change_flag(flags_path, name, {"rollout_bp": 10_000}, actor="a", reason="test")
    flags = snapshot(flags_path, {})
    torch.manual_seed(0)
    S, C, H = 4, 16, 16
    weights = torch.randn(S, C, H), torch.randn(S, H), torch.randn(S, H, C)
    codes = torch.full((S,), 2, dtype=torch.int32), torch.full((S,), H, dtype=torch.int32)
    x = torch.randn(5, S * C)
    outputs = {}
    for device in ("cuda", "cpu"):
        on = flags.evaluate("kasmina.triton", "m", {"device": device}).enabled
        with force_triton():
            outputs[on] = chunk_seeds(x, *weights, torch.full((S,), 0.5), *codes, plain=not on)
    assert outputs.keys() == {True, False}
    torch.testing.assert_close(outputs[True], outputs[False], rtol=1e-4, atol=1e-4)
