"""A folded model leaves PyTorch as any other does, and costs what a hand-written one costs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from esper.surgery.attach import attach

DYNAMIC = {0: torch.export.Dim.DYNAMIC}
SPAN = {"geometry": "span"}


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def blocks(width=8, hidden=12):
    return nn.Sequential(*(Block(width, hidden) for _ in range(2)), nn.Linear(width, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 3),
    )  # fmt: skip


def other_activation():
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)))


def any_arguments():
    return nn.Sequential(AveragedModel(nn.Linear(6, 8)), nn.Linear(8, 4))


# host, shape of one sample, and by pattern: options of attach, and blueprints
CASES = {
    "widened": (blocks, (5, 8), {"*.fc1->*.fc2": (SPAN, ["mlp_gelu"] * 2)}),
    "updated": (blocks, (5, 8), {"2": (SPAN, ["low_rank"] * 2)}),
    "chunks": (
        blocks,
        (5, 8),
        {"0": ({"channels": 8}, ["mlp_relu", "glu"]), "1.norm": ({}, ["low_rank"])},
    ),
    "convolutions": (
        convolutions,
        (3, 6, 6),
        {
            "0": ({}, ["mlp_silu", "scale_shift"]),
            "3": ({}, ["mlp_gelu"]),
            "2": ({}, ["low_rank"]),
        },
    ),
    "beside": (other_activation, (6,), {"0.0->0.2": (SPAN, ["mlp_relu"] * 2)}),
    "any_arguments": (
        any_arguments,
        (6,),
        {"0": ({"channels": 8}, ["mlp_relu"] * 2), "1": (SPAN, ["mlp_gelu"])},
    ),
}


def folded(case):
    """A folded model in evaluation mode, and a batch for it of the given size."""
    build, shape, sites = CASES[case]
    torch.manual_seed(0)
    model = build().eval()
    planned = {}
    for pattern, (options, names) in sites.items():
        lattice = attach(model, pattern, 2, **options)
        planned |= {site: names for site in lattice.attached if site not in planned}
    for site, names in planned.items():
        for seed, name in enumerate(names):
            lattice.plant(site, seed, name)
    y = model(torch.ones(3, *shape))
    assert not torch.equal(y, build_host(build)(torch.ones(3, *shape)))
    model = lattice.fold()
    torch.testing.assert_close(model(torch.ones(3, *shape)), y)
    return model, lambda batch: torch.randn(batch, *shape)


def build_host(build):
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_torch_export_takes_any_batch_and_gives_the_same(case, strict):
    model, batch = folded(case)
    program = torch.export.export(model, (batch(3),), dynamic_shapes=(DYNAMIC,), strict=strict)
    for size in (1, 2, 7):
        x = batch(size)
        torch.testing.assert_close(program.module()(x), model(x))


def through_onnx(model, x, others, path):
    """What onnxruntime makes of other batches, exported with the first."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False)
    program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for x in others]


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_takes_any_batch_and_gives_the_same(case, tmp_path):
    model, batch = folded(case)
    others = [batch(size) for size in (1, 2, 7)]
    results = through_onnx(model, batch(3), others, tmp_path / "model.onnx")
    for x, y in zip(others, results, strict=True):
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


class Logits(nn.Module):
    """Tokens in, one tensor out, as an exported model has it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


def test_a_grown_gpt2_goes_to_onnxruntime(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=11, bos_token_id=0,
        eos_token_id=1, activation_function="gelu",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    attach(model, "transformer.h.0", 4, channels=16)
    mlp = "transformer.h.0.mlp"
    lattice = attach(model, f"{mlp}.c_fc->{mlp}.c_proj", 4, **SPAN)
    for site in lattice.attached:
        lattice.plant(site, 1, "mlp_gelu")
    host = sum(p.numel() for p in lattice.host_parameters())
    logits = Logits(lattice.fold()).eval()
    grown = sum(p.numel() for p in model.parameters()) - host
    assert grown == 4 * (16 + 1) + 4 * 16 + (16 + 1 + 16)
    others = [torch.randint(11, (size, 6)) for size in (1, 5)]
    results = through_onnx(logits, torch.randint(11, (2, 6)), others, tmp_path / "model.onnx")
    for tokens, y in zip(others, results, strict=True):
        torch.testing.assert_close(y, logits(tokens), rtol=1e-5, atol=1e-5)


def operations(model, x):
    """What one pass runs, and on parameters of which shapes."""
    program = torch.export.export(model, (x,), dynamic_shapes=(DYNAMIC,)).run_decompositions()
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    return calls, [tuple(p.shape) for p in program.state_dict.values()]


@pytest.mark.parametrize(("case", "hidden"), [("widened", 14), ("updated", 12)])
def test_what_is_merged_costs_what_a_hand_written_model_costs(case, hidden):
    model, batch = folded(case)
    by_hand = blocks(hidden=hidden).eval()
    assert operations(model, batch(3)) == operations(by_hand, batch(3))
    assert str(model) == str(by_hand)
    assert list(model.state_dict()) == list(by_hand.state_dict())
