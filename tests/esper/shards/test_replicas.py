"""Several shards train one model: the same decisions, the same losses within rounding."""

import math
import os
import signal
from functools import partial

import pytest
import ray

from esper.config.shards import ShardsConfig
from esper.seeds.actions import Cancel, Germinate, Promote
from esper.shards.errors import ReplicasDifferError
from esper.shards.group import ShardGroup, groups
from esper.shards.replica import Replica, ReplicaTrainer
from esper.shards.shard import KasminaShard, ShardSpec
from esper.supervision import run_through
from esper.trial import Trial

pytestmark = pytest.mark.usefixtures("cluster")


# a message for next to every tensor, and one for all of them
MANY, ONE = 1e-4, 25.0


@pytest.mark.parametrize(
    ("count", "bucket_mib"),
    [(2, MANY), pytest.param(2, ONE, marks=pytest.mark.slow),
     pytest.param(4, MANY, marks=pytest.mark.slow)],
)  # fmt: skip
def test_several_shards_decide_as_one_does_and_lose_alike(
    make_config, spec, count, bucket_mib, finished, steps
):
    """Seeds that learn alone included, whose objective is no mean over the batch."""
    config = make_config()
    one = finished(Trial(config, spec))
    assert len(steps(one)) > 20
    assert "TRAINING" in {t.after for t in one.transitions}
    options = ShardsConfig(count=count, bucket_mib=bucket_mib)
    many = finished(Trial(config, spec, shards=groups(options)))
    assert steps(many) == steps(one)
    for name in ("train_loss", "held_out_loss", "grad_norm"):
        assert many.curves[name] == pytest.approx(one.curves[name], rel=1e-3), name
    for name in ("train_loss", "test_loss"):
        assert many.metrics[name] == pytest.approx(one.metrics[name], rel=1e-3), name
    # counted over all of them
    assert many.metrics["train_flops"] == pytest.approx(one.metrics["train_flops"], rel=0.05)


def test_telemetry_is_that_of_the_whole_batch(make_config):
    config = make_config()
    alone, group = (
        make(ShardSpec(config, 3))
        for make in (KasminaShard, partial(ShardGroup, config=ShardsConfig(count=2)))
    )
    ours, theirs = (shard.run_interval() for shard in (alone, group))
    group.close()
    for a, b in zip(ours.sites, theirs.sites, strict=True):
        for name in ("grad_energy", "variance", "dead_frac"):
            assert getattr(b, name) == pytest.approx(getattr(a, name), rel=1e-4), name
            assert not any(map(math.isnan, getattr(b, name)))
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5)


class Recording(Replica):
    """A replica without others, that remembers how many numbers it would have sent."""

    def mean(self, tensor):
        SENT.append(tensor.numel())
        return tensor

    def start_sum(self, tensor):
        SENT.append(tensor.numel())
        return self

    def wait(self):
        """The sum is there."""


SENT = []
BUCKET = 2**20


def test_only_seeds_that_learn_send_gradients(make_config):
    spec = ShardSpec(make_config(), 3)
    trainer = partial(ReplicaTrainer, replica=Recording(0, 1, "tcp://127.0.0.1:1", 1.0, BUCKET))
    ours, plain = KasminaShard(spec, trainer), KasminaShard(spec)
    host = ours.health().host_parameters
    for actions, seeds in [
        ([Germinate("fc1", 2, "mlp_relu", "linear", "")], 0),
        ([Promote("fc1", 2, "")], 1),
        ([Cancel("fc1", 2, "")], 0),
    ]:
        for shard in (ours, plain):
            shard.apply(actions)
            SENT.clear()
            shard.run_interval(1)
            if shard is ours:
                # chunks of 2 channels with 4 hidden units; one that learns alone has two sums more,
                # and the sum of its target's squares
                assert SENT[: 1 + 2 * seeds] == seeds * [2, 1] + [
                    host + seeds * (2 * 4 + 4 + 4 * 2)
                ]
        assert ours.digest() == plain.digest()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("objective", ["desired_update", "reconstruction"])
def test_gates_on_the_explained_share_open_alike(
    make_config, spec, count, objective, finished, steps
):
    """A gate that hangs on a threshold, over 30 intervals of two spirals."""
    growth = {
        "ramp_steps": 8,
        "fine_tuning_intervals": 3,
        "embargo_intervals": 1,
        "min_explained_frac": 0.05,
        "patience_intervals": 3,
        "objective": objective,
    }
    train = {"steps": 300, "batch_size": 40, "interval_steps": 10, "learning_rate": 0.01}
    config = make_config(growth=growth, train=train)
    one = finished(Trial(config, spec))
    assert {"TRAINING", "CULLED"} <= {t.after for t in one.transitions}
    many = finished(Trial(config, spec, shards=groups(ShardsConfig(count=count))))
    assert steps(many) == steps(one)
    assert many.curves["train_loss"] == pytest.approx(one.curves["train_loss"], rel=1e-3)


@pytest.mark.slow
def test_a_trial_that_loses_one_of_its_shards_is_the_undisturbed_one(
    make_config, spec, without_times, tmp_path, finished
):
    shards = groups(ShardsConfig(count=2, timeout_s=60.0, bucket_mib=MANY))
    whole = finished(Trial(make_config(), spec, shards=shards))
    lost = []

    def disturb(trial):
        if not lost and len(trial.curves["step"]) == 12:
            os.kill(trial.shard.pids[1], signal.SIGKILL)

    again, record = run_through(
        Trial(make_config(), spec, shards=shards),
        tmp_path, every=5, retries=1, on_interval=disturb, on_lost=lost.append,
    )  # fmt: skip
    again.shard.close()
    assert without_times(record) == without_times(whole)
    assert [error.ranks for error in lost] == [(1,)]


def test_replicas_that_are_not_equal_are_named(make_config):
    group = ShardGroup(ShardSpec(make_config(), 3), ShardsConfig(count=2))
    group.run_interval()
    group.health()
    wake = Germinate("fc1", 1, "mlp_relu", "linear", "to one of them alone")
    ray.get(group._actors[1].call.remote("apply", [wake]))
    with pytest.raises(ReplicasDifferError, match="shard 1 differ from shard 0") as caught:
        group.health()
    assert caught.value.ranks == (1,)
    assert "fc1.kasmina.state" in caught.value.tensors
    group.close()


NORM = {"name": "factory", "options": {
    "path": "torch.nn:BatchNorm1d", "arguments": {"num_features": 2}}}  # fmt: skip


@pytest.mark.parametrize(("count", "changes", "what"), [
    (3, {}, "batch_size must be a multiple of the 3 shards, but got 40"),
    (2, {"host": NORM, "lattice": []}, "is a BatchNorm1d; use LayerNorm"),
])  # fmt: skip
def test_what_cannot_be_cut_into_parts_is_refused(make_config, count, changes, what):
    trainer = partial(ReplicaTrainer, replica=Replica(0, count, "tcp://127.0.0.1:1", 1.0, BUCKET))
    with pytest.raises(ValueError, match=what):
        KasminaShard(ShardSpec(make_config(**changes), 3), trainer)
