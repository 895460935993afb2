"""Blueprints: parameters are counted as gradients arrive; your own is one decorator away."""

import math

import pytest
import torch
from torch.nn import functional as F

from esper.seeds.blueprints import BLUEPRINTS, blueprint, blueprint_id
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import SeedState, Stage
from esper_kernels import PHI

CHUNK = list(BLUEPRINTS)
SPAN = [n for n in BLUEPRINTS if "span" in BLUEPRINTS[n].geometries]


def layer_with(name, geometry="chunk", stage=Stage.FINE_TUNING, **options):
    """Three seeds with random weights; the middle one is awake at alpha 1."""
    torch.manual_seed(0)
    layer = KasminaLayer(12, 3, geometry=geometry, **options)
    seed = SeedState(stage, blueprint_id(name))
    layer.write_states([SeedState(), seed, SeedState()])
    with torch.no_grad():
        for weights in layer.pool():
            weights.normal_()
        layer.alpha[1] = float(stage is Stage.FINE_TUNING)
    return layer


def with_gradient(layer):
    return sum(int(w.grad.count_nonzero()) for w in layer.pool() if w.grad is not None)


@pytest.mark.parametrize("name", CHUNK)
@pytest.mark.parametrize("hidden", [2, 4, 10])
def test_a_chunk_seed_has_as_many_parameters_as_get_a_gradient(name, hidden):
    layer = layer_with(name, hidden=hidden)
    layer(torch.randn(256, 12)).mul(torch.randn(256, 12)).sum().backward()
    assert with_gradient(layer) == layer.seed_parameters(BLUEPRINTS[name])


@pytest.mark.parametrize("name", SPAN)
def test_a_span_seed_has_as_many_parameters_as_get_a_gradient(name):
    layer = layer_with(name, "span", in_features=5)
    layer(torch.randn(256, 12), torch.randn(256, 5)).mul(torch.randn(256, 12)).sum().backward()
    assert with_gradient(layer) == layer.seed_parameters(BLUEPRINTS[name])


def test_the_counts_in_numbers():
    count = {n: BLUEPRINTS[n].parameters("chunk", 6, 4, 6) for n in BLUEPRINTS}
    assert count == {
        "noop": 0,
        "scale_shift": 2 * 6,
        "low_rank": 2 * 7 + 2 * 6,
        "mlp_relu": 4 * 7 + 4 * 6,
        "mlp_gelu": 52,
        "mlp_silu": 52,
        "glu": 4 * 7 + 2 * 6,
    }
    assert BLUEPRINTS["low_rank"].parameters("span", 6, 1, 9) == 6 + 1 + 9


@pytest.mark.parametrize(("available", "used"), [(1, 1), (2, 1), (5, 2), (8, 4)])
def test_low_rank_uses_half_of_the_hidden_units_and_at_least_one(available, used):
    assert BLUEPRINTS["low_rank"].hidden(available) == used


@pytest.mark.parametrize(
    ("name", "geometry", "hidden", "message"),
    [
        ("glu", "chunk", 3, r"hidden must be even for blueprint 'glu', but got 3"),
        ("scale_shift", "chunk", 1, r"hidden must be at least 2 for blueprint 'scale_shift'"),
        ("glu", "span", 1, r"on a span site must be one of noop, .*, but got 'glu'"),
        ("scale_shift", "span", 1, r"on a span site must be one of noop, .*'scale_shift'"),
    ],
)
def test_what_does_not_fit_is_refused(name, geometry, hidden, message):
    assert not BLUEPRINTS[name].fits(geometry, hidden)
    with pytest.raises(ValueError, match=message):
        BLUEPRINTS[name].require(geometry, hidden)


def test_everything_fits_a_chunk_of_even_hidden_width():
    assert all(BLUEPRINTS[n].fits("chunk", 2) for n in BLUEPRINTS)


def test_the_id_of_a_dormant_seed_is_the_no_op():
    assert blueprint_id("noop") == SeedState().blueprint_id == 0


@pytest.fixture
def registered():
    """Forgets what the test registers."""
    names, codes = set(BLUEPRINTS), set(PHI)
    yield
    for name in set(BLUEPRINTS) - names:
        del BLUEPRINTS._items[name]
    for code in set(PHI) - codes:
        del PHI[code]


@pytest.fixture
def sine(registered):
    return blueprint("sine", hidden_frac=0.5)(torch.sin)


@pytest.fixture
def bilinear(registered):
    @blueprint("bilinear", chunk_only=True)
    def bilinear(z):
        a, b = z.chunk(2, dim=-1)
        return torch.cat([a * b, torch.zeros_like(a)], dim=-1)

    return bilinear


@pytest.mark.usefixtures("sine")
def test_a_blueprint_of_your_own_computes_what_it_says():
    layer, x = layer_with("sine", hidden=6), torch.randn(9, 12)
    w_in, bias, w_out = (w[1] for w in layer.pool())
    wanted = x.clone()
    wanted[:, 4:8] += torch.sin(x[:, 4:8] @ w_in[:, :3] + bias[:3]) @ w_out[:3]
    torch.testing.assert_close(layer(x), wanted)
    layer(x).square().sum().backward()
    assert with_gradient(layer) == layer.seed_parameters(BLUEPRINTS["sine"]) == 3 * 5 + 3 * 4


@pytest.mark.usefixtures("sine")
def test_a_blueprint_of_your_own_works_on_a_span():
    layer = layer_with("sine", "span", in_features=5)
    z, x = torch.randn(9, 12), torch.randn(9, 5)
    w_in, bias, w_out = (w[1] for w in layer.pool())
    torch.testing.assert_close(layer(z, x), z + torch.sin(x @ w_in + bias)[:, None] * w_out)


@pytest.mark.usefixtures("bilinear")
def test_a_gated_blueprint_of_your_own_next_to_others():
    layer, x = layer_with("bilinear", hidden=4), torch.randn(9, 12)
    relu = SeedState(Stage.FINE_TUNING, blueprint_id("mlp_relu"))
    layer.write_states([layer.states()[1], layer.states()[1], relu])
    with torch.no_grad():
        layer.alpha.fill_(1)
    w_in, bias, w_out = layer.pool()
    chunks = []
    for s, chunk in enumerate(x.chunk(3, 1)):
        z = chunk @ w_in[s] + bias[s]
        h = F.relu(z) if s == 2 else F.pad(z[:, :2] * z[:, 2:], (0, 2))
        chunks.append(chunk + h @ w_out[s])
    torch.testing.assert_close(layer(x), torch.cat(chunks, 1))


@pytest.mark.parametrize("own", ["sine", "bilinear"])
def test_a_blueprint_of_your_own_learns_in_isolation(own, request):
    request.getfixturevalue(own)
    layer = layer_with(own, stage=Stage.TRAINING)
    with torch.no_grad():
        layer.w_out.zero_()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(64, 12)
    target = x + torch.sin(2 * x)
    explained = []
    for _ in range(100):
        layer.reset_telemetry()
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        explained.append(float(layer.telemetry()["explained_frac"][1]))
        optimizer.step()
    assert explained[0] == 0
    assert explained[-1] > 0.05


@pytest.mark.usefixtures("sine")
def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match=r"name must be new, but 'sine' is already registered"):
        blueprint("sine")(torch.sin)
    with pytest.raises(ValueError, match=r"name must be new, but 'glu' is already registered"):
        blueprint("glu")(torch.sin)


@pytest.mark.parametrize("frac", [0.0, -0.5, 1.5, math.nan])
def test_a_wrong_share_of_hidden_units_is_refused(frac):
    with pytest.raises(ValueError, match=r"hidden_frac must be in \(0, 1\], but got"):
        blueprint("new", hidden_frac=frac)


def test_a_function_that_mixes_hidden_units_uses_them_all():
    with pytest.raises(ValueError, match=r"hidden_frac must be 1 for a function that mixes"):
        blueprint("new", hidden_frac=0.5, chunk_only=True)
