"""Offline values against known truths, and policies learned from reports that were drawn."""

import mlflow
import numpy as np
import pytest
from typer.testing import CliRunner

from esper.cli.main import app
from esper.config.base import ConfigError
from esper.controller.adaptations import Candidate, Draw, FieldReport
from esper.controller.field_reports import FieldReports
from esper.controller.learned import read_model
from esper.evidence.offline import offline_value
from esper.evidence.policy_training import fit, judge, rewards, waves

TRUE = np.array([0.1, 0.3, 0.6])


def logged(rng, count):
    """Choices of a known policy among three, and their rewards."""
    mu = np.array([0.5, 0.3, 0.2])
    chosen = rng.choice(3, count, p=mu)
    rewards = TRUE[chosen] + rng.normal(0, 0.1, count)
    return chosen, rewards, mu[chosen], [f"run-{i // 4}" for i in range(count)]


@pytest.mark.parametrize("predicted", [TRUE, np.zeros(3), np.array([0.9, 0.0, 0.2])])
def test_the_truth_is_found_and_covered_whatever_the_model_predicts(predicted):
    pi = np.array([0.1, 0.2, 0.7])
    truth = float(pi @ TRUE)
    covered = {"ips": 0, "snips": 0, "dr": 0}
    for seed in range(60):
        chosen, rewards, mu, runs = logged(np.random.default_rng(seed), 400)
        value = offline_value(
            rewards, mu, pi[chosen], predicted[chosen], np.full(400, pi @ predicted), runs
        )
        for name in covered:
            covered[name] += getattr(value, name).low <= truth <= getattr(value, name).high
        assert value.dr.value == pytest.approx(truth, abs=0.25)
        assert 50 < value.effective < 400
    assert all(hits >= 50 for hits in covered.values()), covered


def test_a_good_model_makes_the_doubly_robust_interval_narrow():
    pi = np.array([0.1, 0.2, 0.7])
    chosen, rewards, mu, runs = logged(np.random.default_rng(0), 400)
    value = offline_value(rewards, mu, pi[chosen], TRUE[chosen], np.full(400, pi @ TRUE), runs)
    assert value.dr.high - value.dr.low < 0.5 * (value.ips.high - value.ips.low)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"propensities": [0.0, 0.5]}, "probabilities must be"),
        ({"target": [0.5, 1.5]}, "probabilities must be"),
        ({"rewards": [1.0]}, "one item for each"),
        ({"rewards": [], "propensities": [], "target": [], "predicted": [], "expected": [],
          "runs": []}, "at least one"),
    ],
)  # fmt: skip
def test_wrong_logs_are_refused(change, says):
    given = {"rewards": [1.0, 0.0], "propensities": [0.5, 0.5], "target": [0.5, 0.5],
             "predicted": [0.0, 0.0], "expected": [0.0, 0.0], "runs": ["a", "b"]}  # fmt: skip
    with pytest.raises(ValueError, match=says):
        offline_value(**given | change)


BLUEPRINTS_3 = ("glu", "mlp_relu", "mlp_gelu")


def drawn_reports(runs=40, seed=0, wave=1):
    """Waves whose gain depends on the blueprint and on the energy of each of their seeds."""
    rng = np.random.default_rng(seed)
    for run in range(runs):
        for number in range(6):
            drawn, share = [], 0.0
            for _ in range(wave):
                candidates = tuple(
                    Candidate(site="s", seed=i, blueprint=b, graft="linear", features={
                        "grad_energy": float(rng.lognormal()), "noise": rng.normal(),
                        "cost_frac": 0.25, "held_out_loss": 2.0,
                    })
                    for i, b in enumerate(("mlp_relu", "mlp_gelu", "glu"))
                )  # fmt: skip
                at = int(rng.integers(3))
                drawn.append((candidates, at))
                c = candidates[at]
                share += 0.1 * (c.blueprint == "glu") + 0.02 * np.log(c.features["grad_energy"])
            share += rng.normal(0, 0.02)
            for i, (candidates, at) in enumerate(drawn):
                yield FieldReport(
                    request_id=f"run{run}-{seed}.{number}.{i}", model="m", policy="exploring",
                    interval=1 + number, ended=2 + number, chosen=candidates[at],
                    draw=Draw(candidates=candidates, chosen=at, propensity=1 / 3),
                    # one by one they are worth nothing: taken away, another takes its place
                    outcome="kept", before=2.0 * (1 - share), after=2.0 * (1 - share), gain_se=0.01,
                )  # fmt: skip


@pytest.mark.parametrize("wave", [1, 3])
def test_what_makes_gains_is_learned(wave):
    reports = list(drawn_reports(wave=wave))
    model = fit(reports)
    encoding = model.encoding
    names = (*encoding.features, *encoding.kinds, *encoding.blueprints)
    weight = dict(zip(names, model.weights, strict=False))
    # the kinds and the blueprints tell the same here, of which one is enough
    assert bool(encoding.kinds) != bool(encoding.blueprints)
    glu, relu = (weight.get(f"s: {b}", weight.get(b, 0.0)) for b in ("glu", "mlp_relu"))
    # for each parameter, in units of the typical gain
    shares = [(1 - w[0].after / 2.0) / (0.25 * wave) for w in waves(reports)]
    typical = np.sqrt(np.mean(np.square(shares)))
    assert glu - relu == pytest.approx(0.1 / 0.25 / typical, rel=0.25)
    assert weight["grad_energy"] > 5 * abs(weight.get("noise", 0.0))
    assert model.noise_sd == pytest.approx(0.02 / 0.25 / wave / typical, rel=0.3)
    assert (model.reports, model.waves) == (240 * wave, 240)


def test_what_all_candidates_have_in_common_is_not_learned_from():
    reports = [
        r.model_copy(update={"chosen": r.chosen.model_copy(
            update={"features": r.chosen.features | {"loss": float(i), "grad_norm": 1.0 + i}}
        )})
        for i, r in enumerate(drawn_reports())
    ]  # fmt: skip
    assert "grad_energy" in (features := fit(reports).encoding.features)
    assert not {"loss", "grad_norm"} & {*features}


def test_what_does_not_carry_over_to_other_models_is_not_learned_from():
    """In two of three models the blueprints' gains are those of others."""
    reports = []
    for i, name in enumerate(("a", "b", "c")):
        turned = dict(zip(BLUEPRINTS_3, (BLUEPRINTS_3 * 2)[i : i + 3], strict=True))
        for r in drawn_reports(seed=i):
            chosen = r.chosen.model_copy(update={"blueprint": turned[r.chosen.blueprint]})
            reports.append(r.model_copy(update={"model": name, "chosen": chosen, "draw": None}))
    encoding = fit(reports).encoding
    assert "grad_energy" in encoding.features
    assert (encoding.kinds, encoding.blueprints) == ((), ())


def test_what_was_foretold_whatever_was_grown_is_taken_away():
    rng = np.random.default_rng(0)
    reports = list(drawn_reports(10))
    luck = rng.normal(size=len(reports))
    lucky = [
        told(r, {"loss": float(np.exp(x))}, after=r.after - 0.2 * x)
        for r, x in zip(reports, luck, strict=True)
    ]
    found, plain = rewards(waves(lucky)), rewards(waves(reports))
    assert abs(np.corrcoef(found, luck)[0, 1]) < 0.05
    assert np.corrcoef(found, plain)[0, 1] > 0.9
    # too few to tell luck from merit
    few = rewards(waves(lucky[:10]))
    assert np.corrcoef(few, luck[:10])[0, 1] > 0.7


def test_a_policy_is_judged_by_runs_it_has_not_seen():
    reports = list(drawn_reports())
    found = dict(judge(reports, 0.1))
    assert found["learned"].dr.low > found["any"].dr.high
    assert found["any"].snips.value == pytest.approx(rewards(waves(reports)).mean(), abs=1e-9)
    of_three = dict(judge(list(drawn_reports(wave=3)), 0.1))
    # each choice alone moves its wave by a third
    assert of_three["learned"].dr.low > of_three["any"].dr.value


def told(report, features=None, **change):
    """A report with other features, too."""
    chosen = report.chosen.model_copy(
        update={"features": report.chosen.features | (features or {})}
    )  # fmt: skip
    return report.model_copy(update={"chosen": chosen, **change})


def test_a_reward_is_the_loss_that_a_wave_saved_for_its_parameters():
    first, second, third, other = list(drawn_reports(1, wave=4))[:4]
    one = [told(first, after=1.0)]
    two = [told(second, {"cost_frac": 0.5}, after=1.9, ended=2),
           told(third, {"cost_frac": 0.5}, after=1.0, ended=3)]  # fmt: skip
    a, b = rewards([one, two])
    # half of the loss for a quarter of the parameters, and for all of them
    assert a / b == pytest.approx(4)
    # the root mean square of a model is 1, whatever its gains
    assert np.mean([a * a, b * b]) == pytest.approx(1)
    small = [told(other, after=1.999, model="n")]
    assert rewards([one, two, small]) == pytest.approx([a, b, 1])


def test_a_wave_is_of_one_run_and_one_time():
    reports = list(drawn_reports(2, wave=3))
    found = waves(reports[::-1])
    assert [len(w) for w in found] == [3] * 12
    assert all(len({(r.request_id.split(".")[0], r.interval) for r in w}) == 1 for w in found)


def test_a_reward_is_nothing_where_nothing_was_measured_or_paid():
    report = next(drawn_reports())
    given_up = told(report, before=None, after=None, outcome="culled")
    free = told(report, {"cost_frac": 0.0})
    assert rewards([[given_up], [free], [told(report, after=1.0)]])[:2].tolist() == [0, 0]
    assert rewards([[given_up]]).tolist() == [0]
    worse, doubled = rewards([[told(report, after=100.0)], [told(report, after=4.0)]])
    assert worse == doubled < 0


@pytest.mark.parametrize("name", ["cost_frac", "held_out_loss"])
def test_a_report_without_what_a_reward_needs_is_refused(name):
    report = next(drawn_reports())
    features = {k: v for k, v in report.chosen.features.items() if k != name}
    chosen = report.chosen.model_copy(update={"features": features})
    with pytest.raises(ConfigError, match=f"hold {name}, but those of '{report.request_id}'"):
        rewards([[report.model_copy(update={"chosen": chosen})]])


def test_too_few_reports_are_refused():
    few = list(drawn_reports(5))
    with pytest.raises(ConfigError, match="at least 50 waves"):
        fit(few[:20])
    with pytest.raises(ConfigError, match="at least 5 runs, but 'm' has 1"):
        fit([r.model_copy(update={"request_id": f"run.{i}", "interval": i + 1, "ended": i + 2})
             for i, r in enumerate(drawn_reports(10))])  # fmt: skip
    with pytest.raises(ConfigError, match="drawn by chance"):
        judge([r.model_copy(update={"draw": None}) for r in drawn_reports()], 0.1)


def test_the_command_trains_registers_and_promotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FieldReports("sqlite:///reports.db").append(drawn_reports())
    unmeasured = {"request_id": "u", "before": None, "after": None}
    FieldReports("sqlite:///reports.db").append(
        [next(drawn_reports()).model_copy(update=unmeasured)]
    )
    uri = "sqlite:///mlflow.db"
    trained = CliRunner().invoke(app, [
        "policy", "train", "--reports", "sqlite:///reports.db", "--out", "policy.json",
        "--register", "--tracking-uri", uri,
    ])  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert "240 field reports in 240 waves" in trained.output
    assert "1 adaptations were kept without an evaluation" in trained.output
    assert "models:/tamiyo-policy/1" in trained.output
    unknown = CliRunner().invoke(app, ["policy", "promote", "7", "--tracking-uri", uri])
    assert unknown.exit_code == 2
    promoted = CliRunner().invoke(app, ["policy", "promote", "1", "--tracking-uri", uri])
    assert promoted.exit_code == 0, promoted.output
    mlflow.set_tracking_uri(uri)
    for source in ("models:/tamiyo-policy@champion", "models:/tamiyo-policy@challenger"):
        assert read_model(source) == read_model("policy.json")
    with pytest.raises(ConfigError, match="must be in the registry"):
        read_model("models:/tamiyo-policy/9")
    FieldReports("sqlite:///later.db").append(drawn_reports(seed=1))
    judged = CliRunner().invoke(
        app, ["policy", "evaluate", "policy.json", "--reports", "sqlite:///later.db"]
    )
    assert judged.exit_code == 0, judged.output
    assert "explains +0." in judged.output
