"""Shards in real Ray actors: the same results, the same errors, and what happens when one dies."""

import os
import pickle
import re
import signal

import pytest

from esper.config.base import ConfigError
from esper.config.shards import ShardsConfig
from esper.seeds.actions import Germinate
from esper.seeds.lifecycle import IllegalTransitionError
from esper.shards.errors import ShardLostError
from esper.shards.group import ShardGroup, groups
from esper.shards.shard import KasminaShard, ShardSpec
from esper.supervision import run_through
from esper.trial import Trial

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def make_group(make_config):
    made = []

    def make(changes=None, **options):
        spec = ShardSpec(make_config(**(changes or {})), 3)
        made.append(ShardGroup(spec, ShardsConfig(**{"timeout_s": 60.0, **options})))
        return made[-1]

    yield make
    for group in made:
        group.close()


def test_a_trial_in_an_actor_is_the_one_in_this_process_bit_for_bit(
    make_config, spec, without_times, finished
):
    here = finished(Trial(make_config(), spec))
    there = Trial(make_config(), spec, shards=groups(ShardsConfig()))
    (pid,) = there.shard.pids
    assert pid != os.getpid()
    with pytest.raises(TypeError, match="must be in this process to show its trainer"):
        _ = there.trainer
    assert without_times(finished(there)) == without_times(here)
    assert len(here.transitions) > 10


def test_an_actor_answers_as_the_shard_in_it(make_group, make_config, tmp_path, monkeypatch):
    """Errors as they were raised, checkpoints the same wherever they are written."""
    monkeypatch.chdir(tmp_path)
    wake = Germinate("fc1", 1, "mlp_relu", "linear", "test")
    group = make_group()
    group.run_interval()
    with pytest.raises(IllegalTransitionError, match="the seed is GERMINATED") as caught:
        group.apply([wake, wake])
    assert caught.value.action == wake
    # where it happened
    assert "in advance" in str(caught.value.__cause__)
    group.checkpoint("state", {})
    here = KasminaShard(ShardSpec(make_config(), 3))
    here.restore(tmp_path / "state")
    assert here.health() == group.health()
    assert here.run_interval().loss == group.run_interval().loss
    group.restore("state")
    assert group.health().interval == 1
    group.save("model")
    assert (tmp_path / "model" / "manifest.json").exists()


def test_what_cannot_be_built_says_why(make_group):
    with pytest.raises(ConfigError, match=r"host\.name"):
        make_group({"host": {"name": "nothing"}})
    with pytest.raises(ConfigError, match="2 shards ask for 30 each; ask for less"):
        make_group(count=2, cpus_per_shard=30.0)


@pytest.mark.parametrize(
    "signal_", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_trial_that_loses_its_shard_is_the_undisturbed_one_bit_for_bit(
    make_config, spec, without_times, tmp_path, signal_, finished, require_ended
):
    """A killed process is noticed at once, a hung one when its time is up."""
    here = finished(Trial(make_config(), spec))
    config = ShardsConfig(timeout_s=3.0 if signal_ == signal.SIGSTOP else 60.0)
    trial = Trial(make_config(), spec, shards=groups(config))
    pids, lost = [], []

    def disturb(trial):
        if not pids and len(trial.curves["step"]) == 12:
            pids.extend(trial.shard.pids)
            os.kill(pids[0], signal_)

    again, record = run_through(
        trial, tmp_path, every=5, retries=1, on_interval=disturb, on_lost=lost.append
    )
    again.shard.close()
    assert without_times(record) == without_times(here)
    (error,) = lost
    hung = "gave no answer to 'run_interval' in 3 s"
    assert re.search("died: " if signal_ == signal.SIGKILL else hung, str(error))
    require_ended(pids[:1], wait_s=10.0)


def test_a_shard_that_is_lost_too_often_ends_the_run(make_config, spec, tmp_path):
    trial = Trial(make_config(), spec, shards=groups(ShardsConfig()))
    with pytest.raises(ShardLostError, match="shard 0 died: ") as caught:
        run_through(trial, on_interval=lambda t: os.kill(t.shard.pids[0], signal.SIGKILL))
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
