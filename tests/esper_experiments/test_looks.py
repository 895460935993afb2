"""`esper ab` with planned looks and a metric of the user's own, for real."""

import shutil

import pytest
from mlflow import MlflowClient

from esper.evidence.verify import verify

PLUGIN = """
import esper

@esper.metric("weight_energy", unit="", higher_is_better=True)
def weight_energy(trained):
    return sum(float(p.detach().square().sum()) for p in trained.model.parameters())
"""
RUN = {
    "task": {"name": "spirals", "options": {"train_samples": 100, "held_out_samples": 50,
                                            "test_samples": 50}},
    "host": {"name": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 40, "learning_rate": 0.02, "interval_steps": 20},
    "plugins": ["my_metrics"],
    "metrics": ["weight_energy"],
}  # fmt: skip
QUESTION = {
    "treatment": "fast", "control": "slow", "metric": "weight_energy", "margin": 0.001,
    "looks": [8, 12, 16],
    "secondary": [{"treatment": "fast", "control": "slow", "metric": "test_loss",
                   "higher_is_better": False, "margin": 0.01}],
    "guardrails": [{"metric": "parameters", "margin": 0}],
}  # fmt: skip
ARMS = {"fast": {}, "slow": {"train": {"learning_rate": 1e-6}}}


@pytest.fixture
def make(make_sweep):
    """A sweep that a single look decides, with some keys of its question changed."""

    def make(question, **changes):
        keys = {"run": RUN, "arms": ARMS, "pairs": 16, "question": QUESTION | question}
        sweep = make_sweep(**keys | changes)
        (sweep.folder / "my_metrics.py").write_text(PLUGIN)
        return sweep

    return make


@pytest.mark.slow
def test_a_look_that_decides_ends_the_sweep_and_is_verified(make, tmp_path):
    sweep = make({})
    done = sweep.run()
    assert done.returncode == 0, done.stdout
    result = sweep.result()
    assert (result["verdict"], result["pairs"], result["metric"]) == ("WIN", 8, "weight_energy")
    assert any("Look 1 of 3 was the last one, after 8 pairs" in r for r in result["reasons"])
    assert [s["metric"] for s in result["secondary"]] == ["test_loss"]
    assert len(sweep.records()) == 16

    client = MlflowClient(f"sqlite:///{sweep.folder}/mlflow.db")
    parent = client.get_run(result["mlflow_run_id"])
    where = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], where)
    assert len(children) == 16
    assert all(c.data.metrics["final/weight_energy"] > 0 for c in children)

    again = sweep.run()
    assert "16 of 32 trials had finished before" in again.stdout
    assert sweep.result()["verdict"] == "WIN"

    (folder,) = sweep.folder.glob("runs/*/")
    assert verify(folder).findings == ()
    late = folder / "trials" / "fast-008.json"
    text = (folder / "trials" / "fast-007.json").read_text()
    late.write_text(text.replace("fast-007", "fast-008").replace('"pair": 7', '"pair": 8'))
    assert (
        "trials/fast-008.json is of a pair after the look that decided." in verify(folder).findings
    )
    late.unlink()
    shutil.move(folder / "trials" / "fast-007.json", tmp_path)
    findings = " ".join(verify(folder).findings)
    assert "trials/fast-007.json is missing: no record of a registered run." in findings
    assert "fast-008" not in findings


@pytest.mark.slow
def test_an_undecided_look_lets_the_sweep_go_on(make):
    # arms that differ by their seed alone: never decided by 8 or 12 pairs with such a margin
    arms = {"fast": {}, "slow": {"seed_salt": 1}}
    question = {"looks": [8, 12], "margin": 1e-9, "secondary": [], "guardrails": []}
    sweep = make(question, pairs=12, arms=arms)
    done = sweep.run()
    assert done.returncode == 0, done.stdout
    assert (sweep.result()["verdict"], sweep.result()["pairs"]) == ("INCONCLUSIVE", 12)
    assert len(sweep.records()) == 24
