"""A trial: one arm of one pair, from its configuration to its record."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from esper.config.base import ConfigError
from esper.config.run import RunConfig
from esper.controller import GrowthEvent
from esper.evidence.records import Fingerprint, TransitionRecord, TrialRecord
from esper.trial import SALT_STRIDE, Trial, TrialSpec, kept_events

MARK = Fingerprint(code_hash="c", commit=None, versions={"torch": "2"}, device="cpu")
RUN = {
    "task": {
        "name": "spirals",
        "options": {"train_samples": 200, "held_out_samples": 100, "test_samples": 100},
    },
    "host": {"name": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 200, "batch_size": 50, "interval_steps": 10, "learning_rate": 0.01},
    "lattice": [
        {"sites": "fc1", "seeds_per_layer": 4, "hidden": 4},
        {"sites": "fc1->out", "seeds_per_layer": 4, "geometry": "span"},
    ],
    # what is woken stays and lives through all stages
    "growth": {"ramp_steps": 8, "fine_tuning_intervals": 2, "min_gain": -1e9,
               "min_explained_frac": -1e9, "max_instability_frac": 1e9, "max_drift_frac": 1e9},
}  # fmt: skip
# waves at the end of intervals 2, 8 and 14
TAMIYO = {
    "controller": {
        "name": "tamiyo",
        "options": {
            "patience_intervals": 1,
            "min_improvement_frac": 0.9,
            "seeds_per_wave": 2,
            "last_interval": 19,
        },
    }
}
SCHEDULE = {"controller": {"name": "schedule", "options": {"at_intervals": [2, 5], "count": 2}}}
RANDOM = {"controller": {"name": "random", "options": {"at_intervals": [3], "count": 3}}}


def trial(*changes, pair=0, seed=0, followed=None, arm="arm"):
    config = dict(RUN)
    for change in changes:
        config |= change
    spec = TrialSpec(arm, pair, seed, 1, "registered", MARK)
    return Trial(RunConfig.model_validate(config), spec, followed)


def finished(*changes, **options):
    run = trial(*changes, **options)
    run.run_for(math.inf)
    return run, run.record()


@pytest.fixture(scope="module")
def grown():
    return finished(TAMIYO)


@pytest.mark.parametrize("controller", [{}, TAMIYO, SCHEDULE, RANDOM])
def test_a_whole_run_leaves_a_complete_record(controller):
    run, record = finished(controller, pair=3, seed=7)
    assert run.done
    assert (record.status, record.collapse_reason) == ("finished", None)
    assert (record.trial_id, record.arm, record.pair, record.seed) == ("arm-003", "arm", 3, 7)
    assert (record.order, record.registration_hash, record.fingerprint) == (1, "registered", MARK)
    assert record.started_at < record.ended_at
    assert record.sites == {"fc1": 4, "fc1->out": 4}
    assert set(record.metrics) == run.metric_names()
    splits = ("train", "held_out", "test")
    measured = {f"{s}_{what}" for s in splits for what in ("loss", "accuracy")}
    assert set(record.metrics) == measured | {
        "parameters", "host_parameters", "steps", "train_flops", "train_seconds",
        "seeds_kept", "seeds_culled", "vetoes",
    }  # fmt: skip
    assert all(math.isfinite(v) for v in record.metrics.values())
    assert {len(c) for c in record.curves.values()} == {run.intervals} == {20}
    assert set(record.curves) == {
        "step", "train_loss", "held_out_loss", "held_out_accuracy", "parameters", "active_seeds",
        "grad_norm", "host_drift_frac", "vetoes", "train_seconds",
    }  # fmt: skip
    assert record.curves["step"] == [10.0 * i for i in range(1, 21)]
    assert math.isnan(record.curves["host_drift_frac"][0])
    assert record.curves["parameters"][-1] == record.metrics["parameters"]
    assert record.curves["active_seeds"][-1] == record.metrics["seeds_kept"]
    assert record.metrics["steps"] == 200
    assert record.metrics["host_parameters"] == 8 * 3 + 2 * 9
    germinated = sum(t.action == "Germinate" for t in record.transitions)
    expected = {None: 0, "tamiyo": 6, "schedule": 4, "random": 3}
    assert germinated == expected[controller.get("controller", {}).get("name")]
    assert record.metrics["seeds_kept"] == germinated
    again = TrialRecord.model_validate_json(record.model_dump_json())
    assert again.model_dump_json() == record.model_dump_json()
    assert math.isnan(again.curves["host_drift_frac"][0])


def test_two_trials_of_one_seed_are_equal_but_for_their_times(grown):
    _, record = finished(TAMIYO)
    timed = {"train_seconds"}
    assert record.transitions == grown[1].transitions
    for name in set(record.metrics) - timed:
        assert record.metrics[name] == grown[1].metrics[name], name
    for name in set(record.curves) - timed:
        assert str(record.curves[name]) == str(grown[1].curves[name]), name


def test_all_arms_of_a_pair_start_from_the_same_host_and_data():
    arms = [trial({"lattice": []}), trial(TAMIYO), trial(SCHEDULE)]
    first = arms[0].trainer
    for arm in arms[1:]:
        for a, b in zip(first.lattice.host_parameters(), arm.trainer.lattice.host_parameters(),
                        strict=True):  # fmt: skip
            assert torch.equal(a, b)
        assert torch.equal(first.data.train[0], arm.trainer.data.train[0])


def test_a_salt_changes_everything():
    plain, salted = trial(), trial({"seed_salt": 1})
    assert not torch.equal(plain.trainer.model.fc1.weight, salted.trainer.model.fc1.weight)
    assert not torch.equal(plain.trainer.data.train[0], salted.trainer.data.train[0])
    assert salted.trainer.lattice.seed == SALT_STRIDE
    assert (plain.trainer._order_rng.initial_seed(), salted.trainer._order_rng.initial_seed()) == (
        0,
        SALT_STRIDE,
    )
    salted.run_for(math.inf)
    assert salted.record().seed == SALT_STRIDE


def test_the_topology_of_a_followed_arm_can_be_trained_from_scratch(grown):
    _, followed = grown
    run = trial({"follow": "esper", "start": "grown"}, followed=followed)
    assert run.trainer.lattice.count_parameters() == followed.metrics["parameters"]
    assert run.curves == {}
    planted = topology(run)
    assert planted == topology(grown[0])
    assert sum(len(s) for s in planted.values()) == 6
    run.run_for(math.inf)
    record = run.record()
    assert record.transitions == []
    assert topology(run) == planted
    assert set(record.curves["parameters"]) == {followed.metrics["parameters"]}


def topology(run):
    return {
        name: {(i, s.blueprint_id) for i, s in enumerate(a.layer.states()) if s.blueprint_id}
        for name, a in run.trainer.lattice.attached.items()
    }


def test_a_random_arm_follows_with_the_same_sizes_at_the_same_times(grown):
    run, record = finished(
        {"follow": "esper", "controller": {"name": "random"}}, followed=grown[1], seed=0
    )

    def sizes(transitions):
        return Counter((t.interval, t.blueprint) for t in transitions if t.action == "Germinate")

    assert sizes(record.transitions) == sizes(grown[1].transitions)
    assert sum(sizes(record.transitions).values()) == 6
    assert topology(run) != topology(grown[0])


def line(interval, site, seed, action, after, blueprint="low_rank"):
    return TransitionRecord(
        interval=interval, step=0, site=site, seed=seed, action=action, before="DORMANT",
        after=after, blueprint=blueprint, reason="",
    )  # fmt: skip


def test_kept_events_are_what_a_run_germinated_and_still_has(grown):
    record = grown[1].model_copy(update={"transitions": [
        line(1, "b", 0, "Germinate", "GERMINATED"),
        line(1, "a", 0, "Germinate", "GERMINATED"),
        line(2, "b", 0, "Promote", "TRAINING"),
        line(2, "a", 0, "Cancel", "CANCELLED"),
        line(3, "b", 0, "Cull", "CULLED"),
        line(4, "a", 1, "Germinate", "GERMINATED", "glu"),
        line(5, "b", 0, "Advance", "DORMANT", "noop"),
        line(6, "b", 0, "Germinate", "GERMINATED", "mlp_relu"),
        line(7, "a", 1, "Promote", "TRAINING", "glu"),
    ]})  # fmt: skip
    kept = (GrowthEvent(4, "a", 1, "glu"), GrowthEvent(6, "b", 0, "mlp_relu"))
    assert kept_events(record) == kept
    assert kept_events(record.model_copy(update={"transitions": []})) == ()


@pytest.mark.parametrize("where", ["first", "later"])
def test_a_collapsed_trial_is_recorded_and_never_dropped(where):
    rate = {"learning_rate": 1e30, "optimizer": "sgd"} if where == "first" else {}
    run = trial({"train": RUN["train"] | rate}, TAMIYO)
    if where == "later":
        run.run_for(0)
        nn.init.constant_(run.trainer.model.out.bias, math.inf)
    run.run_for(math.inf)
    record = run.record()
    assert run.done
    assert record.status == "collapsed"
    step = 10 if where == "first" else 20
    assert record.collapse_reason in {f"training loss {x} at step {step}" for x in ("nan", "inf")}
    measured = {n for n in record.metrics if n.endswith(("_loss", "_accuracy"))}
    assert len(measured) == 6
    assert all(math.isnan(record.metrics[n]) for n in measured)
    assert all(math.isfinite(v) for n, v in record.metrics.items() if n not in measured)
    assert set(record.metrics) == run.metric_names()
    # the last point tells where it ended, and no more
    assert {len(c) for c in record.curves.values()} == {step // 10}
    assert record.curves["step"][-1] == step
    for name in ("train_loss", "held_out_loss", "held_out_accuracy", "grad_norm"):
        assert math.isnan(record.curves[name][-1]), name
        assert all(math.isfinite(v) for v in record.curves[name][:-1])
    again = TrialRecord.model_validate_json(record.model_dump_json())
    assert all(math.isnan(again.metrics[n]) for n in measured)


def test_a_trial_runs_whole_intervals_and_says_how_far_it_is():
    run = trial()
    latest = run.run_for(0)
    assert latest["step"] == 10
    assert not run.done
    with pytest.raises(RuntimeError, match=r"arm-000 must be done .* but is at step 10"):
        run.record()
    assert run.run_for(math.inf)["step"] == 200
    assert run.run_for(math.inf)["step"] == 200
    assert run.trainer.step == 200


class Net(nn.Module):
    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.body, self.head = nn.Linear(inputs, width), nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def factory(**arguments):
    path = f"{__name__}:Net"
    return {"host": {"name": "factory", "options": {"path": path, "arguments": arguments}}}


def test_a_host_of_ones_own():
    lattice = {"lattice": [{"sites": "body", "seeds_per_layer": 3}]}
    run, record = finished(factory(inputs=2, width=6, outputs=2), lattice, SCHEDULE)
    assert record.sites == {"body": 3}
    assert record.metrics["seeds_kept"] == 3
    assert type(run.trainer.model) is Net


def test_plugins_are_imported_first(tmp_path, monkeypatch):
    (tmp_path / "my_plugin_for_trials.py").write_text(
        "from torch import nn\n"
        "from esper.training.hosts import HOSTS, Host\n"
        "@HOSTS.register('mine')\n"
        "class Mine(Host):\n"
        "    def build(self, data):\n"
        "        return nn.Sequential(nn.Linear(data.inputs, data.outputs))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"host": {"name": "mine"}, "lattice": []}
    with pytest.raises(ConfigError, match=r"host\.name: host must be one of"):
        trial(mine)
    from esper.training.hosts import HOSTS

    monkeypatch.setattr(HOSTS, "_items", dict(HOSTS._items))
    run = trial(mine, {"plugins": ["my_plugin_for_trials"]})
    assert [n for n, _ in run.trainer.model.named_parameters()] == ["0.weight", "0.bias"]


WRONG = {
    "task": ({"task": {"name": "spiral"}}, r"task\.name: task must be one of.*'spirals'"),
    "host": ({"host": {"name": "mpl"}}, r"host\.name: host must be one of.*Did you mean 'mlp'"),
    "controller": ({"controller": {"name": "tamyo"}}, r"controller\.name: .*'tamiyo'"),
    "task_option": (
        {"task": {"name": "spirals", "options": {"turn": 2}}},
        r"task\.options\.turn must be a known key.*'turns'",
    ),
    "host_option": (
        {"host": {"name": "mlp", "options": {"hidden": []}}},
        r"host\.options\.hidden must have at least 1 item",
    ),
    "host_missing": ({"host": {"name": "mlp"}}, r"host\.options\.hidden must be given"),
    "controller_option": (
        {"controller": {"name": "tamiyo", "options": {"patience_intervals": 0}}},
        r"controller\.options\.patience_intervals must be greater than 0",
    ),
    "plugin": ({"plugins": ["no_such_plugin"]}, "plugins must be importable modules"),
    "device": ({"device": "gpu"}, "device must be usable on this machine, but 'gpu' is not"),
    "site": (
        {"lattice": [{"sites": "fc9", "seeds_per_layer": 2}]},
        "arm 'arm' is not valid:\n.*'fc9' matches none; its modules are: fc1, act1, out",
    ),
    "seeds": ({"lattice": [{"sites": "fc1", "seeds_per_layer": 3}]}, "use one of"),
    "batch": ({"train": RUN["train"] | {"batch_size": 300}}, "at most the 200 training samples"),
    "factory": (factory(inputs=2, widht=3), r"host\.options\.arguments must fit"),
    "conv": ({"host": {"name": "conv1d"}, "lattice": []}, "'conv1d' needs more than 2"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named_with_its_path(wrong):
    change, match = WRONG[wrong]
    with pytest.raises(ConfigError, match=match):
        trial(change)


def test_a_topology_that_does_not_fit_is_refused(grown):
    change = {"follow": "esper", "start": "grown", "lattice": []}
    with pytest.raises(ConfigError, match="site must be one of"):
        trial(change, followed=grown[1])
