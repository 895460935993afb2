"""`esper baseline` from the command line: exit codes, messages, reports, and what gates read."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from tests.esper.cli.conftest import esper

from esper.cli.baseline import MEASURED, OF_REGRESS, grow, measurements
from esper.config.baseline import load_baseline_config
from esper.evidence import measure
from esper.evidence.baseline import FILE, Baseline, BaselinePlan, places
from esper.evidence.measure import Request, present
from esper.release.judge import GateEvidence, PhaseMeasurements, judge_gate
from esper.release.phases import Quantity, load_migration

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
SMOKE = CONFIGS / "baselines" / "smoke.yaml"
TARGETS = ("--targets", CONFIGS / "phases.yaml")


@pytest.fixture(scope="module")
def arms():
    """One real measurement of each implementation; the planted baselines repeat it."""
    config = load_baseline_config(SMOKE)
    return {n: measure.arm(Request(config=config, implementation=n))
            for n in config.implementations}  # fmt: skip


@pytest.fixture(scope="module")
def grown():
    return grow(load_baseline_config(SMOKE))


@pytest.fixture
def stored(arms, grown, tmp_path):
    """Writes a baseline of 12 blocks whose kasmina P50 is `p50_ms`, and all else as measured."""

    def write(name, p50_ms, **machine):
        config = load_baseline_config(SMOKE).model_copy(
            update={"blocks": 12, "control_blocks": {"legacy": 6, "kasmina": 6}}
        )
        now, here = datetime.now(UTC), measure.Machine.here(config).model_copy(update=machine)
        made = []
        for i, place in enumerate(places(config)):
            arm = arms[place.implementation]
            ms = (p50_ms if place.implementation == "kasmina" else 2.0) * (1 + 1e-4 * i)
            planted = {"forward_b1_p50_ms": present(ms, "ms"), "reference_ms": present(1.0, "ms"),
                       "seeds_per_layer": present(1_024, "count"),
                       "cpu_share_percent": present(99, "percent")}  # fmt: skip
            made.append(arm.model_copy(update={
                **place._asdict(), "metrics": arm.metrics | planted, "machine": here,
                "started_at": now, "ended_at": now,
            }))  # fmt: skip
        plan = BaselinePlan(
            config=config, config_hash=config.hash, machine=here, commit="c0de", dirty_hash=None,
            registered_at=min(a.started_at for a in arms.values()),
        )  # fmt: skip
        facts = measure.facts(config).facts
        draft = Baseline(plan=plan, arms=tuple(made), facts=facts, lifecycle=grown,
                         ended_at=now, content_hash="")  # fmt: skip
        final = draft.model_copy(update={"content_hash": draft.digest()})
        path = tmp_path / name
        path.write_text(final.model_dump_json())
        return path

    return write


def test_show_prints_levels_effects_noise_targets_and_what_is_absent(stored, tmp_path):
    page = tmp_path / "report.html"
    done = esper("baseline", "show", stored("a.json", 1.0), *TARGETS, "--report", page)
    assert done.exit_code == 0, done.output
    for text in (
        "## A/A: kasmina", "False alarms of a whole baseline of 12 pairs",
        "Smallest visible effect", "| forward_b1_p50_ms | 2.00",
        "| energy_per_sample_mj |", "no energy counter" if not Path(
            "/sys/class/powercap/intel-rapl:0/energy_uj").exists() else "mJ",
        "seeds_per_layer >= 1000 count | met | 1024 count",
        "launches_per_site == 1 count | not measured | no GPU",
        "gpu_sm_active_percent > 80 percent | not measured | no GPU",
        "forward_speedup_over_legacy >= 10 ratio | missed",
        "adaptation_success_percent",
    ):  # fmt: skip
        assert text in done.stdout, text
    assert "<table>" in page.read_text()
    assert "forward_b1_p50_ms" in page.read_text()


def test_stored_quantities_feed_the_gate(stored):
    from esper.evidence.baseline import read

    made = measurements(read(stored("a.json", 1.0)))
    plan = load_migration(CONFIGS / "morphogenetic_migration.yaml")
    phase = plan.phases.phase(1)
    evidence = GateEvidence(
        measured=PhaseMeasurements.model_validate_json(made.model_dump_json()),
        judged_at=datetime.now(UTC),
    )
    verdict = judge_gate(evidence, (*phase.gates, *phase.targets), plan.migration.policy)
    # what a machine without a GPU, and a baseline, cannot say is missing, and nothing else; the
    # regression suite tells the rest
    missing = {reason.split()[0] for reason in verdict.reasons if "not measured" in reason}
    assert missing == {"launches_per_site", "regression_failures", *OF_REGRESS}
    asked = {a.metric: a.unit for a in (*phase.gates, *phase.targets)}
    others = {k: Quantity(value=float(k == "launches_per_site"), unit=asked[k]) for k in missing}
    full = evidence.measured.model_copy(
        update={"quantities": evidence.measured.quantities | others}
    )
    again = judge_gate(
        evidence.model_copy(update={"measured": full}),
        (*phase.gates, *phase.targets), plan.migration.policy,
    )  # fmt: skip
    assert again.decision == "ADVANCE", again.reasons


def test_compare_tells_by_its_exit_code(stored):
    before, equal = stored("a.json", 1.0), stored("b.json", 1.0)
    slow, slow_again = stored("c.json", 1.08), stored("d.json", 1.08)
    suspected = esper("baseline", "compare", before, slow)
    assert suspected.exit_code == 10, suspected.output
    assert "Suspected: kasmina forward_b1_p50_ms." in suspected.stdout
    assert "one strike is no regression" in suspected.stdout
    confirmed = esper("baseline", "compare", before, slow, "--again", slow_again)
    assert (confirmed.exit_code, "WORSE twice: kasmina forward_b1_p50_ms" in confirmed.stdout) == (
        20, True,
    )  # fmt: skip
    passed = esper("baseline", "compare", before, equal)
    assert (passed.exit_code, "Suspected: nothing." in passed.stdout) == (0, True)
    # P95 and P99 of a dozen requests are unknown in both: nobody may think that they passed
    assert "judged metrics are absent from both, and nothing is said" in passed.stdout
    spared = esper("baseline", "compare", before, slow, "--again", equal)
    assert (spared.exit_code, "WORSE twice: nothing" in spared.stdout) == (0, True)


def test_what_cannot_be_compared_is_refused_and_nothing_changes(stored, tmp_path):
    before, foreign = stored("a.json", 1.0), stored("b.json", 1.0, cpu="Z80")
    broken = tmp_path / "broken.json"
    broken.write_text(before.read_text()[:1000])
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    report = tmp_path / "r.md"
    for arguments, code, message in (
        (("compare", before, foreign), 2, "must come from one machine class"),
        (("compare", before, broken), 2, "is damaged or something else"),
        (("show", broken), 2, "is damaged or something else"),
        (("show", tmp_path / "none.json"), 3, "No such file"),
        (("show", SMOKE), 2, "is damaged or something else"),
    ):
        done = esper("baseline", *arguments, "--report", report)
        assert (done.exit_code, message in done.stderr) == (code, True), done.output
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_a_phase_without_targets_is_refused_before_anything_is_measured(tmp_path):
    phases = yaml.safe_load((CONFIGS / "phases.yaml").read_text())
    phases["phases"][1]["targets"] = []
    file = tmp_path / "phases.yaml"
    file.write_text(yaml.safe_dump(phases))
    done = esper("baseline", "run", SMOKE, "--out", tmp_path / "new", "--targets", file)
    assert done.exit_code == 2
    assert "phases.1.targets" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_wrong_configuration_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(SMOKE.read_text().replace("busy_s", "busy"))
    done = esper("baseline", "run", file, "--out", tmp_path / "new")
    assert (done.exit_code, "did you mean 'busy_s'?" in done.stderr) == (2, True)
    assert not (tmp_path / "new").exists()


def test_growing_runs_say_how_many_adaptations_succeeded(grown):
    finished = grown["adaptations_finished"].value
    assert finished >= 1
    assert 0 <= grown["adaptation_success_percent"].value <= 100
    none = grow(load_baseline_config(SMOKE).model_copy(update={"lifecycle": None}))
    assert {m.why for m in none.values()} == {"the configuration asks for no growing run"}


@pytest.mark.parametrize("name", ["smoke", "phase0_cpu", "phase0_h200"])
def test_the_projects_configurations_are_valid(name):
    config = load_baseline_config(CONFIGS / "baselines" / f"{name}.yaml")
    assert config.name == name
    if name != "smoke":
        assert config.workload.seeds_per_layer >= 1_000
        assert config.workload.batch_sizes == (1, 16, 32, 64)


def test_it_runs_without_ray_mlflow_and_the_command_lines_libraries(tmp_path):
    """`python -m esper.cli.baseline` on a machine that has little besides torch."""
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'typer', 'rich', 'ruamel', 'mmh3', 'openfeature',\n"
        "             'matplotlib', 'mnist1d'): sys.modules[name] = None\n"
        "import runpy, esper.trial, esper.release.judge\n"
        "sys.argv = ['baseline', 'none.yaml', '--out', 'x']\n"
        "runpy.run_module('esper.cli.baseline', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "none.yaml is not valid" in done.stderr


@pytest.mark.slow
def test_the_smoke_baseline_runs_from_end_to_end(tmp_path):
    done = esper("baseline", "run", SMOKE, "--out", tmp_path / "out", *TARGETS)
    # on a busy machine the reference workload may differ between two arms, which it then says
    assert done.exit_code in (0, 5), done.output
    stored = json.loads((tmp_path / "out" / FILE).read_text())
    assert len(stored["arms"]) == 8
    assert (tmp_path / "out" / MEASURED).exists() == (done.exit_code == 0)
    assert "## Targets" in (tmp_path / "out" / "report.md").read_text()
