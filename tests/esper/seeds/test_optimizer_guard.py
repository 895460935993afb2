"""Waking, culling and fossilising only change data, under any optimizer."""

import copy

import pytest
import torch
from torch import nn

from esper import attach
from esper.config.run import GrowthConfig
from esper.seeds import optimizer_guard
from esper.seeds.actions import Advance, Cull, Germinate, Promote
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import SeedState, Stage

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    return OPTIMIZERS[request.param]


def rows_of(layer, optimizer):
    """Every tensor with one row a seed: the pool and all its moments."""
    tensors = list(layer.pool())
    for p in layer.pool():
        state = optimizer.state.get(p, {})
        tensors += [v for v in state.values() if v.ndim == p.ndim and len(v) == len(p)]
    return [t.detach().clone() for t in tensors]


def moments_of(layer, optimizer, seed):
    return torch.cat([t[seed].reshape(-1) for t in rows_of(layer, optimizer)[3:]])


def identity(b, optimizer):
    return (
        [(id(p), p.data_ptr()) for p in b.model.parameters()],
        [(name, id(buffer)) for name, buffer in b.layer.named_buffers()
         if name != "training_rows"],
        [[id(p) for p in group["params"]] for group in optimizer.param_groups],
    )  # fmt: skip


def test_a_whole_life_rebuilds_nothing_and_moves_only_the_awake(bench, geometry, make_optimizer):
    b = bench("linear", geometry)
    with torch.no_grad():
        for weights in b.layer.pool():
            weights.normal_()
    optimizer = make_optimizer(b.model.parameters())
    b.train(optimizer, 2)
    before_all = identity(b, optimizer)
    keys = None
    for actions in b.story:
        b.tell(actions)
        b.train(optimizer, 1)
        before = rows_of(b.layer, optimizer)
        b.train(optimizer, 6)
        after = rows_of(b.layer, optimizer)
        still = ~b.layer.trainable
        assert len(before) == len(after)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[still], new[still])
        for seed in b.layer.trainable.nonzero():
            moved = [not torch.equal(o[seed], n[seed]) for o, n in zip(before, after, strict=True)]
            assert all(moved[:3]), (int(seed), moved)
        if b.layer.trainable.any():
            now = {id(p): sorted(optimizer.state[p]) for p in b.model.parameters()}
            assert keys in (None, now)
            keys = now
    assert identity(b, optimizer) == before_all
    assert [s.stage for s in b.layer.states()[:3]] == [
        Stage.FOSSILIZED, Stage.STABILIZATION, Stage.DORMANT
    ]  # fmt: skip


@pytest.mark.parametrize("awake", [Stage.FINE_TUNING, Stage.GRAFTING, Stage.TRAINING])
@pytest.mark.parametrize(
    "asleep",
    [s for s in Stage if s not in (Stage.TRAINING, Stage.GRAFTING, Stage.FINE_TUNING)],
)
def test_weight_decay_and_moments_leave_every_still_stage_alone(bench, awake, asleep):
    b = bench("linear", "chunk")
    b.lead(0, awake)
    b.lead(1, Stage.FINE_TUNING)
    optimizer = OPTIMIZERS["sgd"](b.model.parameters())
    b.train(optimizer, 5)
    states = b.layer.states()
    # straight to the stage, with hot moments
    b.layer.write_states([states[0], type(states[1])(asleep, states[1].blueprint_id), *states[2:]])
    before = rows_of(b.layer, optimizer)
    assert all(t[1].any() for t in before[3:])
    b.train(optimizer, 20)
    for old, new in zip(before, rows_of(b.layer, optimizer), strict=True):
        assert torch.equal(old[1:], new[1:])
        assert not torch.equal(old[0], new[0])


def test_a_reused_slot_starts_with_moments_of_0(bench, geometry, make_optimizer):
    b = bench("linear", geometry)
    optimizer = make_optimizer(b.model.parameters())
    b.lead(0, Stage.FINE_TUNING)
    b.lead(1, Stage.FINE_TUNING)
    b.train(optimizer, 5)
    assert moments_of(b.layer, optimizer, 0).any()
    b.tell([Cull("", 0)])
    b.train(optimizer, 2)
    assert moments_of(b.layer, optimizer, 0).any()
    b.tell([Advance("", 0), Germinate("", 0, "mlp_relu")])
    b.train(optimizer, 1)
    assert not moments_of(b.layer, optimizer, 0).any()
    assert moments_of(b.layer, optimizer, 1).any()


def test_old_moments_are_forgotten_also_where_the_first_step_trains(bench, geometry):
    b = bench("linear", geometry)
    optimizer = OPTIMIZERS["adamw"](b.model.parameters())
    b.lead(0, Stage.FINE_TUNING)
    b.train(optimizer, 5)
    b.tell([Cull("", 0)])
    b.tell([Advance("", 0), Germinate("", 0, "mlp_relu"), Promote("", 0)])
    b.train(optimizer, 1)
    for p in b.layer.pool():
        torch.testing.assert_close(optimizer.state[p]["exp_avg"][0], 0.1 * p.grad[0])

    b.tell([Advance("", 0)])
    # at alpha 0 the first step of a graft has no gradient yet
    b.train(optimizer, 2)
    for p in b.layer.pool():
        torch.testing.assert_close(optimizer.state[p]["exp_avg"][0], 0.1 * p.grad[0])


def test_what_is_to_be_forgotten_survives_a_checkpoint(bench):
    """Between `apply` and the next step, weights and optimizer may be saved and restored."""
    b = bench("linear", "chunk")
    optimizer = OPTIMIZERS["adamw"](b.model.parameters())
    b.lead(0, Stage.FINE_TUNING)
    b.train(optimizer, 5)
    b.tell([Cull("", 0)])
    b.tell([Advance("", 0), Germinate("", 0, "mlp_relu")])
    saved = copy.deepcopy((b.model.state_dict(), optimizer.state_dict()))
    b.train(optimizer, 3)
    b.model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert moments_of(b.layer, optimizer, 0).any()
    b.train(optimizer, 1)
    assert not moments_of(b.layer, optimizer, 0).any()


def test_moments_made_while_a_frozen_row_holds_nan_start_at_0(bench):
    b = bench("linear", "chunk")
    b.lead(0, Stage.FINE_TUNING)
    with torch.no_grad():
        for weights in b.layer.pool():
            weights[2] = float("nan")
    optimizer = OPTIMIZERS["sgd"](b.model.parameters())
    b.train(optimizer, 2)
    assert torch.equal(moments_of(b.layer, optimizer, 2), torch.zeros(2 * 9 + 3))
    assert all(w[2].isnan().all() for w in b.layer.pool())


def test_a_pool_spread_over_several_optimizers(bench):
    """One step of training is one step of the graft, and each forgets its own moments."""
    b = bench("linear", "chunk")
    w_in, bias, w_out = b.layer.pool()
    rest = [p for p in b.model.parameters() if p is not bias and p is not w_out]
    optimizers = [OPTIMIZERS["adamw"]([*ps]) for ps in ([w_out], [bias], rest)]
    b.lead(0, Stage.FINE_TUNING)
    b.lead(1, Stage.GRAFTING)

    def step():
        for optimizer in optimizers:
            optimizer.zero_grad()
        b.loss().backward()
        for optimizer in optimizers:
            optimizer.step()

    for _ in range(5):
        step()
    assert b.layer.steps == 5
    assert float(b.layer.alpha[1]) == 0.5
    b.tell([Cull("", 0)])
    b.tell([Advance("", 0), Germinate("", 0, "mlp_relu")])
    step()
    moments = [o.state[p]["exp_avg"][0] for o in optimizers for p in (w_in, bias, w_out)
               if p in o.state]  # fmt: skip
    assert len(moments) == 3
    assert not any(m.any() for m in moments)
    assert not b.layer.fresh.any()


def test_a_plain_training_loop_with_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    lattice = attach(model, "0", 4, growth=GrowthConfig(ramp_steps=10))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    layer, x, y = lattice.layer("0"), torch.randn(64, 4), torch.randn(64, 2)
    frozen = None
    for step in range(120):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            lattice.report(float(loss.detach()))
            stage = layer.states()[2].stage
            if frozen is not None:
                assert all(map(torch.equal, frozen, (w[2] for w in layer.pool())))
            if stage is not Stage.FOSSILIZED:
                kind = {Stage.DORMANT: Germinate, Stage.GERMINATED: Promote}.get(stage, Advance)
                lattice.apply([kind("0", 2, *(["mlp_gelu"] if kind is Germinate else []))])
            if layer.states()[2].stage in (Stage.STABILIZATION, Stage.FOSSILIZED):
                frozen = [w[2].detach().clone() for w in layer.pool()]
            elif layer.states()[2].stage is Stage.FINE_TUNING:
                frozen = None
    assert stage is Stage.FOSSILIZED
    assert layer.alpha.tolist() == [0, 0, 1, 0]
    assert lattice.steps == 120
    assert all(w[[0, 1, 3]].count_nonzero() == 0 for w in layer.pool())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_that_is_captured_decides_nothing_on_the_host(bench, monkeypatch, name):
    """A replay happens after other stage changes than the capture, which Python does not see."""
    captured, eager = bench("linear", "chunk"), bench("linear", "chunk")
    monkeypatch.setattr(optimizer_guard, "is_capturing", lambda layer: layer is captured.layer)
    optimizers = [OPTIMIZERS[name](b.model.parameters()) for b in (captured, eager)]

    def step(b, optimizer):
        optimizer.zero_grad()
        b.loss().backward()
        seen = b.layer.any_fresh, b.layer.any_trainable, b.layer.any_ramping
        if b is captured:
            b.layer.any_fresh = b.layer.any_trainable = b.layer.any_ramping = False
        optimizer.step()
        if b is captured:
            b.layer.any_fresh, b.layer.any_trainable, b.layer.any_ramping = seen

    for stage in (Stage.TRAINING, Stage.GRAFTING, Stage.FINE_TUNING):
        for b, optimizer in zip((captured, eager), optimizers, strict=True):
            b.layer.write_states([SeedState(stage, 2), *b.layer.states()[1:]])
            b.layer.on_enter([0], stage, None)
            if stage is Stage.TRAINING:
                b.lead(1, Stage.FOSSILIZED)
                b.layer.initialise({0: torch.Generator().manual_seed(0)}, outgoing=True)
            for _ in range(12):
                step(b, optimizer)
        rows = [rows_of(b.layer, o) for b, o in zip((captured, eager), optimizers, strict=True)]
        assert all(map(torch.equal, *rows)), stage
        for buffer in ("alpha", "progress", "fresh", "ramped_steps"):
            assert torch.equal(getattr(captured.layer, buffer), getattr(eager.layer, buffer))
    assert captured.layer.alpha.tolist() == [1, 1, 0, 0]
    # Python counts nothing while a graph is recorded, but the graph does
    assert (captured.layer.counted_steps, eager.layer.counted_steps) == (0, 36)
    assert captured.layer.steps == eager.layer.steps == 36


def test_the_ramp_of_one_seed_leaves_the_progress_of_others(bench):
    b = bench("linear", "chunk")
    b.lattice.plant(b.site, 1, "mlp_gelu")
    b.lead(0, Stage.GRAFTING)
    b.train(OPTIMIZERS["adamw"](b.model.parameters()), 5)
    assert b.layer.progress.tolist() == [0.5, 1, 0, 0]
    assert b.layer.alpha.tolist() == [0.5, 1, 0, 0]


def test_two_models_do_not_disturb_one_another(bench, geometry):
    a, b = bench("linear", geometry), bench("linear", geometry)
    alone = bench("linear", geometry)
    for each in (a, alone):
        each.lead(0, Stage.GRAFTING)
    b.lead(1, Stage.GRAFTING)
    optimizers = [OPTIMIZERS["adamw"](each.model.parameters()) for each in (a, b, alone)]
    for _ in range(5):
        a.train(optimizers[0], 1)
        b.train(optimizers[1], 2)
    alone.train(optimizers[2], 5)
    assert (a.layer.steps, b.layer.steps) == (5, 10)
    assert a.layer.alpha.tolist() == [0.5, 0, 0, 0]
    assert b.layer.alpha.tolist() == [0, 1, 0, 0]
    for mine, theirs in zip(a.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_one_optimizer_for_two_models(bench):
    a, b = bench("linear", "chunk"), bench("linear", "span")
    a.lead(0, Stage.GRAFTING)
    b.lead(0, Stage.GRAFTING)
    optimizer = OPTIMIZERS["sgd"]([*a.model.parameters(), *b.model.parameters()])
    for _ in range(10):
        optimizer.zero_grad()
        (a.loss() + b.loss()).backward()
        optimizer.step()
    assert float(a.layer.alpha[0]) == float(b.layer.alpha[0]) == 1


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.GRAFTING, Stage.FINE_TUNING])
def test_an_optimizer_without_the_lattice_is_found_out(bench, stage):
    b = bench("linear", "chunk")
    optimizer = torch.optim.Adam(b.lattice.host_parameters())
    b.lead(0, stage)
    b.train(optimizer, 3)
    with pytest.raises(ValueError, match=r"'fc1' must be moved by an optimizer.*lattice\.param"):
        b.lattice.report(1.0)


def test_an_optimizer_without_the_lattice_is_fine_while_nothing_learns(bench):
    b = bench("linear", "chunk")
    b.lead(0, Stage.FOSSILIZED)
    b.train(torch.optim.Adam(b.lattice.host_parameters()), 3)
    assert b.lattice.report(1.0).interval == 1


def test_models_without_a_lattice_are_left_alone(bench):
    b = bench("linear", "chunk")
    b.lead(0, Stage.FINE_TUNING)
    plain = nn.Linear(6, 3)
    wanted = [p.detach().clone() for p in plain.parameters()]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, weight_decay=0.5)
    plain(b.x).square().mean().backward()
    optimizer.step()
    for before, p in zip(wanted, plain.parameters(), strict=True):
        torch.testing.assert_close(p, before - 0.1 * (p.grad + 0.5 * before))
    assert b.layer.steps == 0


def test_a_step_without_gradients_moves_the_ramp_and_no_weight(bench):
    b = bench("linear", "chunk")
    b.lead(0, Stage.GRAFTING)
    optimizer = OPTIMIZERS["adamw"](b.model.parameters())
    b.train(optimizer, 1)
    before = rows_of(b.layer, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, before, rows_of(b.layer, optimizer)))
    assert b.layer.steps == 2


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("keyword", [True, False])
def test_gradients_made_by_a_closure_move_no_frozen_row(bench, name, keyword):
    b = bench("linear", "chunk")
    b.lead(0, Stage.FINE_TUNING)
    b.lead(1, Stage.FOSSILIZED)
    optimizer = OPTIMIZERS[name](b.model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = b.loss()
        loss.backward()
        return loss

    before = rows_of(b.layer, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    after = rows_of(b.layer, optimizer)
    for old, new in zip(before, after[:3], strict=True):
        assert torch.equal(old[1:], new[1:])
        assert not torch.equal(old[0], new[0])
    assert not any(moment[1:].any() for moment in after[3:])


def test_a_forgotten_layer_is_guarded_no_more(bench):
    import gc
    import weakref

    b = bench("linear", "chunk")
    b.train(OPTIMIZERS["sgd"](b.model.parameters()), 1)
    layer = weakref.ref(b.layer)
    del b
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW], ids=lambda k: k.__name__)
def test_a_seed_woken_late_gets_the_bias_correction_of_its_own_age(kind):
    """Its updates are those of an optimizer that was made when it woke."""
    layer = KasminaLayer(8, 2, hidden=4)
    late, alone = kind(layer.parameters(), lr=0.1), None
    names = tuple(BLUEPRINTS)
    awake = SeedState(Stage.FINE_TUNING, names.index("mlp_gelu"))
    generator = torch.Generator().manual_seed(0)
    for seed, steps in ((0, 300), (1, 20)):
        states = layer.states()
        states[seed] = awake
        layer.write_states(states)
        layer.initialise({seed: generator}, outgoing=True)
        for _ in range(steps):
            if seed == 1 and alone is None:
                twin = torch.nn.Parameter(layer.w_in.detach()[1].clone())
                alone = kind([twin], lr=0.1)
            grad = torch.randn(layer.w_in.shape, generator=generator)
            for param in layer.pool():
                param.grad = torch.zeros_like(param)
            layer.w_in.grad = grad
            if alone is not None:
                twin.grad = grad[1].clone()
                alone.step()
            late.step()
    torch.testing.assert_close(layer.w_in.detach()[1], twin.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW], ids=lambda k: k.__name__)
def test_a_young_seed_has_its_own_rate_that_comes_to_that_of_all(kind):
    """Factor 3 at its first step, then linearly to 1 over four steps, at each its own age."""
    layer = KasminaLayer(8, 2, hidden=4)
    layer.young_rate, layer.young_steps = 3.0, 4
    optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.01)
    twin = torch.nn.Parameter(layer.w_in.detach()[1].clone())
    awake = SeedState(Stage.FINE_TUNING, tuple(BLUEPRINTS).index("mlp_gelu"))
    generator = torch.Generator().manual_seed(0)
    for seed, steps in ((0, 7), (1, 6)):
        states = layer.states()
        states[seed] = awake
        layer.write_states(states)
        layer.initialise({seed: generator}, outgoing=True)
        if seed == 1:
            with torch.no_grad():
                twin.copy_(layer.w_in[1])
            alone = kind([twin], lr=0.1, weight_decay=0.01)
        for step in range(steps):
            for param in layer.pool():
                param.grad = torch.randn(param.shape, generator=generator)
            if seed == 1:
                # decoupled decay keeps the rate of all
                before = twin.detach() * (1 - 0.1 * 0.01 * (kind is torch.optim.AdamW))
                twin.grad = layer.w_in.grad[1].clone()
                alone.step()
                with torch.no_grad():
                    twin.copy_(before + (twin - before) * max(1.0, 3 - step / 2))
            optimizer.step()
    torch.testing.assert_close(layer.w_in.detach()[1], twin.detach(), rtol=1e-4, atol=1e-5)
