"""Faults of every kind, with real processes: what a trial loses, and what it says."""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml
from ray.util.placement_group import placement_group, remove_placement_group

from esper.config.base import ConfigError, validate
from esper.config.shards import ShardsConfig
from esper.shards.errors import (
    NoRoomError,
    RepeatedFailureError,
    ReplicasDifferError,
    ShardLostError,
    ShardMemoryError,
)
from esper.shards.group import groups, replacements
from esper.supervision import run_through
from esper.surgery.checkpoint_folder import CheckpointNotWrittenError, read_manifest
from esper.training.trainer import CollapseError
from esper.trial import Trial


def decisions(record):
    return [(t.interval, t.site, t.seed, t.before, t.after, t.reason) for t in record.transitions]


@pytest.fixture
def disturbed(cluster, make_config, spec, tmp_path):
    """Runs a trial of `count` shards that is disturbed; gives its record and what went wrong."""

    def run(disturb, on_lost=lambda error: None, folder=tmp_path, **options):
        config = ShardsConfig(**{"timeout_s": 60.0, **options})
        errors = []

        def lost(error):
            errors.append(error)
            on_lost(error)

        trial = Trial(make_config(), spec, shards=groups(config))
        trial, record = run_through(
            trial, folder, every=5, retries=config.times, again=replacements(config),
            on_interval=disturb, on_lost=lost,
        )  # fmt: skip
        trial.shard.close()
        return record, errors

    return run


def at(interval, do, times=1):
    """Does something to the trial at the end of an interval, the first times that it is there."""
    done = []

    def disturb(trial):
        if len(trial.curves["step"]) == interval and len(done) < times:
            done.append(trial.health.step)
            do(trial)

    return disturb


def kill(rank, signal_=signal.SIGKILL):
    return lambda trial: os.kill(trial.shard.pids[rank], signal_)


def in_actor(rank, plant):
    """Has a function of its own run in an actor's process, with the actor."""
    return lambda trial: ray.get(trial.shard._actors[rank].__ray_call__.remote(plant))


class Occupied:
    """CPUs of the cluster that another takes as soon as they are free."""

    def __init__(self):
        self.places = []

    def take(self, cpus, wait_s=20):
        self.places.append(placement_group([{"CPU": 1.0}] * cpus))
        if wait_s:
            assert self.places[-1].wait(wait_s)

    def give_back(self):
        while self.places:
            remove_placement_group(self.places.pop())


@pytest.fixture
def others():
    occupied = Occupied()
    yield occupied
    occupied.give_back()


def test_a_run_goes_on_with_fewer_shards_if_there_is_no_room_for_all(
    disturbed, others, make_config, spec, finished
):
    """It takes the decisions of the whole, computes within rounding, and tells what it did."""
    record, (error,) = disturbed(
        at(12, kill(1)), lambda _: others.take(3), count=2, on_loss="shrink", wait_s=1.0
    )
    assert error.ranks == (1,)
    assert record.curves["shards"] == [2.0] * 10 + [1.0] * 10
    alone = finished(Trial(make_config(), spec))
    assert [d[:5] for d in decisions(record)] == [d[:5] for d in decisions(alone)]
    # seeds that learn alone have an objective that is no mean over the batch
    assert record.curves["train_loss"] == pytest.approx(alone.curves["train_loss"], rel=0.05)


@pytest.mark.slow
def test_a_run_that_may_not_shrink_waits_for_room_and_ends_when_there_is_none(disturbed, others):
    with pytest.raises(NoRoomError, match=r"shards 0, 1 got no room on the cluster in 0.5 s"):
        disturbed(at(2, kill(1)), lambda _: others.places or others.take(3), count=2, wait_s=0.5)


@pytest.mark.slow
def test_a_run_gets_all_its_shards_again_when_their_room_comes_back(
    disturbed, others, make_config, spec, without_times, finished
):
    def lost(error):
        if isinstance(error, NoRoomError):
            others.give_back()
        else:
            others.take(3)

    record, errors = disturbed(at(7, kill(0)), lost, count=2, wait_s=1.0)
    assert [type(error) for error in errors] == [ShardLostError, NoRoomError]
    whole = finished(Trial(make_config(), spec, shards=groups(ShardsConfig(count=2))))
    assert without_times(record) == without_times(whole)


def test_a_run_that_is_to_fail_ends_with_the_first_loss(disturbed):
    with pytest.raises(ShardLostError, match=r"shard 0 died: .* as `dmesg` says, lower train"):
        disturbed(at(2, kill(0)), on_loss="fail", retries=5)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="on_loss must be 'retry', 'shrink' or 'fail'"):
        validate(ShardsConfig, {"on_loss": "pray"}, source="esper run")


@pytest.mark.slow
def test_a_replica_whose_loss_is_no_number_costs_a_repetition_and_no_seed(
    disturbed, make_config, spec, without_times, finished
):
    """The broken one spoils the others through the mean of the gradients."""

    def plant(actor):
        trainer = actor._shard.trainer
        taken = trainer._step

        def broken(step):
            if step == 133:
                trainer.model.out.bias.data.fill_(math.nan)
            return taken(step)

        trainer._step = broken

    record, (error,) = disturbed(at(12, in_actor(1, plant)), count=2)
    assert isinstance(error, CollapseError)
    assert error.step == 140
    whole = finished(Trial(make_config(), spec, shards=groups(ShardsConfig(count=2))))
    assert without_times(record) == without_times(whole)


def test_a_loss_that_is_no_number_again_is_the_models_own(disturbed):
    """As without shards: the run ends as collapsed, or goes back to before a seed."""

    def plant(actor):
        actor._shard.trainer.model.out.bias.data.fill_(math.nan)

    record, errors = disturbed(
        at(1, lambda trial: [in_actor(rank, plant)(trial) for rank in (0, 1)], times=2), count=2
    )
    assert [error.step for error in errors] == [20]
    assert record.status == "collapsed"
    assert "training loss nan at step 20" in record.collapse_reason


@pytest.mark.slow
def test_replicas_that_differ_go_back_to_the_last_checkpoint(
    disturbed, make_config, spec, without_times, finished
):
    def plant(actor):
        actor._shard.trainer.model.out.bias.data[0] += 1e-6

    record, (error,) = disturbed(at(12, in_actor(1, plant)), count=2)
    assert isinstance(error, ReplicasDifferError)
    assert error.ranks == (1,)
    whole = finished(Trial(make_config(), spec, shards=groups(ShardsConfig(count=2))))
    assert without_times(record) == without_times(whole)


@pytest.mark.slow
def test_a_replica_that_breaks_again_at_the_same_place_ends_the_run(disturbed, tmp_path):
    def plant(actor):
        actor._shard.trainer.model.out.bias.data[0] += 1e-6

    with pytest.raises(RepeatedFailureError, match=r"interval 3 must succeed .* failed twice: all"):
        disturbed(at(2, in_actor(1, plant), times=9), count=2, retries=9)
    # nothing of what it computed was kept
    assert read_manifest(tmp_path)["trial"]["curves"] == {}


@pytest.mark.slow
def test_a_shard_without_memory_says_what_to_do(disturbed):
    """Torch's own error in an interval of one of two, which waits for the other."""

    def plant(actor):
        def full(step):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        actor._shard.trainer._step = full

    what = r"shard 1 ran out of memory: CUDA out of memory.* lower train\.batch_size"
    with pytest.raises(ShardMemoryError, match=what):
        disturbed(at(2, in_actor(1, plant)), count=2, on_loss="fail")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own that can be filled."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=False,
                      capture_output=True).returncode:  # fmt: skip
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert not os.statvfs(disk).f_bavail


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_goes_on(
    make_config, spec, without_times, small_disk, finished
):
    here, state, errors = finished(Trial(make_config(), spec)), small_disk / "state", []

    def unwritten(error):
        errors.append(error)
        assert len(Trial.resume(state).curves["step"]) == 5
        assert len(list(state.iterdir())) == 2
        (small_disk / "filler").unlink()

    _, record = run_through(
        Trial(make_config(), spec), state, every=5,
        on_interval=at(7, lambda _: fill(small_disk)), on_unwritten=unwritten,
    )  # fmt: skip
    (error,) = errors
    assert isinstance(error, CheckpointNotWrittenError)
    assert f"written to {state}, but: No space left on device; a former one there is" in str(error)
    assert without_times(record) == without_times(here)
    assert Trial.resume(state).done


def test_a_disk_that_is_full_ends_the_run_if_that_is_the_policy(make_config, spec, small_disk):
    with pytest.raises(CheckpointNotWrittenError, match="No space left on device"):
        run_through(
            Trial(make_config(), spec), small_disk / "state", every=5,
            on_interval=at(7, lambda _: fill(small_disk)),
        )  # fmt: skip
    assert len(Trial.resume(small_disk / "state").curves["step"]) == 5


def test_a_file_size_limit_is_told_as_a_full_disk_is(make_config, spec, tmp_path):
    """Another reason for which half a file is written; needs no rights."""
    trial = Trial(make_config(), spec)
    trial.save(tmp_path / "state")
    trial.run_for(0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(CheckpointNotWrittenError, match="File too large"):
            trial.save(tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Trial.resume(tmp_path / "state").curves == {}
    assert len(list((tmp_path / "state").iterdir())) == 2


@pytest.mark.slow
def test_a_shard_that_is_lost_while_the_disk_is_full_costs_no_more_than_steps(
    disturbed, make_config, spec, without_times, small_disk, finished
):
    def disturb(trial):
        for do in disturbances:
            do(trial)

    disturbances = at(7, lambda _: fill(small_disk)), at(12, kill(0))
    record, (error,) = disturbed(
        disturb, lambda _: (small_disk / "filler").unlink(), folder=small_disk / "state"
    )
    assert error.ranks == (0,)
    assert without_times(record) == without_times(finished(Trial(make_config(), spec)))


def killed_driver(make_config, folder, kills):
    config = make_config().model_dump(mode="json", exclude_defaults=True)
    # a short life of few seeds, so that many drivers can be tried
    config["train"]["steps"] = 200 if kills else 80
    asked = json.dumps({"config": config, "folder": str(folder), "kills": kills})
    script = Path(__file__).with_name("killed_driver.py")
    done = subprocess.run(
        [sys.executable, script, asked], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_driver_killed_before_any_step_of_a_checkpoint_goes_on_bit_for_bit(make_config, tmp_path):
    """Losses, decisions, weights and random generators; also of the same checkpoint folder."""
    places = killed_driver(make_config, tmp_path / "state", None)
    for expected in ("open tensors-", "os.rename tensors-", "os.rename manifest.", "os.remove"):
        assert any(place.startswith(expected) for place in places), places


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_driver_killed_at_random_moments_goes_on_bit_for_bit(make_config, tmp_path, kills):
    assert killed_driver(make_config, tmp_path / "state", kills) >= kills / 2


@pytest.mark.slow
def test_a_hung_shard_of_two_is_given_up_though_the_other_waits_for_it(
    disturbed, make_config, spec, without_times, finished, require_ended
):
    """The watchdog's time passes in the middle of a collective; no process stays behind."""
    pids = []

    def hang(trial):
        pids.extend(trial.shard.pids)
        kill(1, signal.SIGSTOP)(trial)

    started = time.monotonic()
    record, (error,) = disturbed(at(12, hang), count=2, timeout_s=4.0)
    assert isinstance(error, ShardLostError)
    assert 1 in error.ranks
    assert time.monotonic() - started < 60
    require_ended(pids)
    whole = finished(Trial(make_config(), spec, shards=groups(ShardsConfig(count=2))))
    assert without_times(record) == without_times(whole)


@pytest.mark.slow
def test_memory_that_runs_out_once_costs_a_repetition(
    disturbed, make_config, spec, without_times, finished
):
    """Really: the process may not have what it asks for."""

    def plant(actor):
        trainer = actor._shard.trainer
        taken = trainer._step

        def greedy(step):
            if step == 133:
                torch.empty(1 << 50)
            return taken(step)

        trainer._step = greedy

    def plant_python(actor):
        def greedy(step):
            return bytes(1 << 60)

        actor._shard.trainer._step = greedy

    record, (error,) = disturbed(at(12, in_actor(0, plant)))
    assert isinstance(error, ShardMemoryError)
    assert "can't allocate memory" in str(error)
    assert without_times(record) == without_times(finished(Trial(make_config(), spec)))
    with pytest.raises(ShardMemoryError, match=r"shard 0 ran out of memory: MemoryError; lower"):
        disturbed(at(2, in_actor(0, plant_python)), on_loss="fail")


ESPER = "from esper_experiments.entry import main; main()"


@pytest.mark.slow
def test_nothing_outlives_a_killed_driver_and_its_run_is_resumed(
    tmp_path, make_config, require_ended
):
    """`esper run --shards 1` is killed while actors train: Ray and the actors end with it."""
    config = make_config().model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def esper(*arguments):
        return subprocess.Popen(
            [sys.executable, "-c", ESPER, "run", *arguments], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    driver = esper("run.yaml", "--shards", "1", "--checkpoint", "state", "--every", "3")
    lines = iter(driver.stdout.readline, "")
    assert any(line.startswith("step 90 ") for line in lines)
    children = psutil.Process(driver.pid).children(recursive=True)
    actors = [p.pid for p in children if "ShardActor" in " ".join(p.cmdline())]
    assert len(actors) == 1
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    require_ended(actors)
    records = []
    for name, start in {
        "again": ["--resume", "state", "--shards", "1"],
        "whole": ["run.yaml"],
    }.items():
        done = esper(*start, "--json", f"{name}.json")
        output, _ = done.communicate(timeout=120)
        assert done.returncode == 0, output
        record = json.loads((tmp_path / f"{name}.json").read_text())
        curves = {k: v for k, v in record["curves"].items() if k != "train_seconds"}
        records.append((record["transitions"], curves, record["metrics"]["test_loss"]))
    assert records[0] == records[1]
    # Ray's own agents look after their node once a minute
    require_ended([p.pid for p in children], wait_s=90.0)
