"""Lattices on models that nobody wrote for them: grown, saved, folded, their code untouched."""

import copy
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import esper
from esper.seeds.blueprints import BLUEPRINTS, blueprint
from esper.surgery.attach import attach
from esper.surgery.lattice import lattice_of

BENCHMARKS = Path(__file__).parents[3] / "experiments/benchmarks"
WIDTH, WORDS, POSITIONS, BATCH = 16, 13, 10, 4
STEPS = 60


@dataclass(frozen=True)
class Case:
    """A host, what goes in, and where it grows.

    Attributes:
        build: Makes the host.
        inputs: Makes a batch of the given size.
        outputs: What the host gives for a batch, as one tensor.
        sites: Blueprint by pattern; with an arrow, or for `low_rank`, a span.
        options: Options of attach for chunk sites.
        merged: What a fold must have merged: path of a weight, and its shape then.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], torch.Tensor]
    outputs: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    sites: dict[str, str]
    options: dict[str, Any]
    merged: dict[str, tuple[int, ...]]


def tokens(batch):
    return torch.randint(WORDS, (batch, POSITIONS), generator=torch.Generator().manual_seed(2))


def make_mlp():
    return nn.Sequential(
        nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8), nn.GELU(),
        nn.Linear(8, 3),
    )  # fmt: skip


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.down = None
        if stride > 1:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    """Source: He et al., "Deep residual learning for image recognition", 2016, but smaller."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layers = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, WIDTH, 2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        y = self.layers(F.relu(self.stem(x)))
        return self.head(y.mean((-2, -1)))


def make_gpt():
    spec = importlib.util.spec_from_file_location("gpt_host", BENCHMARKS / "gpt.py")
    module = importlib.util.module_from_spec(spec)
    # a dataclass looks its module up
    sys.modules["gpt_host"] = module
    spec.loader.exec_module(module)
    return module.GPT(module.Size(2, WIDTH, 2, WORDS, POSITIONS, BATCH))


def gpt_outputs(model, x):
    """Logits; the model itself gives the loss."""
    found = []
    hook = model.head.register_forward_hook(lambda module, args, output: found.append(output))
    model(x, x)
    hook.remove()
    return found[0]


def transformers():
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    return found


SMALL = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": WORDS,
    "max_position_embeddings": POSITIONS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def make_gpt2(activation="gelu_new"):
    hf = transformers()
    return hf.GPT2LMHeadModel(hf.GPT2Config(**SMALL, activation_function=activation))


def make_llama():
    hf = transformers()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, intermediate_size=24))


def make_bert():
    hf = transformers()
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, intermediate_size=24))


def make_t5():
    hf = transformers()
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **ids, vocab_size=WORDS))


def t5_outputs(model, x):
    return model(input_ids=x, decoder_input_ids=x).logits


def logits(model, x):
    return model(x).logits


def plain(model, x):
    return model(x)


CHUNK, BERT = {"channels": WIDTH}, "bert.encoder.layer.*"
T5 = "encoder.block.*.layer.1.DenseReluDense"
CASES = {
    "mlp": Case(
        make_mlp,
        lambda batch: torch.randn(batch, 6, generator=torch.Generator().manual_seed(2)),
        plain,
        {"0": "mlp_relu", "3->5": "mlp_gelu", "3": "low_rank"},
        {},
        {"3": (10, WIDTH), "5": (3, 10)},
    ),
    "resnet": Case(
        ResNet,
        lambda batch: torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(2)),
        plain,
        {"layers.*.bn2": "mlp_relu", "layers.*.conv2": "low_rank", "head": "low_rank"},
        {},
        {"layers.1.conv2": (WIDTH, WIDTH, 3, 3), "head": (5, WIDTH)},
    ),
    "gpt": Case(
        make_gpt,
        tokens,
        gpt_outputs,
        {
            "blocks.*": "mlp_relu",
            "blocks.*.mlp.fc1->blocks.*.mlp.fc2": "mlp_gelu",
            "blocks.*.attention.qkv": "low_rank",
        },
        CHUNK,
        {"blocks.0.site.mlp.fc1": (4 * WIDTH + 2, WIDTH)},
    ),
    "gpt2": Case(
        make_gpt2,
        tokens,
        logits,
        {
            "transformer.h.*": "glu",
            "transformer.h.*.mlp.c_fc->transformer.h.*.mlp.c_proj": "gelu_new",
            "transformer.h.*.attn.c_attn": "low_rank",
        },
        CHUNK,
        {
            "transformer.h.0.mlp.c_fc": (WIDTH, 4 * WIDTH + 2),
            "transformer.h.1.mlp.c_proj": (4 * WIDTH + 2, WIDTH),
            "transformer.h.1.attn.c_attn": (WIDTH, 3 * WIDTH),
        },
    ),
    "llama": Case(
        make_llama,
        tokens,
        logits,
        {
            "model.layers.*": "mlp_silu",
            "model.layers.*.mlp.gate_proj->model.layers.*.mlp.down_proj": "mlp_silu",
            "model.layers.*.self_attn.q_proj": "low_rank",
        },
        CHUNK,
        # its hidden units are products, so that new ones lie beside them
        {"model.layers.0.mlp.site.gate_proj": (24, WIDTH)},
    ),
    "bert": Case(
        make_bert,
        tokens,
        logits,
        {
            BERT: "scale_shift",
            f"{BERT}.intermediate.dense->{BERT}.output.dense": "mlp_gelu",
            f"{BERT}.attention.self.query": "low_rank",
        },
        CHUNK,
        {"bert.encoder.layer.0.intermediate.dense": (26, WIDTH)},
    ),
    "t5": Case(
        make_t5,
        tokens,
        t5_outputs,
        {
            f"{T5}.wi->{T5}.wo": "mlp_relu",
            # which the host asks for the dtype of its weight
            f"{T5}.wo": "mlp_gelu",
            "decoder.block.*.layer.1.EncDecAttention.q": "low_rank",
        },
        CHUNK,
        {"encoder.block.0.layer.1.DenseReluDense.wi": (26, WIDTH)},
    ),
}


@pytest.fixture
def registered(monkeypatch):
    """The activation of GPT-2 as a blueprint, forgotten after the test."""
    monkeypatch.setattr(BLUEPRINTS, "_items", dict(BLUEPRINTS._items))
    blueprint("gelu_new")(lambda z: F.gelu(z, approximate="tanh"))


def make(case):
    torch.manual_seed(0)
    return CASES[case].build()


def grow_on(model, case):
    """Attaches at all of a case's sites."""
    for sites, name in CASES[case].sites.items():
        span = name == "low_rank" or "->" in sites
        options = {"geometry": "span"} if span else CASES[case].options
        lattice = attach(model, sites, 4, **options, growth=esper.GrowthConfig(ramp_steps=5))
    return lattice


def passes(model, case, x):
    """Everything that some passes leave: outputs, gradients, buffers."""
    torch.manual_seed(1)
    found = []
    for training in (True, True, False):
        model.train(training)
        model.zero_grad()
        y = CASES[case].outputs(model, x)
        y.square().mean().backward()
        found += [y.detach()]
        found += [p.grad for n, p in model.named_parameters() if "kasmina" not in n]
        found += [b.clone() for n, b in model.named_buffers() if "kasmina" not in n]
    return found


@pytest.mark.parametrize("case", CASES)
def test_attaching_changes_nothing_bit_for_bit(case, registered):
    model, x = make(case), CASES[case].inputs(BATCH)
    twin = copy.deepcopy(model)
    lattice = grow_on(model, case)
    pairs = zip(passes(model, case, x), passes(twin, case, x), strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    lattice.detach()
    assert str(model) == str(twin)


def grown(case, *, steps=STEPS):
    """A host whose seeds alone have learned, and the losses before and after."""
    model, x = make(case), CASES[case].inputs(BATCH)
    lattice = grow_on(model, case)
    for parameter in lattice.host_parameters():
        parameter.requires_grad_(False)
    y = CASES[case].outputs(model.eval(), x)
    wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(lattice.parameters(), lr=0.01)

    def loss():
        return F.mse_loss(CASES[case].outputs(model, x), wanted)

    def learn(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    awake = [(site, seed) for site in lattice.attached for seed in (0, 2)]
    blueprints = dict(zip(lattice.attached, names_of_sites(lattice, case), strict=True))
    model.train()
    lattice.apply([esper.Germinate(site, seed, blueprints[site]) for site, seed in awake])
    lattice.apply([esper.Promote(site, seed) for site, seed in awake])
    learn(2)
    model.eval()
    before = loss().item()
    model.train()
    lattice.apply([esper.Advance(site, seed) for site, seed in awake])
    learn(steps)
    model.eval()
    return lattice, optimizer, (before, loss().item())


def names_of_sites(lattice, case):
    """The blueprint of each site, in the lattice's order."""
    for sites, name in CASES[case].sites.items():
        pattern = sites if name != "low_rank" or "->" in sites else f"{sites}->{sites}"
        matching = re.escape(pattern).replace(r"\*", r"\d")
        yield from (name for site in lattice.attached if re.fullmatch(matching, site))


@pytest.mark.parametrize("case", CASES)
def test_seeds_learn_and_a_fold_computes_the_same_without_esper(case, registered):
    lattice, _, (before, after) = grown(case)
    assert after < 0.97 * before
    model, x = lattice.model, CASES[case].inputs(BATCH)
    merged = CASES[case].merged
    y = CASES[case].outputs(model, x)
    host = sum(p.numel() for p in lattice.host_parameters())
    folded = lattice.fold()
    assert folded is model
    torch.testing.assert_close(CASES[case].outputs(folded, x), y, rtol=1e-5, atol=1e-5)
    weights = dict(folded.named_parameters())
    assert {path: tuple(weights[f"{path}.weight"].shape) for path in merged} == merged
    assert sum(p.numel() for p in folded.parameters()) > host
    assert lattice_of(folded) is None
    assert not any(type(m).__module__.startswith("esper") for m in folded.modules())
    # the dropouts of the host still work
    folded.train()
    CASES[case].outputs(folded, x).square().mean().backward()


@pytest.mark.parametrize("case", CASES)
def test_a_grown_model_goes_on_from_its_file_bit_for_bit(case, registered, tmp_path):
    lattice, optimizer, _ = grown(case, steps=4)
    model, x = lattice.model, CASES[case].inputs(BATCH)
    esper.save(tmp_path / "saved", model, lattice, optimizer=optimizer)
    other = make(case).eval()
    loaded = esper.load(tmp_path / "saved", other)
    # without gradients: torch multiplies in another order for parameters that need one
    with torch.no_grad():
        y = CASES[case].outputs(model, x)
        assert torch.equal(CASES[case].outputs(other, x), y)
    assert list(loaded.attached) == list(lattice.attached)
    torch.testing.assert_close(CASES[case].outputs(loaded.fold(), x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_generation_with_a_cache_is_the_same_with_a_lattice_and_folded(case, registered):
    lattice, _, _ = grown(case)
    model, start = lattice.model, CASES[case].inputs(2)[:, :3]

    def generate():
        with torch.inference_mode():
            return model.generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=POSITIONS - 3,
                do_sample=False, use_cache=True, min_new_tokens=POSITIONS - 3,
            )  # fmt: skip

    texts = generate()
    lattice.fold()
    assert texts.shape == (2, POSITIONS)
    assert torch.equal(generate(), texts)


def test_units_of_another_activation_than_gpt2s_become_a_block(registered):
    model, x = make("gpt2").eval(), tokens(BATCH)
    lattice = attach(model, "transformer.h.*.mlp.c_fc->transformer.h.*.mlp.c_proj", 4,
                     geometry="span")  # fmt: skip
    for site in lattice.attached:
        lattice.plant(site, 0, "mlp_gelu")
    y = model(x).logits
    folded = lattice.fold()
    torch.testing.assert_close(folded(x).logits, y)
    assert type(folded.transformer.h[0].mlp).__name__ == "FoldedSite"
