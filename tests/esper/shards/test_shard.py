"""The shard as a plain class: no Ray, no controller."""

import pytest
import torch

from esper.config.base import ConfigError
from esper.seeds.actions import Germinate
from esper.seeds.lifecycle import IllegalTransitionError
from esper.shards.shard import KasminaShard, ShardSpec
from esper.surgery.checkpoint_folder import CheckpointError, read_manifest
from esper.surgery.files import load
from esper.training.hosts import Mlp
from esper.training.trainer import CollapseError

WAKE = Germinate("fc1", 1, "mlp_relu", "linear", "test")


def weights(shard):
    return {k: v.clone() for k, v in shard.trainer.model.state_dict().items()}


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(v.nan_to_num(), other[k].nan_to_num()) for k, v in one.items())


@pytest.fixture
def shard(make_config):
    return KasminaShard(ShardSpec(make_config(), 3))


def test_a_shard_trains_grows_and_says_where_it_stands(shard):
    before = shard.health()
    assert (before.step, before.interval, before.stages, before.active_seeds) == (0, 0, {}, 0)
    assert before.seeds == {"fc1": 4, "fc1->out": 4}
    report = shard.run_interval()
    assert (report.step, report.interval) == (10, 1)
    (moved,) = shard.apply([WAKE])
    after = shard.health()
    assert shard.log() == [moved]
    assert (after.step, after.interval, after.stages) == (10, 1, {"GERMINATED": 1})
    assert before.parameters == before.host_parameters == after.host_parameters == 42
    assert (after.active_seeds, after.parameters) == (1, 42 + 4 * (2 + 1 + 2))
    assert after.cost.flops > 0
    assert set(shard.evaluate("train", "test")) == {
        "train_loss", "train_accuracy", "test_loss", "test_accuracy"}  # fmt: skip


def test_an_illegal_action_changes_nothing(shard):
    shard.run_interval(3)
    health, now = shard.health(), weights(shard)
    with pytest.raises(IllegalTransitionError):
        shard.apply([WAKE, WAKE])
    assert shard.health() == health
    assert equal(weights(shard), now)


def test_a_restored_shard_goes_on_bit_for_bit(make_config, shard, tmp_path):
    shard.run_interval()
    shard.apply([WAKE])
    shard.checkpoint(tmp_path, {"mine": {"is": "kept"}})
    expected = [shard.run_interval().loss for _ in range(3)]
    other = KasminaShard(ShardSpec(make_config(), 3))
    torch.manual_seed(99)
    other.restore(tmp_path)
    assert [other.run_interval().loss for _ in range(3)] == expected
    assert equal(weights(other), weights(shard))
    assert other.health() == shard.health()
    assert read_manifest(tmp_path)["mine"] == {"is": "kept"}
    with pytest.raises(CheckpointError, match="with the data it was made with"):
        KasminaShard(ShardSpec(make_config(), 4)).restore(tmp_path)


def test_what_is_saved_loads_without_a_shard(shard, tmp_path):
    shard.run_interval()
    shard.save(tmp_path)
    host = Mlp(hidden=(8,)).build(shard.trainer.data)
    load(tmp_path, host)
    assert equal(host.state_dict(), weights(shard))


def test_a_shard_says_what_does_not_fit(make_config):
    with pytest.raises(ConfigError, match=r"task\.name"):
        KasminaShard(ShardSpec(make_config(task={"name": "nothing"}), 3))
    with pytest.raises(ConfigError, match="device must be usable on this machine"):
        KasminaShard(ShardSpec(make_config(device="cuda:77"), 3))
    train = {"steps": 200, "batch_size": 400, "interval_steps": 10}
    with pytest.raises(ValueError, match="batch_size must be at most the 200 training samples"):
        KasminaShard(ShardSpec(make_config(train=train), 3))


def test_a_collapse_is_told(shard):
    with torch.no_grad():
        shard.trainer.model.out.bias.fill_(torch.inf)
    with pytest.raises(CollapseError, match="training loss nan at step 10"):
        shard.run_interval()
