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
from esper.evidence.policy_training import fit, judge, reward

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


def drawn_reports(runs=40, seed=0):
    """Adaptations whose gain depends on the blueprint and on the energy."""
    rng = np.random.default_rng(seed)
    for run in range(runs):
        for number in range(6):
            candidates = tuple(
                Candidate(site="s", seed=i, blueprint=b, graft="linear",
                          features={"grad_energy": float(rng.lognormal()), "noise": rng.normal()})
                for i, b in enumerate(("mlp_relu", "mlp_gelu", "glu"))
            )  # fmt: skip
            at = int(rng.integers(3))
            c = candidates[at]
            share = (
                0.1 * (c.blueprint == "glu") + 0.02 * np.log(c.features["grad_energy"])
                + rng.normal(0, 0.02)
            )  # fmt: skip
            yield FieldReport(
                request_id=f"run{run}-{seed}.{number}", model="m", policy="exploring", interval=1,
                ended=2, chosen=c, draw=Draw(candidates=candidates, chosen=at, propensity=1 / 3),
                outcome="kept", before=2.0, after=2.0 * (1 - share), gain_se=0.01,
            )  # fmt: skip


def test_what_makes_gains_is_learned():
    model = fit(list(drawn_reports()))
    weight = dict(zip(
        (*model.encoding.features, *model.encoding.blueprints), model.weights, strict=False
    ))  # fmt: skip
    assert weight["glu"] - weight["mlp_relu"] == pytest.approx(0.1, abs=0.02)
    assert weight["grad_energy"] > 5 * abs(weight["noise"])
    assert model.noise_sd == pytest.approx(0.02, rel=0.3)


def test_a_policy_is_judged_by_runs_it_has_not_seen():
    found = dict(judge(list(drawn_reports()), 0.1))
    assert found["learned"].dr.low > found["any"].dr.high
    assert found["any"].snips.value == pytest.approx(1 / 30, abs=0.02)


def test_a_reward_is_a_share_of_the_loss_or_nothing():
    report = next(drawn_reports())
    assert reward(report) == pytest.approx((report.before - report.after) / 2.0)
    assert reward(report.model_copy(update={"before": None, "after": None})) == 0
    assert reward(report.model_copy(update={"after": 100.0})) == -1


def test_too_few_reports_are_refused():
    few = list(drawn_reports(5))
    with pytest.raises(ConfigError, match="at least 50"):
        fit(few[:20])
    with pytest.raises(ConfigError, match="drawn by chance"):
        judge([r.model_copy(update={"draw": None}) for r in drawn_reports()], 0.1)


def test_the_command_trains_registers_and_promotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FieldReports("sqlite:///reports.db").append(drawn_reports())
    uri = "sqlite:///mlflow.db"
    trained = CliRunner().invoke(app, [
        "policy", "train", "--reports", "sqlite:///reports.db", "--out", "policy.json",
        "--register", "--tracking-uri", uri,
    ])  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert "240 field reports" in trained.output
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
