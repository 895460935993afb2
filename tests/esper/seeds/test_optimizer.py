"""SeedOptimizer moves what the guarded optimizers of torch would move, and nothing else."""

import copy
import json
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import esper
from esper import SeedOptimizer, attach
from esper.config.run import GrowthConfig
from esper.seeds.actions import Advance, Germinate, Promote
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import BLUEPRINT, SeedState, Stage
from esper_kernels.ops.dispatch import INTERPRET, force_triton

# each with the optimizer of torch that it must follow
KINDS = {
    "adamw": (
        {"lr": 0.01, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ),
    "adam": (
        {"lr": 0.01, "weight_decay": 0.1, "decoupled": False},
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    ),
    "sgd": (
        {"lr": 0.005, "weight_decay": 0.1, "kind": "sgd"},
        lambda p: torch.optim.SGD(p, lr=0.005, weight_decay=0.1),
    ),
    "momentum": (
        {"lr": 0.005, "weight_decay": 0.1, "kind": "sgd", "momentum": 0.9},
        lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9, weight_decay=0.1),
    ),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind_of(request):
    return request.param


def train(b, optimizer, steps):
    for _ in range(steps):
        b.model.zero_grad()
        b.loss().backward()
        optimizer.step()


def rows_of(layer, optimizer):
    """The pool and all its moments."""
    keys = ("exp_avg", "exp_avg_sq", "momentum_buffer")
    states = [optimizer.state[p] for p in layer.pool()]
    return [t.detach() for t in layer.pool()] + [s[k] for s in states for k in keys if k in s]


@pytest.mark.parametrize(
    "implementation",
    [
        nullcontext,
        pytest.param(
            force_triton,
            marks=pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1"),
        ),
    ],
    ids=["plain", "kernel"],
)
def test_a_whole_life_is_that_of_the_guarded_optimizer_of_torch(
    bench, geometry, kind_of, implementation
):
    """Both get the same gradients, so that rounding is all that can differ."""
    options, of_torch = kind_of
    ours, theirs = bench("linear", geometry), bench("linear", geometry)
    ours_step = SeedOptimizer(ours.lattice, **options)
    theirs_step = of_torch(theirs.lattice.parameters())
    for group in (ours_step.param_groups[0], theirs_step.param_groups[0]):
        # the guard corrects the moments of a late seed, and not the eps added to them
        group["eps"] = 1e-15
    identity = [t.data_ptr() for t in rows_of(ours.layer, ours_step)]
    for actions in ours.story:
        ours.tell(actions)
        theirs.tell(actions)
        for _ in range(7):
            ours.model.zero_grad()
            ours.loss().backward()
            for mine, other in zip(ours.layer.pool(), theirs.layer.pool(), strict=True):
                other.grad = None if mine.grad is None else mine.grad.clone()
            with implementation():
                ours_step.step()
            theirs_step.step()
        for mine, wanted in zip(ours.layer.pool(), theirs.layer.pool(), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
        for name in ("alpha", "progress", "ramped_steps", "fresh"):
            mine, wanted = getattr(ours.layer, name), getattr(theirs.layer, name)
            assert torch.equal(mine, wanted), name
    assert ours.layer.steps == theirs.layer.steps == 7 * len(ours.story)
    assert ours_step.steps(ours.layer).tolist() == [7 * len(ours.story)]
    assert not ours.layer.starved
    # nothing was rebuilt
    assert [t.data_ptr() for t in rows_of(ours.layer, ours_step)] == identity
    assert [s.stage for s in ours.layer.states()[:3]] == [
        Stage.FOSSILIZED, Stage.STABILIZATION, Stage.DORMANT
    ]  # fmt: skip


@pytest.mark.parametrize(
    "asleep",
    [s for s in Stage if s not in (Stage.TRAINING, Stage.GRAFTING, Stage.FINE_TUNING)],
)
def test_weights_and_hot_moments_of_every_still_stage_stay(bench, geometry, kind_of, asleep):
    b = bench("linear", geometry)
    b.lead(0, Stage.FINE_TUNING)
    b.lead(1, Stage.FINE_TUNING)
    optimizer = SeedOptimizer(b.lattice, **kind_of[0])
    train(b, optimizer, 5)
    states = b.layer.states()
    b.layer.write_states([states[0], SeedState(asleep, states[1].blueprint_id), *states[2:]])
    before = [t.clone() for t in rows_of(b.layer, optimizer)]
    train(b, optimizer, 5)
    for old, new in zip(before, rows_of(b.layer, optimizer), strict=True):
        assert torch.equal(old[1:], new[1:])
        assert not torch.equal(old[0], new[0])


def test_the_guard_copies_nothing(bench, monkeypatch):
    b = bench("linear", "chunk")
    b.lead(0, Stage.FINE_TUNING)
    optimizer = SeedOptimizer(b.lattice)
    train(b, optimizer, 1)

    def fail(*args, **kwargs):
        raise AssertionError("cloned")

    monkeypatch.setattr(torch.Tensor, "clone", fail)
    optimizer.step()
    assert b.layer.steps == 2


def test_a_seed_woken_late_is_corrected_for_its_own_age(bench):
    b = bench("linear", "chunk")
    b.lead(0, Stage.FINE_TUNING)
    optimizer = SeedOptimizer(b.lattice, lr=0.1)
    train(b, optimizer, 30)
    b.tell([Germinate("", 1, "mlp_gelu"), Promote("", 1)])
    assert not b.layer.w_out[1].any()
    train(b, optimizer, 1)
    # from 0, and the first step of Adam is the rate, whatever the gradient
    moved = b.layer.w_out.detach()[1].abs()
    assert b.layer.w_out.grad[1].abs().min() > 1e-5
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-3, atol=0)


def test_each_seed_has_its_own_rate(bench, kind_of):
    wanted, b = bench("linear", "chunk"), bench("linear", "chunk")
    rates = torch.tensor([0.5, 2.0, 0.0, 1.0])
    optimizer = SeedOptimizer(b.lattice, **kind_of[0])
    optimizer.lr_scale(b.layer).copy_(rates)
    # one optimizer for each rate
    whole = {
        rate: SeedOptimizer(wanted.lattice, **{**kind_of[0], "lr": kind_of[0]["lr"] * rate})
        for rate in rates.tolist()
    }
    generator = torch.Generator().manual_seed(0)
    for layer in (b.layer, wanted.layer):
        layer.write_states([SeedState(Stage.FINE_TUNING, 2)] * 4)
    start = [torch.randn(p.shape, generator=generator) for p in b.layer.pool()]
    for p, value in zip(b.layer.pool(), start, strict=True):
        p.detach().copy_(value)
        p.grad = torch.ones_like(p)
    optimizer.step()
    for seed, rate in enumerate(rates.tolist()):
        for p, value in zip(wanted.layer.pool(), start, strict=True):
            p.detach().copy_(value)
            p.grad = torch.ones_like(p)
        whole[rate].step()
        for p, q in zip(b.layer.pool(), wanted.layer.pool(), strict=True):
            torch.testing.assert_close(p[seed], q[seed])


def test_sites_may_have_their_own_groups_and_schedules_of_torch_work():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    lattice = attach(model, "0", 4)
    attach(model, "2", 2)
    groups = [
        {"params": lattice.layer("0").pool(), "lr": 0.1},
        {"params": lattice.layer("2").pool(), "weight_decay": 0.0},
    ]
    for lr in (0.2, torch.tensor(0.2)):
        optimizer = SeedOptimizer(groups, lr=lr)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
        seen = []
        for _ in range(3):
            seen += [[float(g["lr"]) for g in optimizer.param_groups]]
            optimizer.step()
            warmup.step()
        torch.testing.assert_close(torch.tensor(seen).T, torch.tensor(
            [[0.05, 0.075, 0.1], [0.1, 0.15, 0.2]]))  # fmt: skip
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        SeedOptimizer(lattice, kind="sgd", momentum=0.9), max_lr=0.1, total_steps=10
    )
    cycle.optimizer.step()
    cycle.step()
    assert cycle.optimizer.param_groups[0]["momentum"] != 0.9


def test_a_rate_in_a_tensor_is_read_at_each_step(bench):
    a, b = bench("linear", "chunk"), bench("linear", "chunk")
    lr = torch.tensor(0.01)
    optimizers = [SeedOptimizer(a.lattice, lr=0.01), SeedOptimizer(b.lattice, lr=lr)]
    for each, optimizer in zip((a, b), optimizers, strict=True):
        each.lead(0, Stage.FINE_TUNING)
        train(each, optimizer, 2)
    optimizers[0].param_groups[0]["lr"] = 0.5
    lr.fill_(0.5)
    for each, optimizer in zip((a, b), optimizers, strict=True):
        train(each, optimizer, 2)
    for p, q in zip(a.layer.pool(), b.layer.pool(), strict=True):
        torch.testing.assert_close(p, q)


def test_its_state_continues_bit_for_bit_and_in_place(bench, kind_of):
    b = bench("linear", "chunk")
    optimizer = SeedOptimizer(b.lattice, **{**kind_of[0], "lr": torch.tensor(0.01)})
    optimizer.lr_scale(b.layer)[0] = 0.5
    b.lead(0, Stage.FINE_TUNING)
    train(b, optimizer, 5)
    saved = copy.deepcopy((b.model.state_dict(), optimizer.state_dict()))
    json.dumps(saved[1]["param_groups"])
    train(b, optimizer, 5)
    wanted = [t.clone() for t in rows_of(b.layer, optimizer)]
    pointers = [v.data_ptr() for s in optimizer.state.values() for v in s.values()]
    lr = optimizer.param_groups[0]["lr"]
    lr.fill_(7.0)
    b.model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert [v.data_ptr() for s in optimizer.state.values() for v in s.values()] == pointers
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.01)
    assert optimizer.steps(b.layer).dtype == torch.int32
    train(b, optimizer, 5)
    assert all(map(torch.equal, rows_of(b.layer, optimizer), wanted))

    fresh = SeedOptimizer(b.lattice, **kind_of[0])
    b.model.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    assert fresh.param_groups[0]["lr"] == pytest.approx(0.01)
    train(b, fresh, 5)
    assert all(map(torch.equal, rows_of(b.layer, fresh), wanted))


def test_a_checkpoint_holds_it(tmp_path, bench):
    b = bench("linear", "chunk")
    optimizer = SeedOptimizer(b.lattice, lr=0.02)
    optimizer.lr_scale(b.layer)[1] = 3.0
    b.lead(0, Stage.FINE_TUNING)
    train(b, optimizer, 5)
    esper.save(tmp_path, b.model, b.lattice, optimizer=optimizer)
    train(b, optimizer, 5)

    again = bench("linear", "chunk")
    other = SeedOptimizer(again.lattice)
    esper.load(tmp_path, again.model, optimizer=other)
    assert other.param_groups[0]["lr"] == 0.02
    assert other.lr_scale(again.layer).tolist() == [1, 3, 1, 1]
    train(again, other, 5)
    for p, q in zip(rows_of(b.layer, optimizer), rows_of(again.layer, other), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(optimizer.steps(b.layer), other.steps(again.layer))


def test_a_young_rate_that_it_does_not_heed_is_refused(bench):
    b = bench("linear", "chunk")
    b.layer.young_rate = 2.0
    with pytest.raises(ValueError, match=r"young_rate must be 1 with a SeedOptimizer, but got 2"):
        train(b, SeedOptimizer(b.lattice), 1)


def test_state_of_other_pools_is_refused_and_nothing_changed(bench):
    b = bench("linear", "chunk")
    optimizer = SeedOptimizer(b.lattice)
    for other in (
        SeedOptimizer(bench("linear", "chunk", seeds_per_layer=2).lattice),
        SeedOptimizer(b.lattice, kind="sgd"),
    ):
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="state must be that of the same pools and kind"):
            optimizer.load_state_dict(other.state_dict())
        assert str(before) == str(optimizer.state_dict())


def test_copies_and_pickles_with_the_model_go_on(bench):
    b = bench("linear", "chunk")
    b.lead(0, Stage.FINE_TUNING)
    optimizer = SeedOptimizer(b.lattice)
    train(b, optimizer, 2)
    for again in (copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        model, other = again((b.model, optimizer))
        layer = next(m for m in model.modules() if isinstance(m, KasminaLayer))
        twin = copy.copy(b)
        twin.model, twin.layer = model, layer
        train(twin, other, 3)
        assert layer.steps == 5
        assert not torch.equal(layer.w_in, b.layer.w_in)
    assert b.layer.steps == 2


def test_it_follows_the_model_to_another_dtype_and_device(bench):
    """Half-precision hosts keep fp32 pools; fp64 ones are made with fp64 moments."""
    b = bench("linear", "chunk")
    b.lead(0, Stage.FINE_TUNING)
    optimizer = SeedOptimizer(b.lattice)
    b.model.bfloat16()
    b.x, b.target = b.x.bfloat16(), b.target.bfloat16()
    train(b, optimizer, 2)
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {
        torch.float32, torch.int32
    }  # fmt: skip
    if torch.cuda.is_available():
        b.model.cuda()
        b.x, b.target = b.x.cuda(), b.target.cuda()
        train(b, optimizer, 2)
        assert {v.device.type for s in optimizer.state.values() for v in s.values()} == {"cuda"}


def test_a_closure_is_called_with_gradients(bench):
    b = bench("linear", "chunk")
    b.lead(0, Stage.FINE_TUNING)
    optimizer = SeedOptimizer(b.lattice)
    before = b.layer.w_in.detach().clone()

    def closure():
        b.model.zero_grad()
        loss = b.loss()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert not torch.equal(before[0], b.layer.w_in[0])


def test_without_gradients_the_grafts_move_and_no_weight(bench):
    b = bench("linear", "chunk")
    b.lead(0, Stage.GRAFTING)
    optimizer = SeedOptimizer(b.lattice)
    train(b, optimizer, 1)
    before = [t.clone() for t in rows_of(b.layer, optimizer)]
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, before, rows_of(b.layer, optimizer)))
    assert float(b.layer.alpha[0]) == pytest.approx(0.2)


def test_an_optimizer_that_outlives_its_lattice_has_nothing_to_do(bench):
    b = bench("linear", "chunk")
    optimizer = SeedOptimizer(b.lattice)
    pool = [weights.fill_(1.0) for weights in map(torch.Tensor.detach, b.layer.pool())]
    b.lattice.detach()
    del b.layer
    optimizer.zero_grad()
    optimizer.step()
    assert all((weights == 1).all() for weights in pool)


def test_parameters_that_were_replaced_are_found_out(bench):
    b = bench("linear", "chunk")
    optimizer = SeedOptimizer(b.lattice)
    old = b.layer.w_in
    b.layer.w_in = nn.Parameter(old.detach().clone())
    old.grad = torch.ones_like(old)
    with pytest.raises(ValueError, match=r"must be pools of a lattice.*after what replaces"):
        optimizer.step()


def test_a_pool_that_two_optimizers_move_in_turns_is_found_out(bench):
    b = bench("linear", "chunk")
    b.lead(0, Stage.FINE_TUNING)
    optimizers = [torch.optim.AdamW(b.model.parameters()), SeedOptimizer(b.lattice)]

    def steps(number):
        for _ in range(number):
            b.loss().backward()
            for optimizer in optimizers:
                optimizer.step()

    steps(1)
    with pytest.raises(ValueError, match=r"take turns; give lattice\.host_parameters"):
        steps(1)
    # one after the other is fine
    other = SeedOptimizer(b.lattice)
    train(b, other, 2)
    train(b, optimizers[0], 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "lion"}, r"kind must be one of \('adamw', 'sgd'\), but got 'lion'"),
        ({"lr": -1.0}, "lr must be at least 0, but got -1"),
        ({"lr": torch.ones(3)}, r"lr must be one number, but got shape \(3,\); use lr_scale"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0, but got nan"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be at least 0 and less than 1, but got \(0.9, 1.0\)"),
        ({"kind": "sgd", "momentum": -0.1}, "momentum must be at least 0"),
    ],
)
def test_bad_numbers_are_refused(bench, options, match):
    with pytest.raises(ValueError, match=match):
        SeedOptimizer(bench("linear", "chunk").lattice, **options)


def test_parameters_other_than_whole_pools_are_refused(bench):
    b = bench("linear", "chunk")
    with pytest.raises(ValueError, match=r"6 of 9 are not; give lattice\.host_parameters"):
        SeedOptimizer(b.model.parameters())
    with pytest.raises(ValueError, match=r"whole pools, w_in, bias and w_out in one group"):
        SeedOptimizer([b.layer.w_in, b.layer.w_out])
    with pytest.raises(ValueError, match="whole pools"):
        SeedOptimizer([{"params": [p]} for p in b.layer.pool()])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("ours", [True, False], ids=["seed optimizer", "guarded AdamW"])
def test_a_captured_step_lives_through_a_whole_lifecycle(ours):
    """Gradients are given, so that the optimizer alone is captured; an eager twin must agree."""
    layers = [KasminaLayer(64, 16, hidden=4, device="cuda") for _ in range(2)]
    optimizers = []
    for layer in layers:
        lr = torch.tensor(0.01, device="cuda")
        make = SeedOptimizer if ours else torch.optim.AdamW
        options = {} if ours else {"capturable": True}
        optimizers.append(make(layer.parameters(), lr=lr, **options))
        layer.ramp_steps = 5
        for p in layer.pool():
            p.grad = torch.zeros_like(p)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for optimizer in optimizers:
            optimizer.step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            optimizers[0].step()
        for stage in (Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZATION,
                      Stage.EVALUATING, Stage.FINE_TUNING, Stage.FOSSILIZED):  # fmt: skip
            for layer, optimizer in zip(layers, optimizers, strict=True):
                states = layer.states()
                for seed in range(0, 16, 3):
                    states[seed] = SeedState(stage, 2)
                layer.write_states(states)
                seeds = range(0, 16, 3)
                layer.on_enter(seeds, stage, None)
                if stage is Stage.GERMINATED:
                    drawn = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
                    layer.initialise(drawn, outgoing=True)
                optimizer.param_groups[0]["lr"].fill_(0.01 * (1 + int(stage)))
            for step in range(6):
                for layer in layers:
                    for p in layer.pool():
                        p.grad.copy_(torch.sin(p.detach() * (step + 1)))
                graph.replay()
                optimizers[1].step()
            assert layers[0].steps == layers[1].steps
            buffers = [dict(layer.named_buffers()) for layer in layers]
            for named in buffers:
                named.pop("replayed_steps")
            torch.testing.assert_close(*buffers, rtol=0, atol=0, equal_nan=True)
            for p, q in zip(layers[0].pool(), layers[1].pool(), strict=True):
                assert torch.equal(p, q), stage
        assert layers[0].state[:, BLUEPRINT].sum() == 12


@needs_gpu
@pytest.mark.parametrize("ours", [True, False], ids=["seed optimizer", "guarded AdamW"])
def test_a_step_never_waits_for_the_device(ours):
    layer = KasminaLayer(64, 16, hidden=4, device="cuda")
    make = SeedOptimizer if ours else torch.optim.AdamW
    optimizer = make(layer.parameters(), **({} if ours else {"capturable": True}))
    layer.write_states([SeedState(Stage.GRAFTING, 2)] * 16)
    layer.fresh[:, 3] = layer.any_fresh = True
    for p in layer.pool():
        p.grad = torch.ones_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor on the CPU"])
def test_a_schedule_that_a_captured_step_would_not_see_is_refused(bench, monkeypatch, lr):
    b = bench("linear", "chunk")
    optimizer = SeedOptimizer(b.lattice, lr=lr)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    # what a capture would begin with
    monkeypatch.setattr("esper.seeds.optimizer_guard.is_capturing", lambda layer: True)
    with pytest.raises(ValueError, match="lr must be a tensor on the GPU for a schedule to act"):
        optimizer.step()


def test_a_plain_training_loop_with_two_optimizers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    lattice = attach(model, "0", 4, growth=GrowthConfig(ramp_steps=10))
    host = torch.optim.AdamW(lattice.host_parameters())
    seeds = SeedOptimizer(lattice)
    x, y = torch.randn(64, 4), torch.randn(64, 2)
    for step in range(60):
        host.zero_grad()
        seeds.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        host.step()
        seeds.step()
        if step % 10 == 9:
            lattice.report(float(loss.detach()))
            stage = lattice.layer("0").states()[2].stage
            kind = {Stage.DORMANT: Germinate, Stage.GERMINATED: Promote}.get(stage, Advance)
            lattice.apply([kind("0", 2, *(["mlp_gelu"] if kind is Germinate else []))])
    assert lattice.layer("0").states()[2].stage is Stage.FINE_TUNING
    assert lattice.layer("0").alpha.tolist() == [0, 0, 1, 0]
    assert lattice.steps == 60
