"""The layer of one site: transparent while dormant, its state exact, its telemetry honest."""

import copy
import io
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn

from esper import attach
from esper.config.run import GrowthConfig
from esper.seeds.blueprints import blueprint_id
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import (
    AWAKE_STAGES,
    BLUEPRINT,
    EPOCHS,
    GRAFT,
    GRAFTED_STAGES,
    STAGE,
    TRAINABLE_STAGES,
    SeedState,
    Stage,
)

STATE_BUFFERS = ("alpha", "progress", "ramped_steps", "graft_loss", "pace")
DERIVED = ("trainable", "ramping", "cosine", "phi", "hidden_used", "learning")


def busy(bench, geometry="chunk", kind="linear", **options):
    """A bench whose seeds are in four stages, with random weights and uneven alphas."""
    b = bench(kind, geometry, seeds_per_layer=6, **options)
    stages = (Stage.TRAINING, Stage.GRAFTING, Stage.FOSSILIZED, Stage.FINE_TUNING, Stage.CULLED)
    for seed, stage in enumerate(stages):
        b.lead(seed, stage, blueprint="mlp_silu", graft="cosine" if seed == 1 else "linear")
    with torch.no_grad():
        for weights in b.layer.pool():
            weights.normal_()
        b.layer.alpha[1] = 1 / 3
        b.layer.graft_loss[1] = 123456.7
        b.layer.ramped_steps[1] = 2049
    return b


class TestTransparency:
    @pytest.mark.parametrize("train", [True, False])
    def test_the_output_is_the_very_same_tensor_while_all_are_dormant(self, geometry, train):
        in_features = 5 if geometry == "span" else None
        layer = KasminaLayer(12, 3, geometry=geometry, in_features=in_features).train(train)
        for _ in range(5):
            y = torch.randn(4, 12, requires_grad=True)
            assert layer(y, torch.randn(4, 5)) is y

    @pytest.mark.parametrize("stage", [None, Stage.GERMINATED, Stage.TRAINING, Stage.CULLED])
    @pytest.mark.parametrize("train", [True, False])
    def test_at_alpha_0_nan_weights_stay_where_they_are(self, bench, geometry, kind, stage, train):
        b = bench(kind, geometry)
        if stage is not None:
            b.lead(1, stage)
        with torch.no_grad():
            for weights in b.layer.pool():
                weights.fill_(float("nan"))
        for model in (b.model, b.twin):
            model.train(train)
        ours, theirs = b.model(b.x), b.twin(b.x)
        assert torch.equal(ours, theirs)
        for y in (ours, theirs):
            y.square().sum().backward()
        for mine, twin in zip(b.lattice.host_parameters(), b.twin.parameters(), strict=True):
            assert torch.equal(mine.grad, twin.grad)

    def test_nan_weights_of_sleepers_do_not_reach_the_grafted(self, bench, geometry):
        b = busy(bench, geometry)
        before = b.model(b.x)
        with torch.no_grad():
            for weights in b.layer.pool():
                weights[[4, 5]] = float("nan")
        assert torch.equal(b.model(b.x), before)
        b.loss().backward()
        grafted = [w.grad[[1, 2, 3]] for w in b.layer.pool()]
        assert all(g.isfinite().all() for g in grafted)

    def test_the_layout_of_the_output_stays_also_with_awake_seeds(self, bench, geometry):
        """Or a `view` in the host would fail, and its convolutions round otherwise."""
        b = bench("conv", geometry)
        b.lead(0, Stage.FINE_TUNING)
        y = torch.randn(2, b.layer.channels, 5, 5)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            like = y.contiguous(memory_format=memory_format)
            assert b.layer(like, b.x[:2]).stride() == like.stride()

    def test_chunks_of_a_convolution_are_its_channels(self, bench):
        b = bench("conv", "chunk")
        b.lead(1, Stage.FINE_TUNING)
        with torch.no_grad():
            for weights in b.layer.pool():
                weights.normal_()
        y = torch.randn(2, 12, 5, 5)
        rows = b.layer(y.movedim(1, -1).reshape(-1, 12, 1, 1)).view(2, 5, 5, 12).movedim(-1, 1)
        out = b.layer(y)
        torch.testing.assert_close(out, rows)
        assert torch.equal(out[:, :3], y[:, :3])
        assert not torch.equal(out[:, 3:6], y[:, 3:6])

    def test_only_the_first_of_several_outputs_is_grafted(self):
        pair = namedtuple("pair", "hidden cell")

        class Host(nn.Linear):
            def forward(self, x):
                return pair(super().forward(x), x)

        model = Host(3, 4)
        lattice = attach(nn.Sequential(model), "0", 2)
        lattice.plant("0", 0, "mlp_relu")
        x = torch.randn(2, 3)
        out = model(x)
        assert isinstance(out, pair)
        assert out.cell is x
        assert not torch.equal(out.hidden, nn.functional.linear(x, model.weight, model.bias))


class TestState:
    def test_it_is_one_int32_row_a_seed(self, bench):
        b = busy(bench)
        assert b.layer.state.shape == (6, 4)
        assert b.layer.state.dtype == torch.int32
        b.lattice.report(1.0)
        row = b.layer.state[1].tolist()
        assert (STAGE, BLUEPRINT, EPOCHS, GRAFT) == (0, 1, 2, 3)
        assert row == [Stage.GRAFTING, blueprint_id("mlp_silu"), 1, 1]
        assert b.layer.state[5].tolist() == [0, 0, 0, 0]

    @pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
    def test_it_is_exact_whatever_the_host_is_converted_to(self, bench, geometry, convert):
        b = busy(bench, geometry)
        before = copy.deepcopy(b.layer)
        getattr(b.model, convert)()
        for name in STATE_BUFFERS:
            buffer = getattr(b.layer, name)
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer.nan_to_num(), getattr(before, name).nan_to_num()), name
        assert b.layer.state.dtype == torch.int32
        wide = torch.float64 if convert == "double" else torch.float32
        for mine, old in zip(b.layer.pool(), before.pool(), strict=True):
            assert mine.dtype == wide
            assert torch.equal(mine, old.to(wide))
        dtype = b.model.out.weight.dtype
        y = b.model(b.x.to(dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()

    def test_autocast_computes_seeds_in_fp32(self, bench, geometry):
        b = busy(bench, geometry)
        b.model.eval()
        y, x = torch.randn(32, b.layer.channels), torch.randn(32, 6)
        exact = b.layer(y, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(b.layer(y, x), exact)
            assert b.model(b.x).isfinite().all()

    def test_it_moves_with_the_model(self, bench):
        """No second device here: `meta` shows that every tensor is moved."""
        layer = busy(bench).layer.to("meta")
        tensors = [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
        tensors += [*layer.parameters(), *layer.buffers()]
        assert len(tensors) > 15
        assert {t.device.type for t in tensors} == {"meta"}
        assert layer.probe.grad.device.type == "meta"

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_a_copy_computes_the_same_and_lives_on_alone(self, bench, geometry, how):
        b = busy(bench, geometry)
        match how:
            case "deepcopy":
                twin = copy.deepcopy(b.model)
            case "pickle":
                twin = pickle.loads(pickle.dumps(b.model))
            case _:
                file = io.BytesIO()
                torch.save(b.model, file)
                twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        copied = twin.get_submodule("fc1" if geometry == "chunk" else "fc2").kasmina
        assert torch.equal(copied.state, b.layer.state)
        before = b.model(b.x)
        assert torch.equal(twin(b.x), before)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        twin(b.x).square().sum().backward()
        optimizer.step()
        assert (copied.steps, b.layer.steps) == (1, 0)
        assert b.layer.probe.grad.count_nonzero() == 0 < copied.probe.grad.count_nonzero()
        assert torch.equal(b.model(b.x), before)

    @pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_a_copy_keeps_what_was_measured(self, bench, geometry, copy_of):
        b = busy(bench, geometry)
        b.loss().backward()
        copied = copy_of(b.layer)
        for name, values in b.layer.telemetry().items():
            torch.testing.assert_close(copied.telemetry()[name], values, equal_nan=True)
        assert copied.probe.is_leaf
        assert copied.probe.requires_grad
        copied.reset_telemetry()
        assert not b.layer.telemetry()["grad_energy"].isnan().any()

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_state_dict_brings_the_masks_along(self, bench, geometry, assign):
        b, other = busy(bench, geometry), bench("linear", geometry, seeds_per_layer=6)
        other.model.load_state_dict(b.model.state_dict(), assign=assign)
        for name in DERIVED:
            assert torch.equal(getattr(other.layer, name), getattr(b.layer, name)), name
        assert torch.equal(other.model(b.x), b.model(b.x))
        assert other.layer.any_fresh

        dormant = bench("linear", geometry, seeds_per_layer=6)
        b.model.load_state_dict(dormant.model.state_dict())
        y = torch.randn(2, b.layer.channels)
        assert b.layer.eval()(y) is y
        assert not b.layer.trainable.any()

    def test_the_masks_follow_the_state(self, bench):
        b = busy(bench)
        stages = [s.stage for s in b.layer.states()]
        assert b.layer.trainable.tolist() == [s in TRAINABLE_STAGES for s in stages]
        assert b.layer.ramping.tolist() == [s is Stage.GRAFTING for s in stages]
        # 2: its own objective, 1: that of the task, 0: nothing
        assert b.layer.learning.tolist() == [2, 1, 0, 1, 0, 0]
        assert b.layer.cosine.tolist() == [False, True, False, False, False, False]

    def test_alpha_is_0_outside_the_grafted_stages_and_1_after_the_ramp(self, bench):
        b = bench("linear", "chunk", seeds_per_layer=12)
        for seed, stage in enumerate(Stage):
            if stage is not Stage.DORMANT:
                b.lead(seed, stage)
        alphas = dict(zip(Stage, b.layer.alpha.tolist(), strict=False))
        assert alphas == {s: float(s in GRAFTED_STAGES and s is not Stage.GRAFTING) for s in Stage}

    def test_a_fresh_seed_changes_nothing_whatever_alpha_is(self, bench, geometry):
        b = bench("linear", geometry)
        b.lead(0, Stage.GERMINATED)
        with torch.no_grad():
            b.layer.alpha[0] = 1
        assert b.layer.w_in[0].count_nonzero() == b.layer.w_in[0].numel()
        torch.testing.assert_close(b.model(b.x), b.twin(b.x), rtol=0, atol=0)

    def test_frozen_seeds_pass_the_gradient_on_and_keep_none(self, bench, geometry):
        b = busy(bench, geometry)
        b.loss().backward()
        rows = [w.grad.view(6, -1).any(1).tolist() for w in b.layer.pool()]
        assert rows == [[True, True, False, True, False, False]] * 3


class TestTelemetry:
    def test_statistics_of_the_activations(self):
        layer, y = KasminaLayer(6, 3), torch.randn(50, 6, requires_grad=True)
        with torch.no_grad():
            y[:, 4:] = 0
        dy = torch.randn(50, 6)
        layer(y).backward(dy)
        told = layer.telemetry()
        chunks = y.detach().view(50, 3, 2)
        torch.testing.assert_close(
            told["variance"], chunks.var(0, correction=0).mean(1), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(told["dead_frac"], torch.tensor([0.0, 0.0, 1.0]))
        energy = (dy * 50).square().view(50, 3, 2).mean((0, 2))
        torch.testing.assert_close(told["grad_energy"], energy)

    def test_the_gradient_energy_does_not_depend_on_the_batch_size(self):
        small, large = KasminaLayer(4, 2), KasminaLayer(4, 2)
        y = torch.randn(8, 4)
        for layer, batch in ((small, y), (large, y.repeat(16, 1))):
            out = layer(batch.requires_grad_())
            out.square().mean().backward()
        torch.testing.assert_close(
            small.telemetry()["grad_energy"], large.telemetry()["grad_energy"]
        )

    def test_seeds_of_a_span_share_one_score(self):
        layer = KasminaLayer(6, 3, geometry="span", in_features=2)
        layer(torch.randn(5, 6, requires_grad=True), torch.randn(5, 2)).square().sum().backward()
        assert len(set(layer.telemetry()["grad_energy"].tolist())) == 1

    @pytest.mark.parametrize("stage", [None, *sorted(AWAKE_STAGES)])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_the_gradient_is_measured_in_every_stage_and_in_place_hosts(
        self, bench, geometry, kind, stage, frozen
    ):
        b = bench(kind, geometry)
        for p in b.lattice.host_parameters():
            p.requires_grad_(not frozen)
        if stage is not None:
            b.lead(0, stage)
        b.train(torch.optim.SGD(b.model.parameters(), lr=0.0), 6)
        energy = b.layer.telemetry()["grad_energy"]
        assert (energy > 0).all()

        dormant = bench(kind, geometry)
        dormant.train(torch.optim.SGD(dormant.model.parameters(), lr=0.0), 6)
        torch.testing.assert_close(energy, dormant.layer.telemetry()["grad_energy"])

    def test_the_gradient_of_a_view_is_measured_too(self):
        layer, x = KasminaLayer(4, 2), torch.randn(3, 4, requires_grad=True)
        y = layer((x * 2).view(3, 4))
        y.relu_()
        y.sum().backward()
        assert not layer.telemetry()["grad_energy"].isnan().any()

    def test_it_is_gathered_at_one_address(self, bench, geometry):
        """A CUDA graph adds to the memory that it was captured with."""
        b = bench("linear", geometry)
        probe, address = b.layer.probe, b.layer.probe.grad.data_ptr()
        b.lead(0, Stage.TRAINING)
        b.train(torch.optim.SGD(b.model.parameters(), lr=0.0), 3)
        assert probe.grad.count_nonzero() > 0
        b.lattice.report(1.0)
        assert probe.grad.count_nonzero() == 0
        b.model.float()
        assert b.layer.probe is probe
        assert probe.grad.data_ptr() == address

    @pytest.mark.parametrize("stage", [None, Stage.TRAINING, Stage.FINE_TUNING])
    def test_a_pass_is_observed_at_every_fourth_step(self, bench, geometry, stage):
        b = bench("linear", geometry)
        if stage is not None:
            b.lead(0, stage)
        told = []
        optimizer = torch.optim.SGD(b.model.parameters(), lr=0.0)
        for _ in range(6):
            b.train(optimizer, 1)
            told.append(int(b.layer._told().passes))
        assert told == [1, 1, 1, 1, 2, 2]
        assert int(b.layer._told().rows) == 2 * 32

    def test_a_probe_whose_gradient_was_taken_says_so(self):
        layer = KasminaLayer(4, 2)
        layer.probe.grad = None
        with pytest.raises(ValueError, match=r"probe.grad must stay in place"):
            layer.telemetry()

    def test_what_was_not_measured_is_nan(self):
        layer = KasminaLayer(4, 2)
        unmeasured = ("grad_energy", "variance", "dead_frac", "explained_frac")
        assert all(layer.telemetry()[k].isnan().all() for k in unmeasured)
        layer.eval()(torch.randn(3, 4))
        assert all(layer.telemetry()[k].isnan().all() for k in unmeasured)
        layer.train()(torch.randn(3, 4, requires_grad=True)).sum().backward()
        told = layer.telemetry()
        assert not told["grad_energy"].isnan().any()
        layer.reset_telemetry()
        assert layer.telemetry()["grad_energy"].isnan().all()

    def test_big_state_numbers_arrive_exactly(self):
        layer = KasminaLayer(4, 1)
        layer.write_states([SeedState(Stage.FOSSILIZED, 3, 2**24 - 1, 2)])
        told = layer.telemetry()
        names = ("stage", "blueprint_id", "epochs", "graft_id")
        assert [int(told[k]) for k in names] == [7, 3, 2**24 - 1, 2]


class TestRefusals:
    @pytest.mark.parametrize(
        ("channels", "seeds", "options", "message"),
        [
            (12, 5, {}, r"must divide the site's 12 channels, but got 5; use one of \[1, 2, 3"),
            (12, 0, {}, r"seeds_per_layer must be at least 1, but got 0"),
            (12, -3, {}, r"seeds_per_layer must be at least 1, but got -3"),
            (12, 3, {"hidden": 0}, r"hidden must be at least 1, but got 0"),
            (12, 5, {"geometry": "span"}, r"in_features must be given for a span"),
            (12, 5, {"geometry": "span", "in_features": 2, "hidden": 4},
             r"hidden must be left out for a span site, but got 4"),
        ],
    )  # fmt: skip
    def test_sizes(self, channels, seeds, options, message):
        with pytest.raises(ValueError, match=message):
            KasminaLayer(channels, seeds, **options)

    def test_an_output_of_other_channels(self):
        with pytest.raises(ValueError, match=r"channels must be 12 on axis -1 .*\(2, 11\)"):
            KasminaLayer(12, 3)(torch.randn(2, 11))

    def test_a_span_without_its_source(self, bench):
        b = bench("linear", "span")
        with pytest.raises(ValueError, match=r"source must be the input of the span"):
            b.model.fc2(torch.randn(3, 12))
        b.model.fc1(input=b.x)
        with pytest.raises(ValueError, match=r"must take it as a positional argument"):
            b.model.fc2(torch.randn(3, 12))

    def test_a_span_whose_ends_do_not_share_their_positions(self):
        model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 6, 3))
        lattice = attach(model, "0->1", 3, geometry="span", growth=GrowthConfig())
        lattice.plant("0->1", 0, "mlp_relu")
        with pytest.raises(ValueError, match=r"input and output must share their positions"):
            model(torch.randn(2, 2, 9))


def test_the_representation_says_how_much_is_grafted(bench):
    assert "chunk, seeds=6, channels=12, hidden=2, grafted=3" in repr(busy(bench).model)
