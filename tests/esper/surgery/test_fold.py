"""A folded model computes what it computed with its lattice, and nothing of Esper is left in it."""

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from esper.seeds.actions import Germinate, Promote
from esper.seeds.blueprints import BLUEPRINTS, blueprint
from esper.surgery.attach import attach
from esper.surgery.fold import FoldError
from esper.surgery.lattice import lattice_of

CHUNK_BLUEPRINTS = ["noop", "scale_shift", "low_rank", "mlp_relu", "mlp_gelu", "mlp_silu", "glu"]
OWN_ACTIVATION = {nn.ReLU: "mlp_relu", nn.GELU: "mlp_gelu", nn.SiLU: "mlp_silu"}
# computed in fp32 whatever the host is: alpha alone, so fp64 agrees to its own rounding
TOLERANCE = {torch.float32: {}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


def mlp(activation=nn.ReLU, *, bias=True):
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(6, 8, bias=bias),
            act=activation(),
            fc2=nn.Linear(8, 12, bias=bias),
            act2=activation(),
            out=nn.Linear(12, 3, bias=bias),
        )
    )


class Net(nn.Module):
    """A convolution whose output is viewed, and a site that takes two inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.out = nn.Conv2d(3, 8, 3), Mix(), nn.Linear(72, 3)

    def forward(self, x):
        y = self.conv(x)
        return self.out(self.mix(y.view(len(y), -1), scale=2.0))


class Mix(nn.Module):
    def forward(self, x, shift=None, scale=1.0):
        return x * scale if shift is None else x + shift


def grow(lattice, site, blueprints, *, dtype=torch.float32):
    """Plants one seed of each blueprint, half-blended, with weights of a size that shows."""
    layer = lattice.layer(site)
    generator = torch.Generator().manual_seed(3)
    for seed, name in enumerate(blueprints):
        lattice.plant(site, seed, name)
    with torch.no_grad():
        for pool in layer.pool():
            if pool is not layer.bias or layer.biased:
                pool.copy_(torch.randn(pool.shape, generator=generator, dtype=torch.float64))
        layer.alpha[: len(blueprints)] *= torch.linspace(0.3, 1, len(blueprints))


def require_plain(model):
    foreign = {
        type(m) for m in model.modules() if type(m).__module__.partition(".")[0].startswith("esper")
    }
    assert not foreign
    assert lattice_of(model) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("kasmina" in name for name in model.state_dict())
    assert b"esper" not in pickle.dumps(model).replace(b"tests.esper.", b"")


def check_fold(lattice, x, *, dtype=torch.float32):
    """Folds and compares; returns the folded model and by how many parameters it grew."""
    model = lattice.model
    host = sum(p.numel() for p in lattice.host_parameters())
    before = model(x)
    folded = lattice.fold()
    assert folded is model
    torch.testing.assert_close(folded(x), before, **TOLERANCE[dtype])
    require_plain(folded)
    return folded, sum(p.numel() for p in folded.parameters()) - host


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CHUNK_BLUEPRINTS)
def test_chunk_seeds_of_every_blueprint(name, dtype):
    torch.manual_seed(0)
    model = mlp().to(dtype)
    lattice = attach(model, "fc1", 4)
    grow(lattice, "fc1", [name] * 3)
    x = torch.randn(5, 6, dtype=dtype)
    assert name == "noop" or not torch.allclose(model(x), host_output(lattice, x))
    _, extra = check_fold(lattice, x, dtype=dtype)
    # dense layers over all 8 channels; 2 hidden units a seed, 1 of low rank
    dense = {1: 3 * (8 + 1 + 8), 2: 3 * (2 * (8 + 1) + 2 * 8)}
    sizes = {"noop": 0, "scale_shift": 16, "low_rank": dense[1], "glu": 3 * (2 * 9 + 8)}
    assert extra == sizes.get(name, dense[2])


def host_output(lattice, x):
    host = copy.deepcopy(lattice.model)
    return lattice_of(host).detach()(x)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CHUNK_BLUEPRINTS)
def test_chunk_seeds_on_another_axis_than_the_last(name, dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    lattice = attach(model, "conv", 4)
    grow(lattice, "conv", [name] * 3)
    check_fold(lattice, torch.randn(2, 3, 5, 5, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_all_blueprints_on_one_site(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 28), nn.Tanh(), nn.Linear(28, 3)).to(dtype)
    lattice = attach(model, "0", 7)
    grow(lattice, "0", CHUNK_BLUEPRINTS)
    check_fold(lattice, torch.randn(4, 9, 6, dtype=dtype), dtype=dtype)


def test_a_folded_site_keeps_the_signature_of_the_site():
    torch.manual_seed(0)
    model = Net()
    lattice = attach(model, "mix", 8, channels=72)
    grow(lattice, "mix", ["mlp_relu", "scale_shift"])
    folded, _ = check_fold(lattice, torch.randn(2, 3, 5, 5))
    x, shift = torch.randn(2, 72), torch.randn(72)
    torch.testing.assert_close(folded.mix(x, shift=shift), folded.mix(x + shift, None, scale=1.0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("bias", "biased"), [(True, None), (False, None), (False, True)])
def test_rank_one_seeds_go_into_the_weight(dtype, bias, biased):
    torch.manual_seed(0)
    model = mlp(bias=bias).to(dtype)
    lattice = attach(model, "fc2", 5, geometry="span", biased=biased)
    grow(lattice, "fc2->fc2", ["low_rank"] * 3 + ["noop"])
    kinds = [type(m) for m in nn.Sequential(*mlp()).modules()]
    folded, extra = check_fold(lattice, torch.randn(5, 6, dtype=dtype), dtype=dtype)
    # the map gets the bias that it lacked
    assert extra == (folded.fc2.out_features if biased else 0)
    assert [type(m) for m in folded.modules()] == kinds


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", OWN_ACTIVATION)
def test_seeds_of_the_hosts_own_activation_widen_it(activation, bias, dtype):
    torch.manual_seed(0)
    model = mlp(activation, bias=bias).to(dtype)
    lattice = attach(model, "fc1->fc2", 5, geometry="span")
    name = OWN_ACTIVATION[activation]
    grow(lattice, "fc1->fc2", [name, "noop", name])
    folded, extra = check_fold(lattice, torch.randn(5, 6, dtype=dtype), dtype=dtype)
    assert extra == 2 * (6 + 12) + (2 if bias else 0)
    assert (folded.fc1.out_features, folded.fc2.in_features) == (10, 10)
    assert folded.fc1.weight.shape == (10, 6)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_neighbouring_spans_and_single_ones_together(dtype, order):
    torch.manual_seed(0)
    model = mlp(nn.GELU).to(dtype)
    spans = {"fc1->fc2": "mlp_gelu", "fc2->out": "mlp_gelu", "fc2": "low_rank", "out": "low_rank"}
    for sites in list(spans)[::order]:
        lattice = attach(model, sites, 4, geometry="span")
    for sites, name in spans.items():
        grow(lattice, sites if "->" in sites else f"{sites}->{sites}", [name] * 3)
    folded, _ = check_fold(lattice, torch.randn(5, 6, dtype=dtype), dtype=dtype)
    assert [folded.fc2.out_features, folded.out.in_features] == [15, 15]


def test_chunks_at_the_end_of_a_span_read_its_result():
    torch.manual_seed(0)
    model = mlp()
    attach(model, "fc1->fc2", 4, geometry="span")
    lattice = attach(model, "fc2", 4)
    grow(lattice, "fc1->fc2", ["mlp_relu"] * 2)
    grow(lattice, "fc2", ["mlp_gelu"] * 2)
    check_fold(lattice, torch.randn(5, 6))


@pytest.mark.parametrize("order", [1, -1])
def test_chunk_sites_inside_one_another(order):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3))
    for sites in ["0", "0.0", "0.1"][::order]:
        lattice = attach(model, sites, 4, channels=8)
    for sites in ("0", "0.0", "0.1"):
        grow(lattice, sites, ["mlp_gelu", "glu"])
    check_fold(lattice, torch.randn(5, 6))


def test_a_site_that_the_model_has_in_two_places():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(6, 8), shared, nn.Tanh(), shared)
    lattice = attach(model, "1", 4)
    grow(lattice, "1", ["mlp_gelu", "glu"])
    folded, _ = check_fold(lattice, torch.randn(5, 6))
    assert folded[1] is folded[3]


def test_a_host_in_bfloat16_stays_so():
    torch.manual_seed(0)
    model = mlp().bfloat16()
    attach(model, "fc1->fc2", 4, geometry="span")
    lattice = attach(model, "out", 3)
    attach(model, "act2", 3, channels=12)
    grow(lattice, "fc1->fc2", ["mlp_relu"])
    grow(lattice, "out", ["mlp_relu", "scale_shift"])
    grow(lattice, "act2", ["glu"])
    x = torch.randn(5, 6).bfloat16()
    before = model(x)
    folded = lattice.fold()
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(folded(x), before, rtol=0.1, atol=0.1)


def test_frozen_modules_stay_frozen_and_modes_stay():
    model = mlp(bias=False).requires_grad_(False).eval()
    attach(model, "fc1->fc2", 4, geometry="span")
    attach(model, "out", 2, geometry="span")
    lattice = attach(model, "act2", 3, channels=12)
    grow(lattice, "fc1->fc2", ["mlp_relu"])
    grow(lattice, "out->out", ["low_rank"])
    grow(lattice, "act2", ["mlp_relu"])
    folded = lattice.fold()
    trainable = {n for n, p in folded.named_parameters() if p.requires_grad}
    assert trainable
    assert all(n.startswith("act2.") for n in trainable)
    assert not any(m.training for m in folded.modules())


def test_seeds_that_are_not_grafted_are_left_out():
    torch.manual_seed(0)
    model = mlp()
    host, x = copy.deepcopy(model), torch.randn(5, 6)
    lattice = attach(model, "fc*", 4)
    attach(model, "fc1->fc2", 4, geometry="span")
    lattice.apply([Germinate("fc1", 0, "mlp_relu"), Germinate("fc2", 0, "low_rank")])
    lattice.apply([Promote("fc1", 0)])
    # nothing to add: no block for it, and no complaint about where it sits
    lattice.plant("fc1", 1, "noop")
    lattice.plant("fc1->fc2", 1, "noop")
    folded = lattice.fold()
    assert folded is model
    assert str(folded) == str(host)
    assert list(folded.state_dict()) == list(host.state_dict())
    assert torch.equal(folded(x), host(x))
    require_plain(folded)


@pytest.fixture
def registered(monkeypatch):
    """Blueprints of a user, forgotten after the test."""
    monkeypatch.setattr(BLUEPRINTS, "_items", dict(BLUEPRINTS._items))
    blueprint("sine", hidden_frac=0.5)(torch.sin)
    blueprint("quick_gelu")(quick_gelu)
    blueprint("leaky")(lambda z: F.leaky_relu(z, 0.2) + torch.where(z > 0, z, -z))
    blueprint("softmax", chunk_only=True)(lambda z: z.softmax(-1))
    blueprint("branching")(lambda z: z if z.mean() > 0 else z.square())


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["sine", "leaky", "softmax"])
def test_a_users_own_blueprint(name, dtype):
    torch.manual_seed(0)
    model = mlp().to(dtype)
    lattice = attach(model, "fc1", 2)
    grow(lattice, "fc1", [name] * 2)
    folded, _ = check_fold(lattice, torch.randn(5, 6, dtype=dtype), dtype=dtype)
    x = torch.randn(5, 6, dtype=dtype)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), folded(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x)[0]


class AnyArguments(nn.Linear):
    def forward(self, *args):
        return super().forward(*args)


class AnyParts(nn.Sequential):
    def forward(self, *args):
        return super().forward(*args)


class Pair(nn.Module):
    """Gives its module's output and something beside it."""

    def __init__(self):
        super().__init__()
        self.inner = Twofold()

    def forward(self, x):
        return self.inner(x)[0]


class Twofold(nn.Module):
    def forward(self, x):
        return x, x.sum()


class Half(nn.Sequential):
    def forward(self, x):
        return super().forward(x) / 2


def twice():
    fc = nn.Linear(8, 8)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), fc, nn.ReLU(), fc)


class Inner(nn.Module):
    """A host of one block."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.block = Block(forward, **parts)

    def forward(self, x):
        return self.block(x)


class Block(nn.Module):
    """Two linear layers, and what happens with them by the name of a case."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.forward_name = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x, gate=None):
        return FORWARDS[self.forward_name](self, x, gate)


def gated(block, x, gate):
    h = F.relu(block.fc1(x))
    return block.fc2(h if gate is None else h * gate) + x


def dead_end(block, x, gate):
    h = block.fc1(x)
    torch.relu_(h)
    return block.fc2(h) + x


FORWARDS = {
    "functional": lambda b, x, _: b.fc2(F.relu(b.fc1(x))),
    "in_place": lambda b, x, _: b.fc2(torch.relu_(b.fc1(x))),
    "method": lambda b, x, _: b.fc2(b.fc1(x).relu()),
    "formula": lambda b, x, _: b.fc2((h := b.fc1(x)) * h.sigmoid()),
    "nothing": lambda b, x, _: b.fc2(b.fc1(x)),
    "own_module": lambda b, x, _: b.fc2(b.act(b.fc1(x))),
    "norm_and_residual": lambda b, x, _: x + b.fc2(F.gelu(b.fc1(b.norm(x)))),
    "dropout": lambda b, x, _: F.dropout(b.fc2(b.drop(F.gelu(b.fc1(x)))), 0.5, training=b.training),
    "other_arguments": lambda b, x, gate: b.fc2(F.gelu(b.fc1(x))) * (2.0 if gate is None else gate),
    "other_shape": lambda b, x, _: b.fc2(F.relu(b.fc1(x).transpose(0, 1)).transpose(0, 1)),
    # what follows is no widening by ReLU units, nor the whole of the block
    "clamped": lambda b, x, _: x + b.fc2(F.relu(b.fc1(x).clamp(min=-1, max=1))),
    "gated": gated,
    "dead_end": dead_end,
    "hidden_used": lambda b, x, _: b.fc2(h := F.relu(b.fc1(x))) + h.mean(),
    "weights_read": lambda b, x, _: b.fc2(F.relu(b.fc1(x))) @ b.fc1.weight.T,
    "not_called": lambda b, x, _: b.fc2(F.relu(F.linear(x, b.fc1.weight))),
    "mixing": lambda b, x, _: b.fc2(b.fc1(x).cumsum(-1).relu()) + x,
    "fixed_width": lambda b, x, _: b.fc2(b.fc1(x).unflatten(-1, (4, 2)).relu().flatten(-2)) + x,
    "slopes": lambda b, x, _: b.fc2(b.act(b.fc1(x))) + x,
    "branching": lambda b, x, _: b.fc2(F.relu(b.fc1(x))) if x.sum() > 0 else x,
}
SPAN = {"geometry": "span"}
BLOCK = ("block.fc1->block.fc2", SPAN, "mlp_relu")
IMPOSSIBLE = {
    "other_activation": (
        mlp,
        *("fc1->fc2", SPAN, "mlp_gelu"),
        "own function .* they are mlp_gelu, and: the host computes something else",
    ),
    "tanh_gelu": (
        lambda: mlp(lambda: nn.GELU("tanh")),
        *("fc1->fc2", SPAN, "mlp_gelu"),
        "the host computes something else",
    ),
    "two_layers": (
        mlp,
        *("fc1->out", SPAN, "mlp_relu"),
        "between its ends has parameters.*'the model', which .* model itself cannot be replaced",
    ),
    **{
        f"forward_{name}": (partial(Inner, name), *BLOCK, match)
        for name, match in {
            "clamped": "something else.*block beside 'block'.*is not what is returned",
            "gated": "other values enter",
            "dead_end": "hidden activations are also used elsewhere",
            "hidden_used": "hidden activations are also used elsewhere",
            "weights_read": "weights at an end of the span are read",
            "not_called": "an end of the span is called 0 times",
            "mixing": "something else",
            "fixed_width": "'unflatten' cannot work on a wider input",
            "branching": "torch.fx cannot trace it",
        }.items()
    },
    "slopes": (
        lambda: Inner("slopes", act=nn.PReLU(init=0.0)),
        *BLOCK,
        "between its ends has parameters",
    ),
    "twice": (twice, "0->2", SPAN, "mlp_relu", "an end of the span is called 2 times"),
    "attention": (Attention, "mha", {}, "mlp_relu", "on or in a MultiheadAttention"),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8),
        *("linear1", {}, "mlp_relu"),
        "on or in a TransformerEncoderLayer",
    ),
    "tuple": (Pair, "inner", {"channels": 6}, "mlp_relu", "'inner' must give one tensor"),
    "container": (
        lambda: nn.Sequential(AnyParts(nn.Linear(6, 8))),
        *("0", {"channels": 8}, "mlp_relu"),
        "'0' must take a fixed number of arguments",
    ),
    "branching": (mlp, "fc1", {}, "branching", "traceable by torch.fx"),
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_folded_is_refused_and_nothing_changed(case):
    build, sites, options, name, match = IMPOSSIBLE[case]
    torch.manual_seed(0)
    model = build()
    lattice = attach(model, sites, 2, **options)
    # a good site beside it, which must not be folded either
    site = next(iter(lattice.attached))
    grow(lattice, site, [name])
    require_refused(lattice, match)


def require_refused(lattice, match):
    model = lattice.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    text, sites = str(model), dict(lattice.attached)
    with pytest.raises(FoldError, match=match):
        lattice.fold()
    assert str(model) == text
    assert lattice_of(model) is lattice
    assert lattice.attached == sites
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(v, before[k]) or "graft_loss" in k for k, v in after.items())
    assert sum(len(m._forward_hooks) for m in model.modules()) >= len(sites)


@pytest.mark.parametrize("inside", ["fc1", "act"])
def test_chunks_inside_a_span_are_refused(inside):
    model = mlp()
    attach(model, "fc1->fc2", 4, geometry="span")
    lattice = attach(model, inside, 4, channels=8)
    grow(lattice, "fc1->fc2", ["mlp_relu"])
    grow(lattice, inside, ["mlp_relu"])
    require_refused(lattice, rf"'{inside}' and 'fc1->fc2' must not share")


def test_a_chunk_site_on_an_activation_that_a_span_uses_too_is_refused():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 3))
    attach(model, "2->4", 4, geometry="span")
    lattice = attach(model, "1", 4, channels=8)
    grow(lattice, "2->4", ["mlp_relu"])
    grow(lattice, "1", ["mlp_relu"])
    require_refused(lattice, "must not share")


def test_what_stands_twice_between_the_ends_of_a_span_is_seen():
    act = nn.ReLU()
    model = nn.Sequential(act, nn.Linear(6, 8), nn.Identity(), act, nn.Linear(8, 3))
    lattice = attach(model, "1->4", 4, geometry="span")
    grow(lattice, "1->4", ["low_rank"])
    require_refused(lattice, "they are low_rank, and: the host computes something else")
    lattice.detach()
    lattice = attach(model, "1->4", 4, geometry="span")
    grow(lattice, "1->4", ["mlp_relu"])
    check_fold(lattice, torch.randn(5, 6))


def test_chunks_that_do_not_see_a_spans_result_are_refused():
    model = mlp()
    lattice = attach(model, "fc2", 4)
    attach(model, "fc1->fc2", 4, geometry="span")
    grow(lattice, "fc2", ["mlp_relu"])
    grow(lattice, "fc1->fc2", ["mlp_relu"])
    require_refused(lattice, "unless the chunk site was attached last")


def test_one_impossible_site_leaves_the_others_unfolded():
    model = mlp()
    lattice = attach(model, "fc1", 4)
    attach(model, "fc2->out", 4, geometry="span")
    grow(lattice, "fc1", ["mlp_relu"])
    grow(lattice, "fc2->out", ["mlp_gelu"])
    require_refused(lattice, "own function")


@pytest.mark.parametrize("chunk_first", [True, False])
def test_chunks_at_the_end_of_a_span_with_a_block_beside_it(chunk_first):
    torch.manual_seed(0)
    model = Inner("formula")
    if chunk_first:
        attach(model, "block.fc2", 3)
    lattice = attach(model, "block.fc1->block.fc2", 4, geometry="span")
    attach(model, "block", 3, channels=6)
    if not chunk_first:
        attach(model, "block.fc2", 3)
    for site in lattice.attached:
        grow(lattice, site, ["mlp_gelu"])
    if chunk_first:
        check_fold(lattice, torch.randn(5, 6))
    else:
        require_refused(lattice, "unless the chunk site was attached first")


def quick_gelu(z):
    return z * torch.sigmoid(1.702 * z)


class QuickGELU(nn.Module):
    def forward(self, z):
        return z * torch.sigmoid(1.702 * z)


OWN_FORWARD = {
    **dict.fromkeys(("functional", "in_place", "method", "other_shape"), ({}, "mlp_relu")),
    "formula": ({}, "mlp_silu"),
    "nothing": ({}, "low_rank"),
    "own_module": ({"act": QuickGELU()}, "quick_gelu"),
    "norm_and_residual": ({"norm": nn.LayerNorm(6)}, "mlp_gelu"),
    "dropout": ({"drop": nn.Dropout(0.5)}, "mlp_gelu"),
    "other_arguments": ({}, "mlp_gelu"),
}


@pytest.mark.parametrize("case", OWN_FORWARD)
def test_a_block_with_a_forward_of_its_own_is_widened(case, registered):
    torch.manual_seed(0)
    parts, name = OWN_FORWARD[case]
    model = Inner(case, **parts).eval()
    text = str(model)
    lattice = attach(model, "block.fc1->block.fc2", 5, geometry="span")
    grow(lattice, "block.fc1->block.fc2", [name] * 2)
    folded, extra = check_fold(lattice, torch.randn(5, 3, 6))
    assert extra == 2 * (6 + 1 + 6)
    assert str(folded) == text.replace("=8", "=10")


class NestedBlock(nn.Module):
    """The ends of the span are in two parts of the block, as in BERT."""

    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(nn.Linear(6, 8), nn.GELU())
        self.down = Down()

    def forward(self, x, **kwargs):
        return self.down(self.up(x), x, **kwargs)


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, h, x):
        return self.norm(self.dense(h) + x)


def nested():
    return nn.Sequential(NestedBlock(), NestedBlock())


def test_a_span_whose_ends_lie_in_two_parts_of_one_module():
    torch.manual_seed(0)
    model = nested()
    lattice = attach(model, "*.up.0->*.down.dense", 4, geometry="span")
    assert list(lattice.attached) == ["0.up.0->0.down.dense", "1.up.0->1.down.dense"]
    # a chunk site behind the span, on a part that holds its end
    attach(model, "1.down", 3, channels=6)
    for site in lattice.attached:
        grow(lattice, site, ["mlp_gelu"] * 2)
    folded, _ = check_fold(lattice, torch.randn(5, 6))
    assert folded[0].up[0].out_features == 10


def test_chunks_on_a_part_that_holds_the_begin_of_a_span_are_refused():
    model = nested()
    attach(model, "0.up.0->0.down.dense", 4, geometry="span")
    lattice = attach(model, "0.up", 4, channels=8)
    for site in lattice.attached:
        grow(lattice, site, ["mlp_gelu"])
    require_refused(lattice, "'0.up' and '0.up.0->0.down.dense' must not share")


def test_an_encoder_layer_of_torch_is_widened():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)).eval()
    lattice = attach(model, "0.linear1->0.linear2", 5, geometry="span")
    grow(lattice, "0.linear1->0.linear2", ["mlp_relu"] * 2)
    x = torch.randn(3, 4, 6)
    before = model(x)
    folded, _ = check_fold(lattice, x)
    assert folded[0].linear1.out_features == 10
    with torch.inference_mode():
        # torch's fused kernel for the whole layer
        torch.testing.assert_close(folded(x), before)


def convolutions(padding_mode="zeros"):
    options = {"padding_mode": padding_mode}
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, **options),
        nn.ReLU(),
        nn.Conv2d(8, 5, (3, 5), padding=(2, 2), dilation=(2, 1), bias=False, **options),
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_convolutions_are_updated_and_widened_at_their_middle_tap(padding_mode, dtype):
    torch.manual_seed(0)
    model = convolutions(padding_mode).to(dtype)
    attach(model, "0->2", 4, geometry="span")
    attach(model, "2", 4, geometry="span")
    lattice = attach(model, "0", 4, geometry="span")
    grow(lattice, "0->2", ["mlp_relu"] * 2)
    grow(lattice, "2->2", ["low_rank"] * 2)
    grow(lattice, "0->0", ["low_rank"] * 2)
    folded, _ = check_fold(lattice, torch.randn(2, 3, 9, 9, dtype=dtype), dtype=dtype)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert (folded[0].out_channels, folded[2].in_channels) == (10, 10)


class Gated(nn.Module):
    """As in Llama: its hidden units are products."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, *, scale=1.0):
        return self.drop(self.down(F.silu(self.gate(x)) * self.up(x) * scale))


@pytest.mark.parametrize("sites", ["0.gate->0.down", "0.up->0.down"])
def test_units_that_the_host_does_not_have_become_a_block_beside_it(sites):
    torch.manual_seed(0)
    model = nn.Sequential(Gated(), nn.Linear(6, 3)).eval()
    lattice = attach(model, sites, 4, geometry="span")
    attach(model, "0", 3, channels=6)
    grow(lattice, sites, ["mlp_silu", "low_rank", "mlp_silu"])
    grow(lattice, "0", ["mlp_gelu"])
    x = torch.randn(5, 6)
    folded, extra = check_fold(lattice, x)
    assert extra == 3 * (6 + 1 + 6) + 2 * (6 + 1 + 6)
    whole = folded[0](x, scale=3.0) - folded[0](x, scale=1.0)
    assert whole.abs().max() > 0.1


def test_units_of_several_kinds_are_merged_where_they_can_be(registered):
    torch.manual_seed(0)
    model = Inner("functional")
    attach(model, "block.fc1->block.fc2", 5, geometry="span")
    lattice = attach(model, "block.fc1", 5, geometry="span")
    grow(lattice, "block.fc1->block.fc2", ["mlp_relu", "sine", "mlp_relu", "low_rank"])
    grow(lattice, "block.fc1->block.fc1", ["low_rank", "low_rank"])
    folded, extra = check_fold(lattice, torch.randn(5, 6))
    assert extra == 4 * (6 + 1 + 6)
    assert folded.block.site.fc1.out_features == 10


def test_a_block_at_a_module_that_is_widened_is_refused():
    model = mlp()
    attach(model, "fc1->fc2", 5, geometry="span")
    lattice = attach(model, "fc2", 5, geometry="span")
    grow(lattice, "fc1->fc2", ["mlp_relu"])
    grow(lattice, "fc2->fc2", ["mlp_gelu"])
    require_refused(lattice, "'fc2->fc2' and 'fc1->fc2' must not share")


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    model = nn.Sequential(nn.Linear(6, 8))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["low_rank", "mlp_relu", "mlp_silu"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(6, 8)),
        lambda: nn.Sequential(nn.LayerNorm(6)),
        lambda: nn.Sequential(Doubled(6, 8)),
        lambda: nn.Sequential(AnyArguments(6, 8)),
        tied,
        normed,
        hooked,
    ],
)
def test_units_beside_one_module_become_a_block_or_part_of_it(build, name, order):
    torch.manual_seed(0)
    model = build()
    width = model[0].weight.shape[0]
    for geometry in ["chunk", "span"][::order]:
        lattice = attach(model, "0", width // 2, geometry=geometry)
    grow(lattice, "0", ["mlp_gelu"])
    grow(lattice, "0->0", [name] * 2)
    x = torch.randn(5, 6)
    before = model(x)
    torch.testing.assert_close(lattice.fold()(x), before)


def test_a_site_that_takes_any_arguments_keeps_them():
    torch.manual_seed(0)
    model = nested()
    attach(model, "0", 3, channels=6)
    lattice = attach(model, "0.up", 4, channels=8)
    attach(model, "0.down.dense", 2, geometry="span")
    for site in lattice.attached:
        grow(lattice, site, ["low_rank"])
    x = torch.randn(5, 6)
    before = model(x)
    folded = lattice.fold()
    torch.testing.assert_close(folded(x), before)
    assert type(folded[0]) is NestedBlock
    with pytest.raises(TypeError, match="unknown"):
        folded[0](x, unknown=1)
    packed, before = pickle.dumps(folded), RemovableHandle.next_id
    try:
        # as in a new process, where hooks are counted from 0
        RemovableHandle.next_id = 0
        again = pickle.loads(packed)
        for _ in range(3):
            again[0].register_forward_hook(lambda *_: None)
    finally:
        RemovableHandle.next_id = before
    assert torch.equal(again(x), folded(x))
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))


class Reading(nn.Module):
    """Reads a weight of its last layer, as T5 does, and the parts of a container."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Sequential(nn.Tanh())

    def forward(self, x):
        h = F.relu(self.wi(x))
        if isinstance(self.wo.weight, torch.Tensor) and h.dtype != self.wo.weight.dtype:
            h = h.to(self.wo.weight.dtype)
        return self.head(self.wo(h)) * len(self.head[:1])


def test_a_module_whose_parts_the_host_reads_stays_what_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(Reading())
    attach(model, "0.wi->0.wo", 4, geometry="span")
    lattice = attach(model, "0.wo", 3)
    grow(lattice, "0.wi->0.wo", ["mlp_relu"] * 2)
    grow(lattice, "0.wo", ["mlp_gelu"])
    x = torch.randn(5, 6)
    before = model(x)
    folded = lattice.fold()
    torch.testing.assert_close(folded(x), before)
    assert type(folded[0].wo) is nn.Linear
    assert folded[0].wi.out_features == 10
    lattice = attach(model, "0.head", 3, channels=6)
    grow(lattice, "0.head", ["mlp_gelu"])
    with pytest.raises(FoldError, match=r"'0\.head' must .* have no parts that the host's code"):
        lattice.fold()


@pytest.mark.parametrize("inside", ["block.act", "block.act.1"])
def test_chunks_in_a_container_between_the_ends_of_a_span_are_refused(inside):
    model = Inner("own_module", act=nn.Sequential(nn.Identity(), nn.ReLU()))
    attach(model, "block.fc1->block.fc2", 4, geometry="span")
    lattice = attach(model, inside, 4, channels=8)
    grow(lattice, "block.fc1->block.fc2", ["mlp_relu"])
    grow(lattice, inside, ["mlp_relu"])
    require_refused(lattice, rf"'{inside}' and 'block.fc1->block.fc2' must not share")


class Inward(nn.Module):
    """Returns one tensor, and so does not the function inside it."""

    def forward(self, x):
        def both(x):
            return x, x

        return both(x)[0]


def test_only_what_a_forward_itself_returns_counts():
    torch.manual_seed(0)
    model = nn.Sequential(Inward())
    lattice = attach(model, "0", 3, channels=6)
    grow(lattice, "0", ["mlp_relu"])
    check_fold(lattice, torch.randn(5, 6))


def grown(kind):
    torch.manual_seed(0)
    if kind == "conv":
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
        lattice, x = attach(model, "0", 4), torch.randn(2, 3, 5, 5)
        grow(lattice, "0", ["mlp_gelu", "glu", "scale_shift", "low_rank"])
    elif kind == "mlp":
        model, x = mlp(), torch.randn(5, 6)
        attach(model, "fc1->fc2", 4, geometry="span")
        lattice = attach(model, "out", 3)
        grow(lattice, "fc1->fc2", ["mlp_relu"] * 2)
        grow(lattice, "out", ["mlp_silu", "glu"])
    else:
        # a block beside a span, and one behind a module that takes any arguments
        inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        model, x = nn.Sequential(inner, AveragedModel(nn.Linear(6, 3))), torch.randn(5, 6)
        attach(model, "0.0->0.2", 4, geometry="span")
        lattice = attach(model, "1", 3, channels=3)
        grow(lattice, "0.0->0.2", ["mlp_silu"] * 2)
        grow(lattice, "1", ["mlp_silu", "glu"])
    return lattice, x


@pytest.mark.parametrize("kind", ["conv", "mlp", "blocks"])
def test_a_folded_model_can_be_exported_copied_and_trained(kind):
    lattice, x = grown(kind)
    folded = lattice.fold()
    y = folded(x)
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), y)
    assert torch.equal(copy.deepcopy(folded)(x), y)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in folded.parameters())


LOADER = """
import sys

class NoEsper:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("esper", "esper_kernels"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, NoEsper())
import torch

try:
    import esper
except ImportError:
    for model, x, y in torch.load(sys.argv[1], weights_only=False):
        torch.testing.assert_close(model(x), y)
        torch.save(model, __import__("io").BytesIO())
    print("loaded without esper")
"""


def test_folded_models_load_where_there_is_no_esper(tmp_path):
    file = tmp_path / "folded.pt"
    content = []
    for kind in ("conv", "mlp", "blocks"):
        lattice, x = grown(kind)
        folded = lattice.fold()
        content.append((folded, x, folded(x).detach()))
    torch.save(content, file)
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(file)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "loaded without esper\n", done.stderr


def test_a_folded_model_round_trips_through_torch_save():
    lattice, x = grown("mlp")
    folded = lattice.fold()
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), folded(x))


def test_a_folded_model_can_grow_again():
    torch.manual_seed(0)
    lattice, x = grown("mlp")
    folded = lattice.fold()
    before = folded(x)
    again = attach(folded, "fc1->fc2", 3, geometry="span")
    attach(folded, "fc2", 4)
    assert torch.equal(folded(x), before)
    grow(again, "fc1->fc2", ["mlp_relu"])
    grow(again, "fc2", ["mlp_gelu"])
    check_fold(again, x)
