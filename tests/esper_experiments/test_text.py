"""The corpora, tasks and hosts of text, and what grows on them."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from esper.config.base import ConfigError
from esper.config.run import RunConfig
from esper.environment import fingerprint
from esper.evidence.records import Fingerprint
from esper.seeds.state import TRAINABLE_STAGES, Stage
from esper.surgery.files import save
from esper.trial import Trial, TrialSpec
from esper_experiments.text import CharGpt, CharText, corpora
from esper_experiments.text import gpt as gpt_module

TASK = {
    "name": "char_text",
    "options": {"corpus": "python", "characters": 40_000, "length": 16, "held_out_sequences": 8},
}
SIZES = {"layers": 2, "width": 16, "heads": 2}
RUN = {
    "plugins": ["esper_experiments.text"],
    "task": TASK,
    "host": {"name": "char_gpt", "options": SIZES},
    "train": {
        "steps": 40, "batch_size": 8, "optimizer": "adamw", "learning_rate": 0.01,
        "interval_steps": 5,
    },
}  # fmt: skip
MAPS = ("blocks.*.attn.qkv", "blocks.*.attn.out", "blocks.*.fc1", "blocks.*.fc2", "head")
SEEDS = {
    "lattice": [{"sites": s, "seeds_per_layer": 4, "geometry": "span"} for s in MAPS],
    "growth": {
        "ramp_steps": 5, "fine_tuning_intervals": 100, "initialisation": "matched",
        "measured_samples": 16, "min_gain": None, "min_explained_frac": -1e9,
    },
    "controller": {"name": "tamiyo", "options": {
        "blueprint": "low_rank", "seeds_per_wave": 6, "patience_intervals": 1,
        "min_improvement_frac": 0.9, "score": "bottleneck",
    }},
}  # fmt: skip


def finished(changes=None, **options):
    host = {"name": "char_gpt", "options": {**SIZES, **options}}
    spec = TrialSpec("test", 0, 0, 0, "none", Fingerprint(**fingerprint("cpu")))
    trial = Trial(RunConfig.model_validate({**RUN, "host": host, **(changes or {})}), spec)
    trial.run_for(math.inf)
    return trial


@pytest.fixture(scope="module")
def data():
    return CharText(**TASK["options"]).load(0)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    trial = finished()
    folder = tmp_path_factory.mktemp("checkpoint")
    save(folder, trial.trainer.model, trial.trainer.lattice)
    return folder, trial.trainer.model.eval()


class TestText:
    def test_targets_are_the_next_characters(self, data):
        for x, y in (data.train, data.held_out, data.test):
            assert x.dtype == y.dtype == torch.int64
            assert torch.equal(x[:, 1:], y[:, :-1])
            assert torch.equal(x[1:, 0], y[:-1, -1])

    def test_nine_tenths_are_for_training_and_no_split_sees_another(self, data):
        text = corpora.read_python()
        kept = "".join(c for c in text if c in corpora.ALPHABET)[:40_000]
        read = "".join(corpora.ALPHABET[i] for i in data.train[0].flatten())
        assert kept[:36_000].startswith(read)
        assert len(read) == 2249 * 16
        held_out, test = ("".join(corpora.ALPHABET[i] for i in x.flatten())
                          for x, _ in (data.held_out, data.test))  # fmt: skip
        assert kept[36_000:].startswith(held_out)
        assert len(held_out) == 8 * 16
        assert kept[38_000:].startswith(test)
        assert len(test) == 124 * 16

    def test_the_loss_of_a_sample_is_the_mean_over_its_characters(self, data):
        logits = torch.randn(3, 16, data.outputs)
        y = data.train[1][:3]
        expected = [F.cross_entropy(a, b) for a, b in zip(logits, y, strict=True)]
        torch.testing.assert_close(data.losses(logits, y), torch.stack(expected))
        found = data.metrics("test", logits, y)
        assert found["test_loss"] == pytest.approx(float(sum(expected)) / 3)
        assert found["test_bits"] == pytest.approx(found["test_loss"] / math.log(2))

    def test_too_little_text_is_refused(self):
        with pytest.raises(ValueError, match="at least 8 sequences a split, but 16 leaves 3"):
            CharText(**TASK["options"] | {"characters": 1000}).load(0)


class TestShakespeare:
    def test_it_is_read_from_the_cache_and_checked(self, tmp_path, monkeypatch):
        file = tmp_path / "esper" / "tinyshakespeare.txt"
        file.parent.mkdir()
        file.write_text("another text")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(ValueError, match="must be tinyshakespeare"):
            corpora.read_shakespeare(None)

    def test_without_a_network_it_says_where_to_put_the_file(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(corpora, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
        place = tmp_path / "esper" / "tinyshakespeare.txt"
        with pytest.raises(ValueError, match=f"put the file at {place}"):
            corpora.read_shakespeare(None)

    def test_a_download_that_is_right_is_kept(self, tmp_path, monkeypatch):
        served = tmp_path / "served.txt"
        served.write_bytes(b"To be")
        monkeypatch.setattr(corpora, "SHAKESPEARE_URL", served.as_uri())
        monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", "0" * 64)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(ValueError, match="must be tinyshakespeare"):
            corpora.read_shakespeare(None)
        right = corpora.hashlib.sha256(b"To be").hexdigest()
        monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", right)
        served.unlink()
        assert corpora.read_shakespeare(None) == "To be"

    def test_a_wrong_path_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="path must name a file"):
            corpora.read_shakespeare(tmp_path / "none.txt")


class TestHost:
    def test_no_character_sees_a_later_one(self, data):
        model = CharGpt(**SIZES).build(data).eval()
        x = data.train[0][:2].clone()
        before = model(x)
        x[:, 9] = (x[:, 9] + 1) % data.outputs
        after = model(x)
        assert torch.equal(before[:, :9], after[:, :9])
        assert not torch.equal(before[:, 9], after[:, 9])

    def test_pieces_without_gradient_give_the_same_logits(self, data, monkeypatch):
        model = CharGpt(**SIZES).build(data).eval()
        whole = model(data.train[0][:10])
        monkeypatch.setattr(gpt_module, "PIECE", 3)
        with torch.no_grad():
            torch.testing.assert_close(model(data.train[0][:10]), whole)

    def test_no_map_has_a_bias(self, data):
        model = CharGpt(**SIZES).build(data)
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linear) == 9
        assert all(m.bias is None for m in linear)

    def test_a_checkpoint_gives_back_its_weights(self, data, pretrained):
        folder, model = pretrained
        again = CharGpt(**SIZES, pretrained=folder).build(data).eval()
        assert torch.equal(again(data.train[0][:4]), model(data.train[0][:4]))

    def test_a_checkpoint_of_other_sizes_is_refused(self, data, pretrained):
        with pytest.raises(ValueError, match="pretrained must be a checkpoint of a host of these"):
            CharGpt(**SIZES | {"width": 32}, pretrained=pretrained[0]).build(data)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"heads": 3}, "width must be a multiple of heads"),
            ({"adapter": {"kind": "lora", "rank": 2}}, "frozen must be true"),
            ({"frozen": True, "adapter": {"kind": "adalora", "rank": 2}}, "total_steps must be"),
            ({"frozen": True, "adapter": {"kind": "lora", "rank": 2, "total_steps": 9}},
             "total_steps must be"),
            ({"frozen": True, "adapter": {"kind": "adalora", "rank": 2, "total_steps": 9,
                                          "bias": True}}, "bias must be false for kind 'adalora'"),
        ],
    )  # fmt: skip
    def test_options_that_do_not_fit_are_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            finished(**options)


def test_mlps_are_widened_while_they_train():
    changes = {
        "lattice": [{
            "sites": "blocks.*.fc1->blocks.*.fc2", "seeds_per_layer": 8, "geometry": "span",
        }],
        "growth": SEEDS["growth"],
        "controller": {"name": "schedule", "options": {
            "blueprint": "mlp_gelu", "at_intervals": [2], "count": 16,
        }},
    }  # fmt: skip
    trial = finished(changes, hidden=8)
    metrics = trial.record().metrics
    assert metrics["seeds_kept"] == 16
    wide = CharGpt(**SIZES, hidden=16).build(trial.trainer.data)
    assert metrics["parameters"] == sum(p.numel() for p in wide.parameters())
    assert metrics["test_loss"] < math.log(len(corpora.ALPHABET))


def test_seeds_adapt_a_frozen_host_and_it_forgets_nothing(data, pretrained):
    folder, original = pretrained
    trial = finished(SEEDS, pretrained=str(folder), frozen=True)
    model, lattice = trial.trainer.model.eval(), trial.trainer.lattice
    assert trial.curves["train_loss"][-1] < trial.curves["train_loss"][0]
    assert lattice.count_awake() >= 6
    stages = {s.stage for a in lattice.attached.values() for s in a.layer.states()}
    assert stages & TRAINABLE_STAGES - {Stage.TRAINING}
    x = data.test[0]
    assert not torch.equal(model(x), original(x))
    for (name, before), after in zip(
        original.named_parameters(), lattice.host_parameters(), strict=True
    ):
        assert torch.equal(before, after), name
    with torch.no_grad():
        for attached in lattice.attached.values():
            attached.layer.alpha.zero_()
    assert torch.equal(model(x), original(x))


class TestAdapters:
    @pytest.mark.parametrize("kind", ["lora", "adalora"])
    def test_only_the_adapter_trains_at_the_promised_size(self, kind, pretrained):
        pytest.importorskip("peft")
        adapter = {"kind": kind, "rank": 2}
        if kind == "adalora":
            adapter["total_steps"] = RUN["train"]["steps"]
        folder, original = pretrained
        trial = finished(None, pretrained=str(folder), frozen=True, adapter=adapter)
        assert trial.curves["train_loss"][-1] < trial.curves["train_loss"][0]
        own = {n: p for n, p in trial.trainer.model.named_parameters() if "lora_" in n}
        assert {n for n, p in trial.trainer.model.named_parameters() if p.requires_grad} == set(own)
        start = 2 if kind == "lora" else 3
        # inputs and outputs of qkv, out, fc1 and fc2 of both layers; AdaLoRA also scales each rank
        ends = 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16) + 8 * (kind == "adalora")
        assert sum(p.numel() for p in own.values()) == start * ends
        kept = {n: p for n, p in trial.trainer.model.named_parameters() if n not in own}
        frozen = [p for n, p in kept.items() if "ranknum" not in n]
        for before, after in zip(original.parameters(), frozen, strict=True):
            assert torch.equal(before, after)

    def test_lora_may_add_a_bias_to_each_map(self, data, pretrained):
        pytest.importorskip("peft")
        adapter = {"kind": "lora", "rank": 2, "bias": True}
        model = CharGpt(**SIZES, pretrained=pretrained[0], frozen=True, adapter=adapter).build(data)
        biases = {n: p for n, p in model.named_parameters() if n.endswith("lora_B.default.bias")}
        # the outputs of qkv, out, fc1 and fc2 of both layers
        assert sum(p.numel() for p in biases.values()) == 2 * (48 + 16 + 64 + 16)
        assert all(p.requires_grad for p in biases.values())

    def test_adalora_ends_with_the_ranks_that_were_asked_for(self, pretrained):
        pytest.importorskip("peft")
        adapter = {"kind": "adalora", "rank": 2, "total_steps": RUN["train"]["steps"]}
        trial = finished(None, pretrained=str(pretrained[0]), frozen=True, adapter=adapter)
        allotted = trial.trainer.model.__dict__["_adalora"].peft_config["default"].rank_pattern
        assert len(allotted) == 8
        assert sum(map(sum, allotted.values())) == 2 * 8


def test_the_python_modules_are_there_in_order():
    assert list(corpora.PYTHON_MODULES) == sorted(corpora.PYTHON_MODULES)
    text = corpora.read_python()
    assert text.startswith((Path(corpora.json.__file__).parents[1] / "argparse.py").read_text())
    assert 1_500_000 < len(text) < 4_000_000
