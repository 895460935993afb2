"""A trial: one arm of one pair, from its configuration to its record."""

import dataclasses
import json
import math
import re
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper.config.base import ConfigError
from esper.config.run import Plugin, RunConfig
from esper.controller import CONTROLLERS, ControllerOptions, GrowthEvent, TamiyoOptions, Veto
from esper.controller.base import Stateless, memory_of, remind
from esper.earlier_trials import commanded, kept_events
from esper.evidence.records import Fingerprint, TransitionRecord, TrialRecord
from esper.seeds.actions import Germinate, Rollback
from esper.seeds.blueprints import BLUEPRINTS, blueprint
from esper.seeds.state import Stage
from esper.surgery.checkpoint_folder import CheckpointError
from esper.surgery.files import load, save
from esper.training.hosts import HOSTS
from esper.training.tasks import Spirals
from esper.trial import SALT_STRIDE, Trial, TrialSpec

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


def test_growth_keeps_to_a_budget_of_operations():
    _, free = finished(SCHEDULE)
    _, host = finished({"lattice": []})
    used = [r.metrics["train_flops"] for r in (host, free)]
    budget = sum(used) / 2
    run, kept = finished(SCHEDULE, {"growth": {**RUN["growth"], "max_train_flops": budget}})
    # in proportion to the parameters is nearly true: the host's first layer passes no gradient on
    assert used[0] < kept.metrics["train_flops"] <= 1.05 * budget
    assert 0 < kept.metrics["seeds_kept"] < free.metrics["seeds_kept"]
    assert any("all that the operations allow" in v.reason for v in run.controller.vetoes)


def test_nothing_is_measured_while_a_wave_is_under_way():
    """What a wave is chosen by is measured before it; its decisions are the same as ever."""
    growth = {**RUN["growth"], "initialisation": "matched", "measured_samples": 50}
    options = {**TAMIYO["controller"]["options"], "score": "bottleneck"}
    matched = {"growth": growth, "controller": {"name": "tamiyo", "options": options}}
    run = trial(matched)
    measured, asked = [], run.trainer._measured_loss
    run.trainer._measured_loss = lambda: (measured.append(run.trainer.step), asked())[1]
    run.run_for(math.inf)
    waves = {t.step for t in run.record().transitions if t.action == "Germinate"}
    assert len(waves) > 1
    assert waves <= set(measured)
    assert len(measured) < run.intervals / 2


def test_the_gradient_of_new_seeds_is_a_curve_for_a_hundred_steps():
    """Beside the host's: below 1 a new seed starves. It is a metric of the run in MLflow, too."""
    growth = {**RUN["growth"], "training_intervals": 0, "fine_tuning_intervals": 100}
    once = {"name": "schedule", "options": {"at_intervals": [2], "count": 2}}
    _, record = finished({"growth": growth, "controller": once})
    curve = dict(zip(record.curves["step"], record.curves["new_seed_grad_ratio"], strict=True))
    told = [step for step, ratio in curve.items() if not math.isnan(ratio)]
    assert all(curve[step] > 0 for step in told)
    # grafted after step 20; while a seed rests and is evaluated it does not count
    assert min(told) == 30
    assert 100 <= max(told) <= 160


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
        "growth_flops", "growth_seconds", "seeds_kept", "seeds_culled", "seeds_rolled_back",
        "vetoes",
    }  # fmt: skip
    assert all(math.isfinite(v) for v in record.metrics.values())
    assert {len(c) for c in record.curves.values()} == {run.intervals} == {20}
    assert set(record.curves) == {
        "step", "train_loss", "held_out_loss", "held_out_accuracy", "parameters", "active_seeds",
        "grad_norm", "host_drift_frac", "new_seed_grad_ratio", "vetoes", "shards",
        "train_seconds",
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
    timed = {"train_seconds", "growth_seconds"}
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


# what breaks the run


class Poison:
    """Two functions that are harmless until their seed is grafted."""

    layer = None

    @classmethod
    def acts(cls):
        return cls.layer is not None and bool((cls.layer.alpha > 0).any())


def poison_nan(z):
    return z * math.nan if Poison.acts() else F.gelu(z)


def poison_huge(z):
    return F.gelu(z) + 1e6 if Poison.acts() else F.gelu(z)


def diverging(z):
    return torch.exp(200 * z * z)


class Planter(Stateless):
    """Tamiyo, but the seeds of the first wave get another blueprint."""

    def __init__(self, inner, planted):
        self.inner, self.planted = inner, planted

    def decide(self, report):
        return [
            dataclasses.replace(a, blueprint=self.planted)
            if isinstance(a, Germinate) and report.interval <= 4
            else a
            for a in self.inner.decide(report)
        ]

    def state_dict(self):
        return memory_of(self.inner)

    def load_state_dict(self, state):
        remind(self.inner, state)


class PlanterOptions(TamiyoOptions):
    planted: str = "mlp_gelu"

    def build(self, seed, events=()):
        return Planter(super().build(seed, events), self.planted)


@pytest.fixture(autouse=True, scope="module")
def _planted():
    with pytest.MonkeyPatch.context() as patch:
        for registry in (BLUEPRINTS, CONTROLLERS):
            patch.setattr(registry, "_items", dict(registry._items))
        for function in (poison_nan, poison_huge, diverging):
            blueprint(function.__name__)(function)
        CONTROLLERS.register("planter")(PlanterOptions)
        yield


SPIRALS = {
    "task": {"name": "spirals", "options": {"train_samples": 600}},
    "host": {"name": "mlp", "options": {"hidden": [16]}},
    "train": {"steps": 500, "batch_size": 100, "interval_steps": 25, "learning_rate": 0.01},
    "lattice": [{"sites": "fc1", "seeds_per_layer": 8, "hidden": 8}],
    "growth": RUN["growth"] | {"ramp_steps": 25, "embargo_intervals": 5},
}


def planter(planted, **growth):
    options = {"patience_intervals": 1, "min_improvement_frac": 0.9, "planted": planted}
    return {"growth": SPIRALS["growth"] | growth,
            "controller": {"name": "planter", "options": options}}  # fmt: skip


def poisoned(*changes):
    run = trial(SPIRALS, *changes)
    Poison.layer = run.trainer.lattice.layer("fc1")
    return run


@pytest.fixture(autouse=True)
def _antidote():
    yield
    Poison.layer = None


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        ("poison_nan", "training loss nan at step 125; back to step 100"),
        ("poison_huge", r"training loss \S+ after \S+, limit \S+ at step 125; back to step 100"),
    ],
)
def test_a_poisonous_blueprint_is_rolled_back_and_the_run_goes_on(planted, reason):
    longer = {"train": SPIRALS["train"] | {"steps": 1000}}
    _, clean = finished(SPIRALS, longer, planter("mlp_gelu"))
    run = poisoned(longer, planter(planted))
    memories = []
    while not run.done:
        run.run_for(0)
        memories.append(run.controller.memory())
    record = run.record()
    assert record.status == "finished"
    back = [t for t in record.transitions if t.after == "ROLLED_BACK"]
    assert [(t.interval, t.step, t.before) for t in back] == [(5, 125, "GRAFTING")] * 2
    assert all(re.fullmatch(reason, t.reason) for t in back)
    assert record.metrics["seeds_rolled_back"] == 2
    # the controller remembers what it did before the graft, not what happened since
    assert memories[4] == memories[2] != memories[3]
    # the embargo keeps the slots empty
    for seed in {t.seed for t in back}:
        life = [t for t in record.transitions if t.seed == seed and t.interval > 5]
        assert (life[0].action, life[0].after) == ("Advance", "DORMANT")
        assert life[0].interval - 5 >= 5
    # other seeds grow instead, and the network is as good as if nothing had happened
    assert record.metrics["seeds_kept"] == clean.metrics["seeds_kept"] == 8
    assert abs(record.metrics["test_accuracy"] - clean.metrics["test_accuracy"]) < 0.02
    losses = record.curves["train_loss"]
    assert not losses[4] < 5
    assert max(losses[5:]) < losses[2]
    assert record.curves["held_out_loss"][4] == record.curves["held_out_loss"][3]
    assert_unbroken(record)


def assert_unbroken(record):
    """Each line of a seed begins where the line before it ended."""
    last = {}
    for t in record.transitions:
        assert t.before == last.get((t.site, t.seed), "DORMANT"), t
        last[t.site, t.seed] = t.after


def test_what_shows_late_is_undone_to_before_the_graft():
    run = trial(SPIRALS, planter("mlp_gelu"))
    past = []
    for _ in range(6):
        run.run_for(0)
        past.append((run.controller.memory(), run._losses))
    with torch.no_grad():
        run.trainer.model.out.weight *= 1e4
    run.run_for(0)
    back = run.trainer.lattice.log[-1]
    assert (back.interval, back.step, back.after.stage) == (7, 175, Stage.ROLLED_BACK)
    assert back.action.reason.endswith("; back to step 100")
    # the graft began at the end of interval 4, after its loss and before its decision
    assert run.controller.memory() == past[2][0] != past[5][0]
    assert run._losses == past[3][1] != past[5][1]
    assert run.controller.state_dict()["failures"] == 2
    assert max(run.curves["held_out_loss"]) < 1


def test_after_the_last_rollback_nothing_grows_and_the_run_still_ends_well():
    controller = {"name": "tamiyo", "options": {"patience_intervals": 1, "blueprint": "poison_nan",
                                                "min_improvement_frac": 0.9}}  # fmt: skip
    run = poisoned({"controller": controller})
    run.run_for(math.inf)
    record = run.record()
    assert record.status == "finished"
    assert run.controller.incidents == 3
    assert record.metrics["seeds_kept"] == 0
    assert run.controller.vetoes[-1].reason == "the run broke 3 times, the limit is 3"
    _, alone = finished(SPIRALS, {"lattice": []})
    assert abs(record.metrics["test_accuracy"] - alone.metrics["test_accuracy"]) < 0.03


def test_without_a_rollback_left_a_nan_is_a_collapse_and_a_huge_loss_is_not():
    run = poisoned(planter("poison_nan", max_rollbacks=0))
    run.run_for(math.inf)
    assert run.record().collapse_reason == "training loss nan at step 125"
    run = poisoned(planter("poison_huge", max_rollbacks=0))
    run.run_for(math.inf)
    record = run.record()
    assert (record.status, record.metrics["seeds_rolled_back"]) == ("finished", 0)
    assert record.curves["train_loss"][4] > 4 * record.curves["train_loss"][3]


def test_an_explosion_without_suspects_is_left_to_heal():
    run = trial(SPIRALS, planter("mlp_gelu"))
    for _ in range(3):
        run.run_for(0)
    with torch.no_grad():
        run.trainer.model.out.weight *= 100
    run.run_for(math.inf)
    record = run.record()
    assert (record.status, record.metrics["seeds_rolled_back"]) == ("finished", 0)
    assert record.curves["train_loss"][3] > 4 * record.curves["train_loss"][2]


def test_a_drifting_host_is_brought_back_where_that_is_limited():
    run = trial(SPIRALS, planter("mlp_gelu", max_rollback_drift_frac=1e-3, max_rollbacks=1))
    run.run_for(math.inf)
    record = run.record()
    (first, *_), ended = [t for t in record.transitions if t.after == "ROLLED_BACK"], record.status
    assert re.match(r"the host drifted by 0\.\d+ in an interval, limit 0.001 at step", first.reason)
    assert (run.controller.incidents, ended) == (1, "finished")


def test_seeds_that_diverge_before_they_are_grafted_do_no_harm():
    run, record = finished(SPIRALS, planter("diverging"))
    assert record.status == "finished"
    lost = [t for t in record.transitions if t.after == "ROLLED_BACK"]
    assert {(t.before, t.reason) for t in lost} == {("TRAINING", "its own weights are no numbers")}
    assert run.controller.incidents == 0
    assert record.metrics["seeds_kept"] >= 4
    assert all(math.isfinite(x) for x in record.curves["train_loss"])


def test_a_seed_that_never_settles_is_rolled_back_with_the_run():
    """A rollback that the controller commands itself."""
    run = trial(SCHEDULE, {"growth": RUN["growth"] | {"patience_intervals": 2}})
    layer = run.trainer.lattice.layer("fc1")
    while not run.done:
        # as if the loss had been much lower before the graft: gate G4 stays shut
        layer.graft_loss.fill_(0)
        run.run_for(0)
    record = run.record()
    back = [t for t in record.transitions if t.after == "ROLLED_BACK"]
    assert {(t.site, t.before) for t in back} == {("fc1", "STABILIZATION")}
    assert all("the host did not settle; G4: " in t.reason for t in back)
    assert all("; back to step " in t.reason for t in back)
    assert run.controller.incidents == 0
    assert_unbroken(record)
    # who replays the log commands them again, and not what followed from them
    again = [a for actions in commanded(record, "linear").values() for a in actions]
    rollbacks = [a for a in again if isinstance(a, Rollback)]
    assert [(a.site, a.seed) for a in rollbacks] == [(t.site, t.seed) for t in back]
    assert not any("back to" in a.reason for a in again)
    assert sum(t.action == "Rollback" for t in record.transitions) > len(back)


# checkpoints


def dropout_host(inputs, width, outputs):
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(inputs, width), norm=nn.BatchNorm1d(width), drop=nn.Dropout(0.2),
        act=nn.ReLU(), out=nn.Linear(width, outputs),
    ))  # fmt: skip


DROPOUT = {"host": {"name": "factory", "options": {
    "path": f"{__name__}:dropout_host",
    "arguments": {"inputs": 2, "width": 8, "outputs": 2},
}}}  # fmt: skip
RUNS = {
    "tamiyo": (RUN, TAMIYO, DROPOUT, {"growth": RUN["growth"] | {
        "initialisation": "matched", "measured_samples": 50}}),
    "sgd": (RUN, SCHEDULE, {"train": RUN["train"] | {"optimizer": "sgd"}}),
    "random": (RUN, {"controller": {"name": "random", "options": {
        "at_intervals": [3, 9, 15], "count": 2}}}),
    "alone": (RUN, DROPOUT, {"lattice": []}),
    "poisoned": (SPIRALS, planter("poison_nan")),
}  # fmt: skip


def state(run):
    trainer = run.trainer
    tensors = trainer.model.state_dict()
    tensors |= {f"random.{i}": t for i, t in enumerate(trainer.random_state())}
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    return {k: v.clone().nan_to_num() for k, v in tensors.items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_trial_is_the_undisturbed_one_bit_for_bit(tmp_path, name, without_times):
    run = poisoned(*RUNS[name]) if name == "poisoned" else trial(*RUNS[name])
    run.run_for(math.inf)
    expected, end = without_times(run.record()), state(run)
    saving = poisoned(*RUNS[name]) if name == "poisoned" else trial(*RUNS[name])
    saved_at, intervals = [0, 1, 4, 9], 0
    for interval in saved_at:
        while intervals < interval:
            saving.run_for(0)
            intervals += 1
        saving.save(tmp_path / str(interval))
        # over the former one, too
        saving.save(tmp_path / "latest")
    assert len(list((tmp_path / "latest").iterdir())) == 2
    for interval in [*saved_at[:-1], "latest"]:
        torch.manual_seed(99)
        again = Trial.resume(tmp_path / str(interval))
        if name == "poisoned":
            Poison.layer = again.trainer.lattice.layer("fc1")
        again.run_for(math.inf)
        record = again.record()
        assert without_times(record) == expected, interval
        there = state(again)
        assert there.keys() == end.keys()
        assert [k for k, v in there.items() if not torch.equal(v, end[k])] == [], interval
        assert record.started_at == saving._started
        assert record.metrics["train_seconds"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_rollback_and_a_resumed_trial_on_a_gpu(tmp_path, without_times):
    """Dropout draws from the GPU's own generator."""
    options = SPIRALS, planter("poison_nan"), DROPOUT, {"device": "cuda"}
    run = trial(*options)
    Poison.layer = run.trainer.lattice.layer("fc1")
    for _ in range(4):
        run.run_for(0)
    run.save(tmp_path)
    before = run.trainer.past[0].random
    run.run_for(0)
    assert len(before) == 4
    assert all(torch.equal(*pair) for pair in zip(before, run.trainer.random_state(), strict=True))
    run.run_for(math.inf)
    again = Trial.resume(tmp_path)
    Poison.layer = again.trainer.lattice.layer("fc1")
    again.run_for(math.inf)
    assert without_times(again.record()) == without_times(run.record())
    assert run.controller.incidents == 1


def test_what_a_rollback_goes_back_to_is_in_the_checkpoint(tmp_path):
    """Or a resumed run could not go back as the undisturbed one does, which is tested above."""
    run = poisoned(*RUNS["poisoned"])
    for _ in range(4):
        run.run_for(0)
    assert len(run.trainer.past) == 1
    run.save(tmp_path)
    (kept,) = Trial.resume(tmp_path).trainer.past
    assert (kept.step, kept.note) == (100, json.loads(json.dumps(run.trainer.past[0].note)))


def test_a_trial_that_has_ended_can_be_resumed_too(tmp_path, grown, without_times):
    grown[0].save(tmp_path / "well")
    assert without_times(Trial.resume(tmp_path / "well").record()) == without_times(grown[1])
    run = poisoned(planter("poison_nan", max_rollbacks=0))
    run.run_for(math.inf)
    run.save(tmp_path / "badly")
    again = Trial.resume(tmp_path / "badly")
    assert again.done
    assert without_times(again.record()) == without_times(run.record())


@pytest.mark.parametrize("follower", [
    {"follow": "esper", "start": "grown"},
    {"follow": "esper", "controller": {"name": "random"}},
])  # fmt: skip
def test_a_trial_that_follows_another_is_resumed_without_it(
    tmp_path, grown, follower, without_times
):
    run = trial(follower, followed=grown[1])
    run.run_for(0)
    run.save(tmp_path)
    run.run_for(math.inf)
    again = Trial.resume(tmp_path)
    again.run_for(math.inf)
    assert without_times(again.record()) == without_times(run.record())


def test_vetoes_and_the_lattices_own_log_survive(tmp_path):
    run = trial(TAMIYO, {"growth": RUN["growth"] | {"max_active_seeds": 2}})
    run.run_for(math.inf)
    run.controller.vetoes.append(Veto(3, Germinate("fc1", 0, "glu", "cosine", "why"), "not so"))
    run.save(tmp_path)
    again = Trial.resume(tmp_path)
    assert again.controller.vetoes == run.controller.vetoes
    assert again.trainer.lattice.log == run.trainer.lattice.log != []
    assert load(tmp_path, HOSTS["mlp"](hidden=(8,)).build(run.trainer.data)).log == (
        run.trainer.lattice.log
    )


def test_other_data_is_refused(tmp_path, monkeypatch):
    run = trial()
    run.save(tmp_path)
    monkeypatch.setattr(Spirals, "rng", lambda self, seed, split: np.random.default_rng(9))
    with pytest.raises(CheckpointError, match="must be continued with the data it was made with"):
        Trial.resume(tmp_path)


def test_a_model_alone_is_no_trial(tmp_path):
    run = trial()
    save(tmp_path, run.trainer.model, run.trainer.lattice)
    with pytest.raises(CheckpointError, match=r"but holds a model alone; use `esper\.load`"):
        Trial.resume(tmp_path)


def test_a_controller_whose_memory_would_be_lost_is_refused(monkeypatch):
    class Forgetful:
        def __init__(self):
            self.count = 0

        def decide(self, report):
            return []

    class Options(ControllerOptions):
        def build(self, seed, events=()):
            return Forgetful()

    monkeypatch.setitem(CONTROLLERS._items, "forgetful", Options)
    with pytest.raises(ConfigError, match=r"'forgetful': controller must define state_dict"):
        trial({"controller": {"name": "forgetful"}})


def test_limits_and_measuring_mean_nothing_to_a_host_alone():
    growth = {"max_parameters": 100, "max_active_seeds": 3, "measured_samples": 16}
    _, record = finished({"lattice": [], "growth": growth})
    assert record.status == "finished"
    assert record.metrics["growth_flops"] == 0


# the log


@pytest.mark.parametrize("name", RUNS)
def test_a_log_can_be_replayed(name):
    options = RUNS[name]
    run = poisoned(*options) if name == "poisoned" else trial(*options)
    run.run_for(math.inf)
    record = run.record()
    config = run.config.model_copy(update={"controller": Plugin(name="static")})
    replayed = Trial(config, run.spec, replayed=TrialRecord.model_validate_json(
        record.model_dump_json()))  # fmt: skip
    if name == "poisoned":
        Poison.layer = replayed.trainer.lattice.layer("fc1")
    replayed.run_for(math.inf)
    again = replayed.record()
    assert again.transitions == record.transitions
    for curve in ("train_loss", "held_out_loss", "parameters"):
        assert str(again.curves[curve]) == str(record.curves[curve])


def test_a_replay_with_another_graft_strategy_is_told_by_the_configuration():
    cosine = {"controller": {"name": "schedule", "options": {
        "at_intervals": [2], "graft": "cosine"}}}  # fmt: skip
    _, record = finished(cosine)
    config = RunConfig.model_validate(RUN | cosine)
    run = Trial(config, TrialSpec("arm", 0, 0, 1, "registered", MARK), replayed=record)
    run.run_for(math.inf)
    assert str(run.record().curves["train_loss"]) == str(record.curves["train_loss"])


def test_a_topology_that_does_not_fit_is_refused(grown):
    change = {"follow": "esper", "start": "grown", "lattice": []}
    with pytest.raises(ConfigError, match="site must be one of"):
        trial(change, followed=grown[1])


def test_outputs_stay_in_the_record_where_the_run_asks_for_them():
    short = {"train": {**RUN["train"], "steps": 20}}
    run, record = finished(short, {"kept_outputs": 5})
    x = run.trainer.data.held_out[0][:5]
    with torch.no_grad():
        wanted = run.trainer.model.eval()(x)
    torch.testing.assert_close(torch.tensor(record.outputs), wanted)
    again = TrialRecord.model_validate_json(record.model_dump_json())
    assert again.outputs == record.outputs
    # records of other runs are written as they were before
    assert "outputs" not in json.loads(finished(short)[1].model_dump_json())


def test_outputs_of_a_network_in_other_processes_are_refused():
    config = RunConfig.model_validate(RUN | {"kept_outputs": 5})
    spec = TrialSpec("arm", 0, 0, 1, "registered", MARK)
    with pytest.raises(ConfigError, match="kept_outputs must be 0 where the network lives in"):
        Trial(config, spec, shards=lambda spec: None)
