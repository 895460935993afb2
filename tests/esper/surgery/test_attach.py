"""Attaching changes nothing about the host, bit for bit, until a seed is grafted."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.seeds.actions import Germinate, Promote
from esper.surgery.attach import attach
from esper.surgery.lattice import lattice_of


class Mixer(nn.Module):
    """Channels first, of no type that Esper knows."""

    def __init__(self, channels=8):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1))

    def forward(self, x):
        return x * self.scale


class Attention(nn.Module):
    """Gives its output and a map, as `nn.MultiheadAttention` does."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        y, weights = self.mha(x, x, x)
        return self.out(y) + weights.sum(-1, keepdim=True)


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return x + self.fc2(torch.relu_(self.fc1(self.norm(x))))


class Recomputed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.block, self.out = nn.Linear(8, 8), Block(), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x):
        return self.out(checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant))


def flat(*modules, width):
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(width, 3))


def encoder():
    return nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), nn.Linear(8, 3)
    )


IMAGE, SIGNAL, TEXT, FLAT = (4, 3, 5, 5), (4, 3, 9), (4, 6, 8), (7, 6)
ReLU = lambda: nn.ReLU(inplace=True)  # noqa: E731
# name: model, input shape, options of attach
CASES = {
    "linear": (lambda: flat(nn.Linear(6, 8), ReLU(), width=8), FLAT, {"sites": "0"}),
    "linear_two_seeds": (
        lambda: flat(nn.Linear(6, 8), ReLU(), width=8),
        FLAT,
        {"sites": "0", "seeds_per_layer": 2},
    ),
    "activation": (
        lambda: flat(nn.Linear(6, 8), nn.ReLU(), width=8),
        FLAT,
        {"sites": "1", "channels": 8},
    ),
    "conv2d": (lambda: flat(nn.Conv2d(3, 8, 3), ReLU(), width=72), IMAGE, {"sites": "0"}),
    "conv1d": (lambda: flat(nn.Conv1d(3, 8, 3), ReLU(), width=56), SIGNAL, {"sites": "0"}),
    "batchnorm2d": (
        lambda: flat(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), ReLU(), width=72),
        IMAGE,
        {"sites": "1"},
    ),
    "groupnorm": (
        lambda: flat(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), ReLU(), width=72),
        IMAGE,
        {"sites": "1"},
    ),
    "layernorm": (lambda: flat(nn.LayerNorm(8), width=48), TEXT, {"sites": "0"}),
    "custom": (
        lambda: flat(nn.Conv1d(3, 8, 3), Mixer(), width=56),
        SIGNAL,
        {"sites": "1", "channels": 8, "channel_axis": 1},
    ),
    "container": (
        lambda: flat(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3)), ReLU(), width=8),
        FLAT,
        {"sites": "0", "channels": 8},
    ),
    "tuple": (Attention, TEXT, {"sites": "mha"}),
    "encoder_linear": (encoder, TEXT, {"sites": "0.linear*"}),
    "encoder_norm": (encoder, TEXT, {"sites": "0.norm*"}),
    "encoder_whole": (encoder, TEXT, {"sites": "0", "channels": 8}),
    "span": (
        lambda: nn.Sequential(Block(), Block()),
        TEXT,
        {"sites": "*.fc1->*.fc2", "geometry": "span", "seeds_per_layer": 5},
    ),
    "span_of_one": (
        lambda: nn.Sequential(Block(), Block()),
        TEXT,
        {"sites": "*.fc2", "geometry": "span", "seeds_per_layer": 5},
    ),
    "recomputed": (lambda: Recomputed(False), TEXT, {"sites": "block.fc*"}),
    "recomputed_reentrant": (lambda: Recomputed(True), TEXT, {"sites": "block.fc*"}),
    "recomputed_span": (
        lambda: Recomputed(False),
        TEXT,
        {"sites": "block.fc1->block.fc2", "geometry": "span"},
    ),
}


def make(case, *, dtype=torch.float32):
    """A model, its twin, an input, and a function that attaches a lattice to the model."""
    build, shape, options = CASES[case]
    torch.manual_seed(0)
    model = build().to(dtype)
    x = torch.randn(shape).to(dtype)
    return model, copy.deepcopy(model), x, {"seeds_per_layer": 4, **options}


def traces(model, x, *, steps=5):
    """Everything that training leaves: outputs, gradients, buffers."""
    torch.manual_seed(1)
    found = []
    for _ in range(steps):
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        found += [y.detach()]
        found += [p.grad for n, p in model.named_parameters() if "kasmina" not in n]
        found += [b.clone() for n, b in model.named_buffers() if "kasmina" not in n]
    return found


def same(a, b):
    assert len(a) == len(b)
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_bit_for_bit_until_a_seed_is_grafted(case):
    model, twin, x, options = make(case)
    lattice = attach(model, **options)
    assert same(traces(model, x), traces(twin, x))
    site = next(iter(lattice.attached))
    lattice.apply([Germinate(site, 1, "mlp_relu")])
    assert same(traces(model, x), traces(twin, x))
    lattice.apply([Promote(site, 1)])
    assert same(traces(model, x), traces(twin, x))
    assert lattice.layer(site).w_out.grad[1].any(), "the seed trains on an objective of its own"
    lattice.plant(site, 0, "mlp_gelu")
    assert not same(traces(model, x), traces(twin, x))


EVALUATIONS = [
    (case, mode)
    for case in CASES
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad)
    # without hooks, and without a gradient, torch runs an encoder layer as one kernel
    if mode is torch.enable_grad or not case.startswith("encoder")
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(("case", "mode"), EVALUATIONS)
def test_evaluation_is_the_same_bit_for_bit(case, mode):
    model, twin, x, options = make(case)
    lattice = attach(model, **options)
    site = next(iter(lattice.attached))
    lattice.apply([Germinate(site, 1, "mlp_relu")])
    lattice.apply([Promote(site, 1)])
    with mode():
        assert torch.equal(model.eval()(x), twin.eval()(x))
        lattice.plant(site, 0, "mlp_gelu")
        assert not torch.equal(model(x), twin(x))


@pytest.mark.parametrize("case", CASES)
def test_the_hosts_own_keys_stay(case):
    model, twin, _, options = make(case)
    lattice = attach(model, **options)
    keys = list(model.state_dict())
    assert [k for k in keys if "kasmina" not in k] == list(twin.state_dict())
    assert len(keys) > len(list(twin.state_dict()))
    assert all(a.layer.geometry == options.get("geometry", "chunk")
               for a in lattice.attached.values())  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_detaching_leaves_the_host_alone(case):
    model, twin, x, options = make(case)
    lattice = attach(model, **options)
    for site in lattice.attached:
        lattice.plant(site, 0, "mlp_gelu")
    assert lattice.detach() is model
    assert list(model.state_dict()) == list(twin.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert same(traces(model, x), traces(twin, x))
    assert lattice_of(model) is None


@pytest.mark.parametrize("case", ["linear", "conv2d", "span", "tuple"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_working_lattice_of_its_own(case, copied):
    model, _, x, options = make(case)
    lattice = attach(model, **options)
    site = next(iter(lattice.attached))
    lattice.plant(site, 0, "mlp_gelu")
    other = copied(model)
    theirs = lattice_of(other)
    assert theirs is not lattice
    assert theirs.model is other
    assert torch.equal(model(x), other(x))
    before = model(x)
    theirs.plant(site, 1, "mlp_gelu")
    assert torch.equal(model(x), before)
    assert not torch.equal(other(x), before)
    assert (lattice.count_awake(), theirs.count_awake()) == (1, 2)
    theirs.detach()
    assert not any(m._forward_hooks for m in other.modules())
    assert torch.equal(model(x), before)


def test_a_hook_that_comes_after_loading_does_not_push_out_the_lattice():
    """Torch numbers hooks by process; one that was pickled must keep its number."""
    model, _, x, options = make("linear")
    attach(model, **options).plant("0", 0, "mlp_gelu")
    packed, expected = pickle.dumps(model), model(x)
    from torch.utils.hooks import RemovableHandle

    before = RemovableHandle.next_id
    try:
        RemovableHandle.next_id = 0
        loaded = pickle.loads(packed)
        for _ in range(3):
            loaded[0].register_forward_hook(lambda *_: None)
        assert len(loaded[0]._forward_hooks) == 4
        assert torch.equal(loaded(x), expected)
    finally:
        RemovableHandle.next_id = before


def test_several_attach_calls_share_one_handle():
    model = nn.Sequential(Block(), Block())
    lattice = attach(model, "0.fc1", 4)
    assert attach(model, "1.fc1", 3) is lattice
    assert attach(model, "*.fc1->*.fc2", 6, geometry="span") is lattice
    assert lattice_of(model) is lattice
    assert list(lattice.attached) == ["0.fc1", "1.fc1", "0.fc1->0.fc2", "1.fc1->1.fc2"]
    assert [a.layer.num_seeds for a in lattice.attached.values()] == [4, 3, 6, 6]


def test_a_chunk_site_and_a_span_on_one_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8))
    host, x = copy.deepcopy(model), torch.randn(5, 6)
    lattice = attach(model, "0", 1)
    attach(model, "0", 3, geometry="span")
    assert {k.split(".")[1] for k in model.state_dict()} == {
        "weight",
        "bias",
        "kasmina",
        "kasmina_1",
    }
    lattice.plant("0", 0, "scale_shift")
    lattice.plant("0->0", 1, "low_rank")
    chunk, span = lattice.layer("0"), lattice.layer("0->0")
    z = host(x)
    z = z + z * chunk.w_out[0, 0] + chunk.w_out[0, 1]
    z = z + (x @ span.w_in[1] + span.bias[1])[:, None] * span.w_out[1]
    torch.testing.assert_close(model(x), z)


@pytest.mark.parametrize(("biased", "parameters"), [(None, 14), (True, 15)])
def test_units_have_a_bias_if_the_host_has_one_or_they_are_given_one(biased, parameters):
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    lattice = attach(model, "0", 3, geometry="span", biased=biased)
    lattice.plant("0->0", 1, "low_rank")
    assert lattice.count_parameters() == 48 + parameters
    span, x = lattice.layer("0->0"), torch.randn(5, 6)
    z = x @ model[0].weight.T + (x @ span.w_in[1] + span.bias[1])[:, None] * span.w_out[1]
    torch.testing.assert_close(model(x), z)
    model(x).square().sum().backward()
    assert (span.bias.grad is not None) is (biased is True)


@pytest.mark.parametrize("case", ["linear", "conv2d"])
def test_the_only_seed_of_a_site_is_trained_through_an_inplace_activation(case):
    model, twin, x, options = make(case)
    lattice = attach(model, **options | {"seeds_per_layer": 1})
    lattice.apply([Germinate("0", 0, "mlp_relu")])
    lattice.apply([Promote("0", 0)])
    assert same(traces(model, x), traces(twin, x))
    lattice.apply([esper.Advance("0", 0)])
    lattice.layer("0").alpha[0] = 1
    model.zero_grad()
    model(x).square().mean().backward()
    assert lattice.layer("0").w_out.grad.any()


def test_growth_and_seed_are_given_once_and_kept():
    model = nn.Sequential(Block(), Block())
    growth = esper.GrowthConfig(ramp_steps=7, objective="reconstruction")
    lattice = attach(model, "0.fc1", 4, growth=growth, seed=3)
    attach(model, "1.fc1", 4)
    assert (lattice.growth, lattice.seed) == (growth, 3)
    assert {a.layer.ramp_steps for a in lattice.attached.values()} == {7}
    assert {a.layer.objective for a in lattice.attached.values()} == {"reconstruction"}


WRONG = {
    "nothing": ({"sites": "blocks.*"}, "matches none; its modules are: 0, 1, 2, 2.0, 2.0.norm"),
    "divisors": (
        {"sites": "0", "seeds_per_layer": 3},
        r"divide the site's 8 channels, but got 3; use one of \[1, 2, 4, 8\]",
    ),
    "second_does_not_fit": ({"sites": "2.0.*", "seeds_per_layer": 8}, "12 channels, but got 8"),
    "no_seeds": ({"sites": "0", "seeds_per_layer": 0}, "at least 1, but got 0"),
    "twice": ({"sites": "1"}, "no lattice yet, but '1' has one"),
    "leaves": ({"sites": "0->2.0.fc1", "geometry": "span"}, "inside one parent"),
    "width": ({"sites": "3"}, "channels must be given for '3', since a ReLU does not"),
    "span_begin": ({"sites": "3->4", "geometry": "span"}, "but '3' is a ReLU; begin the span"),
    "chunk_arrow": ({"sites": "0->1"}, "must name one module for chunk seeds"),
    "geometry": ({"sites": "0", "geometry": "chunks"}, "must be 'chunk' or 'span'"),
    "span_hidden": (
        {"sites": "0", "geometry": "span", "hidden": 3},
        "hidden must be left out for a span",
    ),
    "chunk_biased": ({"sites": "0", "biased": False}, "biased must be left out for a chunk"),
    "list": ({"sites": "2", "channels": 8}, "compute something, but '2' is a ModuleList"),
    "empty": ({"sites": "5", "channels": 8}, "compute something, but '5' is an empty Sequential"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_and_the_model_left_unchanged(wrong):
    options, match = WRONG[wrong]
    model = nn.ModuleList([
        nn.Linear(6, 8), nn.Linear(8, 8), nn.ModuleList([Block()]), nn.ReLU(), nn.Linear(8, 8),
        nn.Sequential(),
    ])  # fmt: skip
    lattice = attach(model, "1", 2)
    before = (list(model.state_dict()), [(len(m._forward_hooks), len(m._forward_pre_hooks))
                                        for m in model.modules()])  # fmt: skip
    with pytest.raises(ValueError, match=match):
        attach(model, **{"seeds_per_layer": 4, **options}, growth=esper.GrowthConfig(ramp_steps=3))
    after = (list(model.state_dict()), [(len(m._forward_hooks), len(m._forward_pre_hooks))
                                       for m in model.modules()])  # fmt: skip
    assert before == after
    assert list(lattice.attached) == ["1"]
    assert lattice.growth == esper.GrowthConfig()


def test_a_refused_first_attach_leaves_no_handle():
    model = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match="divide"):
        attach(model, "0", 5)
    assert lattice_of(model) is None
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_wrong_channels_are_named_at_the_first_pass():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    attach(model, "1", 2, channels=6)
    with pytest.raises(ValueError, match=r"channels must be 6 on axis -1 .* shape \(2, 8\)"):
        model(torch.randn(2, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_may_change_its_dtype(dtype):
    model, twin, x, options = make("conv2d")
    lattice = attach(model, **options)
    model.to(dtype)
    twin.to(dtype)
    assert same(traces(model, x.to(dtype)), traces(twin, x.to(dtype)))
    assert lattice.layer("0").alpha.dtype is torch.float32
    lattice.report(1.0)
    model.to(torch.float32).to(dtype)
    assert lattice.report(1.0).host_drift_frac == 0
    lattice.plant("0", 0, "mlp_gelu")
    assert model(x.to(dtype)).dtype is dtype


def test_the_model_may_move_to_another_device():
    model, _, x, options = make("conv2d")
    attach(model, **options)
    moved = model.to("meta")
    assert {t.device.type for t in moved.state_dict().values()} == {"meta"}
    assert moved(x.to("meta")).shape == (4, 3)


@pytest.mark.parametrize("case", ["linear", "conv2d", "span", "recomputed"])
def test_a_frozen_host_still_tells_where_growth_would_help(case):
    energies = {}
    for frozen in (False, True):
        model, _, x, options = make(case)
        lattice = attach(model, **options)
        if frozen:
            for parameter in lattice.host_parameters():
                parameter.requires_grad_(False)
        model(x).square().mean().backward()
        site = lattice.report(1.0).sites[0]
        energies[frozen] = torch.as_tensor(site.grad_energy)
    assert (energies[False] > 0).all()
    torch.testing.assert_close(energies[True], energies[False])


@pytest.mark.parametrize("blueprint", ["scale_shift", "low_rank", "mlp_relu", "mlp_gelu", "glu"])
def test_autocast_runs_dormant_training_and_grafted_seeds(blueprint):
    model, twin, x, options = make("linear")
    lattice = attach(model, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(traces(model, x), traces(twin, x))
        lattice.apply([Germinate("0", 1, blueprint)])
        lattice.apply([Promote("0", 1)])
        assert same(traces(model, x), traces(twin, x))
        lattice.plant("0", 0, blueprint)
        lattice.plant("0", 2, "mlp_silu")
        y = model(x)
        y.float().square().mean().backward()
    assert y.dtype is torch.bfloat16
    assert lattice.layer("0").w_out.grad[0].isfinite().all()
    torch.testing.assert_close(y.float(), model(x), atol=0.05, rtol=0.05)


def test_a_host_that_views_its_activations_may_have_grafted_seeds():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(72, 3)

        def forward(self, x):
            return self.out(self.conv(x).view(len(x), -1))

    model = Viewing()
    attach(model, "conv", 4).plant("conv", 0, "mlp_relu")
    assert model(torch.randn(IMAGE)).shape == (4, 3)


def test_a_model_with_a_lattice_can_be_saved_by_torch():
    model, _, x, options = make("linear")
    attach(model, **options).plant("0", 0, "mlp_gelu")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))
