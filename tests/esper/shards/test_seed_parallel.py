"""Shards that share one model's seeds: they decide and lose as one does, and send no more."""

import dataclasses
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from torch import nn

from esper.config.run import SiteConfig
from esper.config.shards import ShardsConfig
from esper.seeds.actions import Advance, Germinate, Promote
from esper.seeds.kasmina import KasminaLayer
from esper.shards import group as group_module
from esper.shards.errors import ReplicasDifferError
from esper.shards.group import ShardGroup, groups
from esper.shards.seed_parallel import split_sites
from esper.shards.shard import KasminaShard, ShardSpec
from esper.supervision import run_through
from esper.trial import Trial

HIDDEN = {"host": {"name": "mlp", "options": {"hidden": [8, 8, 8]}},
          "lattice": [{"sites": "fc1", "seeds_per_layer": 4, "hidden": 4},
                      {"sites": "fc3", "seeds_per_layer": 8}]}  # fmt: skip
# gates and places as in a real run
NORMAL = {
    "growth": {"ramp_steps": 8, "fine_tuning_intervals": 3, "embargo_intervals": 1,
               "measured_samples": 64, "initialisation": "matched"},
    "controller": {"name": "tamiyo", "options": {
        "score": "bottleneck", "patience_intervals": 1, "min_improvement_frac": 0.2}},
}  # fmt: skip
TWO = ShardsConfig(count=2, parallel="seed", timeout_s=60.0)

on_ray = pytest.mark.usefixtures("cluster")


@on_ray
@pytest.mark.parametrize(("count", "changes"), [
    (2, {}),
    pytest.param(4, {}, marks=pytest.mark.slow),
    pytest.param(2, NORMAL, marks=pytest.mark.slow),
    pytest.param(4, NORMAL, marks=pytest.mark.slow),
])  # fmt: skip
def test_shards_of_seeds_decide_as_one_shard_does_and_lose_alike(
    make_config, spec, count, changes, finished, steps
):
    """Seeds that learn alone included: each has its objective where it is computed."""
    config = make_config(**HIDDEN | changes)
    one = finished(Trial(config, spec))
    assert len(steps(one)) > 10
    stages = {s for t in one.transitions for s in (t.before, t.after)}
    assert {"TRAINING", "GRAFTING", "EVALUATING", "FINE_TUNING"} <= stages
    many = finished(Trial(config, spec, shards=groups(TWO.model_copy(update={"count": count}))))
    assert steps(many) == steps(one)
    for name in ("train_loss", "held_out_loss", "grad_norm", "new_seed_grad_ratio"):
        wanted = pytest.approx(one.curves[name], rel=1e-3, nan_ok=True)
        assert many.curves[name] == wanted, name
    for name in ("parameters", "active_seeds"):
        assert many.curves[name] == one.curves[name]
    # all Linears of this host are split, so that no step computes anything twice; where growing
    # measures, every shard has all that was measured
    spent = [r.metrics["train_flops"] - r.metrics["growth_flops"] for r in (many, one)]
    assert spent[0] == spent[1]


@pytest.fixture(scope="module")
def pair(cluster, make_config):
    """Two shards with seeds of all kinds, on both of them."""
    config = make_config(**HIDDEN)
    group = ShardGroup(ShardSpec(config, 3), TWO)
    wake = [Germinate("fc1", seed, "mlp_relu", "linear", "") for seed in range(4)]
    group.apply(wake)
    group.apply([Promote("fc1", seed, "") for seed in (0, 1, 3)])
    group.run_interval(4)
    group.apply([Advance("fc1", seed, "") for seed in (0, 3)])
    group.run_interval(4)
    yield group, config
    group.close()


def in_each(group, function):
    """What a function of its shard returns, of each at the same time."""
    calls = [actor.__ray_call__.remote(function) for actor in group._actors]
    return ray.get(calls, timeout=60)


def test_a_step_sends_what_the_host_alone_sends(pair):
    def count(actor):
        from torch.distributed.tensor.debug import CommDebugMode

        trainer = actor._shard.trainer
        # a part of the seeds, and the whole table of their stages
        layer = trainer.lattice.layer("fc1")
        shapes = tuple(layer.w_in.to_local().shape), tuple(layer.state.shape)

        def sent():
            found = []
            for _ in range(5):
                with CommDebugMode() as mode:
                    trainer._step(0)
                found.append({str(op): n for op, n in mode.get_comm_counts().items()})
            return found

        state = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        with_seeds = sent()
        hooks = [
            (trainer.model.get_submodule(a.site.last)._forward_hooks, a.hooks[0].id)
            for a in trainer.lattice.attached.values()
        ]
        taken = [(hooks_of, at, hooks_of.pop(at)) for hooks_of, at in hooks]
        without = sent()
        for hooks_of, at, hook in taken:
            hooks_of[at] = hook
        trainer.model.load_state_dict(state)
        return with_seeds, without, shapes

    group, _ = pair
    for with_seeds, without, shapes in in_each(group, count):
        assert with_seeds == without
        # two blocks: each its sum forward, and the second, which has layers below, one backward
        assert [sum(counts.values()) for counts in without] == [3] * 5
        assert shapes == ((2, 2, 4), (4, 4))


def test_a_checkpoint_of_shards_is_one_of_a_single_process(pair, tmp_path):
    """And the reports of both tell of all seeds, in order."""
    group, config = pair
    group.checkpoint(tmp_path / "state", {})
    health, losses = group.health(), group.evaluate("held_out")
    here = KasminaShard(ShardSpec(config, 3))
    here.restore(tmp_path / "state")
    ours = here.health()
    assert (ours.interval, ours.step, ours.stages) == (health.interval, health.step, health.stages)
    assert here.evaluate("held_out") == pytest.approx(losses, rel=1e-5)
    # and back, whatever was trained since
    group.run_interval(8)
    group.restore(tmp_path / "state")
    assert group.evaluate("held_out") == losses
    wanted, report = here.run_interval(4), group.run_interval(4)
    assert report.loss == pytest.approx(wanted.loss, rel=1e-5)
    for site, alone in zip(report.sites, wanted.sites, strict=True):
        for field in dataclasses.fields(alone):
            values = getattr(alone, field.name)
            if isinstance(values, np.ndarray):
                told = pytest.approx(values, rel=1e-3, abs=1e-6, nan_ok=True)
                assert getattr(site, field.name) == told, field.name
    site = report.site("fc1")
    # seed 1 learns alone, on the first shard; seeds 0 and 3 on the task, one on each
    assert [math.isnan(v) for v in site.explained_frac] == [True, False, True, True]
    assert [math.isnan(v) for v in site.grad_ratio] == [False, True, True, False]
    assert group.diverged() == []
    group.save(tmp_path / "model")
    assert (tmp_path / "model" / "manifest.json").exists()


@on_ray
@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSTOP])
def test_a_trial_that_loses_a_shard_is_the_undisturbed_one(
    make_config, spec, without_times, tmp_path, signal_, finished
):
    """Bit for bit, rollbacks' states and moments of split weights included."""
    shards = groups(TWO.model_copy(update={"timeout_s": 60.0 if signal_ == 9 else 25.0}))
    whole = finished(Trial(make_config(**HIDDEN), spec, shards=groups(TWO)))
    lost = []

    def disturb(trial):
        if not lost and len(trial.curves["step"]) == 12:
            os.kill(trial.shard.pids[1], signal_)

    again, record = run_through(
        Trial(make_config(**HIDDEN), spec, shards=shards),
        tmp_path, every=5, retries=1, on_interval=disturb, on_lost=lost.append,
    )  # fmt: skip
    again.shard.close()
    assert without_times(record) == without_times(whole)
    assert len(lost) == 1


@on_ray
@pytest.mark.slow
def test_a_table_of_stages_that_differs_is_named(make_config):
    group = ShardGroup(ShardSpec(make_config(**HIDDEN), 3), TWO)
    group.run_interval()
    group.health()

    def stray(actor):
        actor._shard.trainer.lattice.layer("fc1").state[0, 0] = 1

    # a seed of the first shard, in the table of the second
    ray.get(group._actors[1].__ray_call__.remote(stray))
    with pytest.raises(ReplicasDifferError, match="shard 1 differ from shard 0") as caught:
        group.health()
    assert "fc1.kasmina.state" in caught.value.tensors
    group.close()


def block(dropout):
    # its samples are the positions of one sequence, and its outputs more than there are digits
    arguments = {"d_model": 64, "nhead": 4, "dim_feedforward": 8, "dropout": dropout}
    path = "torch.nn:TransformerEncoderLayer"
    return {"task": {"name": "digits"},
            "host": {"name": "factory", "options": {"path": path, "arguments": arguments}},
            "lattice": [{"sites": "linear1", "seeds_per_layer": 4}]}  # fmt: skip


@on_ray
@pytest.mark.slow
def test_a_block_of_a_transformer_is_split_unless_numbers_are_drawn_in_it(make_config):
    config = make_config(**block(0.0))
    alone, pair = KasminaShard(ShardSpec(config, 3)), ShardGroup(ShardSpec(config, 3), TWO)
    for _ in range(2):
        assert pair.run_interval().loss == pytest.approx(alone.run_interval().loss, rel=1e-4)
        assert pair.evaluate("test") == pytest.approx(alone.evaluate("test"), rel=1e-4)
    pair.close()
    with pytest.raises(ValueError, match=r"'linear1' and 'linear2' are split .* no norm, dropout"):
        ShardGroup(ShardSpec(make_config(**block(0.1)), 3), TWO)


@pytest.mark.parametrize(("site", "what"), [
    ({"sites": "0->2", "geometry": "span"}, "'0->2' is a span, whose units learn from sums"),
    ({"sites": "1", "channels": 8}, "'1' is a ReLU; choose the first Linear of a block"),
    ({"sites": "4"}, "'4' is a Linear without one"),
    ({"sites": "*"}, "'1' is a ReLU"),
])  # fmt: skip
def test_sites_that_shards_cannot_share_are_refused(site, what):
    host = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=what):
        split_sites(host, (SiteConfig(seeds_per_layer=4, **site),))


def test_a_linear_is_split_one_way_alone():
    host = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    sites = tuple(SiteConfig(sites=name, seeds_per_layer=4) for name in "01")
    assert split_sites(host, sites[:1]) == {"0": "1"}
    with pytest.raises(ValueError, match="'1' is one and takes in what another gives"):
        split_sites(host, sites)


def test_seeds_are_shared_in_equal_parts():
    layer = KasminaLayer(8, 4)
    with pytest.raises(ValueError, match="a multiple of the 3 shards that share them, but got 4"):
        layer.share(SimpleNamespace(size=lambda: 3))


def test_fewer_shards_share_the_seeds_in_equal_parts_too(make_config):
    spec = ShardSpec(make_config(**HIDDEN), 3)
    counts = [group_module._fewer(spec, TWO, count) for count in (4, 3, 2, 1)]
    assert counts == [2, 2, 1, 0]
