"""The pages on the migration say what the code does, and stay true."""

import ast
import inspect
import json
import re
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml

from esper.config.baseline import load_baseline_config
from esper.evidence.baseline_workload import build
from esper.regress import exact, numerics
from esper.release.judge import GateEvidence, judge_gate
from esper.release.phases import load_migration
from esper.release.rollout import read_measured
from esper.seeds import legacy
from esper.seeds.state import Stage

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "migration"
BASELINE = ROOT / "docs" / "baselines" / "phase0_h200"
SOURCES = ("platform", "kernels", "experiments", "serve_apps")
MEASURED = [BASELINE / "measured.json", BASELINE / "regress.json"]
PLAN = load_migration(ROOT / "configs" / "morphogenetic_migration.yaml")


def page(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def table(text, first_column):
    """The rows of the table whose first heading is this, without backquotes."""
    (found,) = re.findall(
        rf"^\| `?{re.escape(first_column)}`? \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M
    )
    return [[c.strip() for c in r.replace("`", "").split("|")[1:-1]] for r in found.splitlines()]


def deprecated():
    return table(page("deprecations"), "name")


def message(name, instead, since, removed):
    return (
        f"{name} is deprecated since {since} and will be removed in {removed}; use {instead} "
        "(docs/migration/guide.md)."
    )


def test_the_guide_runs_as_it_stands():
    blocks = re.findall(r"```python\n(.*?)```", page("guide"), re.DOTALL)
    assert len(blocks) >= 6
    code, scope = compile("\n".join(blocks), "guide.md", "exec"), {}
    with pytest.warns(DeprecationWarning, match="is deprecated since"):
        exec(code, scope)


def test_every_name_in_the_timeline_warns_with_its_replacement_and_removal():
    uses = {
        "KasminaLayer": lambda layer: legacy.KasminaLayer(3, 8),
        "KasminaLayer.load_kernel": lambda layer: layer.load_kernel(0, "mlp_relu"),
        "KasminaLayer.unload_kernel": lambda layer: layer.unload_kernel(0),
        "KasminaLayer.set_seed_alpha": lambda layer: layer.set_seed_alpha(0, 0.5),
        "KasminaLayer.get_layer_stats": lambda layer: layer.get_layer_stats(),
        "SeedLifecycleState": lambda layer: legacy.SeedLifecycleState,
    }
    with pytest.warns(DeprecationWarning, match="is deprecated since"):
        layer = legacy.KasminaLayer(3, 8)
    for name, *rest in deprecated():
        use = uses.pop(name.removeprefix("esper.seeds.legacy."))
        text = re.escape(message(name, *rest))
        with pytest.warns(DeprecationWarning, match=f"^{text}$") as caught:
            use(layer)
        (warning,) = caught
        # the warning points at the user's line
        assert warning.filename == __file__
    assert not uses


def test_the_timeline_lists_every_name_that_the_code_deprecates():
    texts = {
        node.value
        for root in SOURCES
        for path in (ROOT / root).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and " is deprecated since " in node.value
    }
    assert texts == {message(*row) for row in deprecated()}


def test_what_measures_against_the_legacy_layer_does_not_warn():
    config = load_baseline_config(ROOT / "configs" / "baselines" / "smoke.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = build(config, "legacy")
        assert any(isinstance(m, legacy.SequentialLayer) for m in built.model.modules())
        assert not exact.legacy_stages().problems
        assert not numerics.outputs((1, 7)).problems


def test_the_phases_in_the_timeline_are_those_that_are_configured():
    rows = [row for row in table(page("deprecations"), "phase") if row[0]]
    stated = [(int(number), name, flag) for number, name, _, flag, *_ in rows]
    phases = PLAN.phases.phases
    assert stated == [(p.number, p.name, p.rollout.flag) for p in phases]
    assert [row[2] for row in rows] == [f"0.{p.number + 1}" for p in phases]
    flags = yaml.safe_load((ROOT / "configs" / "flags.yaml").read_text())["flags"]
    (expires,) = {str(flag["expires"]) for flag in flags.values()}
    assert f"expire on {expires}" in page("deprecations")


def test_the_legacy_api_is_described_as_it_is():
    text = page("legacy_api")
    signature = inspect.signature(legacy.KasminaLayer.__init__)
    stated = re.search(r"KasminaLayer\(\n(.*?)\n\)", text, re.DOTALL)[1]
    stated = [line.strip().rstrip(",") for line in stated.splitlines()]
    own = [p for p in signature.parameters.values() if p.name != "self"]
    assert [s for s in stated if s != "*"] == [str(p) for p in own]
    assert stated.index("*") == sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in own)

    methods = {}
    for name, method in vars(legacy.SequentialLayer).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            drawn = str(inspect.signature(method)).replace("(self, ", "(").replace("(self)", "()")
            methods[name] = name + drawn.replace("torch.Tensor", "Tensor")
    assert [row[0] for row in table(text, "method")] == list(methods.values())

    layer = legacy.SequentialLayer(3, 8)
    attributes = {n.strip() for row in table(text, "attribute") for n in row[0].split(",")}
    public = {n for n in vars(layer) if not n.startswith("_")} - {"training"}
    assert attributes == public | {n for n, _ in layer.named_children()}
    keys = {n.strip() for row in table(text, "key") for n in row[0].split(",")}
    stats = layer.get_layer_stats()
    assert keys == set(stats)
    assert all(f"`{key}`" in text for key in stats["state_stats"])

    stages = [(r[0], int(r[1]), r[2], int(r[3])) for r in table(text, "esper.Stage")]
    old = legacy.LEGACY_STAGE
    assert stages == [(s.name, s.value, old[s].name, old[s].value) for s in Stage]


def test_the_measured_targets_of_phase_0_are_those_that_are_stored():
    measured = json.loads((BASELINE / "measured.json").read_text())
    targets = {t.metric: t for phase in PLAN.phases.phases for t in phase.targets}
    holds = {"<": float.__lt__, ">": float.__gt__, ">=": float.__ge__, "==": float.__eq__}
    rows = table(page("phase0"), "target")
    assert {"forward_p50_ms", "seeds_per_layer", "gpu_sm_active_percent", "launches_per_site"} <= {
        row[1] for row in rows
    }
    for _, metric, wanted, found, met in rows:
        target, stored = targets[metric], measured["quantities"][metric]
        assert wanted == f"{target.comparison} {target.value:g} {target.unit}"
        assert found == f"{stored['value']:g} {stored['unit']}"
        assert met == ("yes" if holds[target.comparison](stored["value"], target.value) else "no")
    assert measured["commit"][:7] in page("phase0")


@pytest.mark.parametrize("number", [0, 1])
def test_the_gates_say_what_the_page_says(number):
    """As of an hour after the measurement: a gate refuses evidence that is a week old."""
    measured = read_measured(MEASURED)
    evidence = GateEvidence(measured=measured, judged_at=measured.ended_at + timedelta(hours=1))
    phase = PLAN.phases.phase(number)
    verdict = judge_gate(evidence, (*phase.gates, *phase.targets), PLAN.migration.policy)
    files = " ".join(f"--measured {path.relative_to(ROOT)}" for path in MEASURED)
    said = [f"$ esper gate --phase {number} {files}", f"phase {number}: {verdict.decision}"]
    said += [f"      {reason}" for reason in verdict.reasons]
    assert "\n".join(said) in page("phase0")


def test_the_evidence_that_the_page_names_is_there():
    rows = table(page("phase0"), "task")
    assert len(rows) == 10
    for _, state, evidence, _ in rows:
        assert state == "done"
        assert not [name for name in evidence.split(", ") if not (ROOT / name).exists()]


def test_old_weights_load_into_the_layer_that_hands_them_over():
    """As the guide says: blueprints and alphas first, then a stored `state_dict`."""
    old = legacy.SequentialLayer(16, 8)
    old.load_kernel(1, "mlp_silu")
    old.set_seed_alpha(1, 0.5)
    with torch.no_grad():
        old.seeds[1].w2.normal_()
    again = legacy.SequentialLayer(16, 8)
    again.load_kernel(1, "mlp_silu")
    again.set_seed_alpha(1, 0.5)
    again.load_state_dict(old.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(again(x), old(x))
