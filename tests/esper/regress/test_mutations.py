"""Every check of the suite catches the faults that it is there for, planted in the real code."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from esper.controller import Shield
from esper.controller.heuristic import HeuristicController
from esper.evidence import planning
from esper.regress import compiled, exact, kernels, numerics, rules, shield, training
from esper.regress.finding import Finding
from esper.regress.suite import checks, run_checks
from esper.release import snapshot
from esper.release.judge import Decision, GateEvidence, judge_gate
from esper.release.phases import load_migration
from esper.seeds import kasmina, legacy, lifecycle, loop
from esper.seeds.actions import Advance, Cull, Promote
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import SeedState, Stage
from esper.training.trainer import Trainer
from esper_kernels import Phi
from esper_kernels.ops import chunk, pool_step, span
from esper_kernels.reference import backward as reference

ROOT = Path(__file__).parents[3]
# interpreted on a CPU, as `conftest.py` says
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "transitions": lambda: exact.transitions(20_000),
    "commanded_lattice": lambda: exact.commanded_lattice(5_000),
    "legacy_stages": exact.legacy_stages,
    "streams": lambda: exact.streams(300),
    "decisions": lambda: exact.decisions(2),
    "dormant": exact.dormant,
    "rollback": exact.rollback,
    "shapes": lambda: numerics.shapes(40),
    "outputs": lambda: numerics.outputs((7,)),
    "laws": lambda: numerics.laws(3),
    "kernels": lambda: kernels.kernels(DEVICE, quick=True),
    "recompilations": lambda: compiled.recompilations(),
    "vetoes": lambda: shield.vetoes(2),
    "flags": lambda: rules.flags(500),
    "false_wins": lambda: rules.false_wins(500),
    "equivalence": lambda: training.equivalence(5),
}


def test_the_small_suite_has_every_check():
    assert SMALL.keys() == checks(quick=True, device="cpu").keys()


def slow(*values, names=("equivalence",)):
    """Whole trainings, interpreted kernels and compilers take their time."""
    return pytest.param(*values, marks=[pytest.mark.slow] if values[0] in names else [])


@pytest.mark.parametrize("name", [slow(name) for name in SMALL])
def test_healthy_code_passes(name):
    found = SMALL[name]()
    assert found.problems == ()
    assert found.cases > 0


def a_terminal_stage_is_left(patch):
    patch.setitem(lifecycle.MOVES, (Stage.FOSSILIZED, Cull), Stage.CULLED)


def a_legal_move_is_refused(patch):
    patch.delitem(lifecycle.MOVES, (Stage.GERMINATED, Promote))


def a_culled_slot_keeps_its_blueprint(patch):
    real = lifecycle.advance

    def advance(state, action):
        after = real(state, action)
        return SeedState(after.stage, state.blueprint_id) if after.stage is Stage.DORMANT else after

    patch.setattr(lifecycle, "advance", advance)


def a_culled_seed_keeps_its_alpha(patch):
    real = KasminaLayer.on_enter

    def on_enter(self, seeds, stage, loss):
        if stage is not Stage.CULLED:
            real(self, seeds, stage, loss)

    patch.setattr(KasminaLayer, "on_enter", on_enter)


def an_old_stage_is_another(patch):
    patch.setitem(legacy.LEGACY_STAGE, Stage.GRAFTING, legacy.LegacyStage.ACTIVE)


def an_old_stage_is_missing(patch):
    patch.delitem(legacy.LEGACY_STAGE, Stage.CULLED)


def one_number_too_many_is_drawn(patch):
    real = KasminaLayer.initialise

    def initialise(self, generators, **options):
        real(self, generators, **options)
        for generator in generators.values():
            torch.rand(1, generator=generator)

    patch.setattr(KasminaLayer, "initialise", initialise)


def of_loop(patch, change):
    """Changes what the loop's chunk sites return."""
    real = loop.chunk_seeds

    def chunk_seeds(x_TD, *args, **options):
        return change(real(x_TD, *args, **options), x_TD)

    patch.setattr(loop, "chunk_seeds", chunk_seeds)


def the_loop_draws_random_numbers(patch):
    def change(y, _):
        torch.rand(1)
        return y

    of_loop(patch, change)


def decisions_hang_on_something_else(patch):
    real, calls = HeuristicController.decide, itertools.count()

    def decide(self, report):
        return real(self, report) if next(calls) % 5 else []

    patch.setattr(HeuristicController, "decide", decide)


def the_report_of_the_loop_is_another(patch):
    real = KasminaLayer.telemetry

    def telemetry(self):
        told = real(self)
        if self.execution == "loop":
            told["grad_energy"] = told["grad_energy"].flip(0)
        return told

    patch.setattr(KasminaLayer, "telemetry", telemetry)


def sleeping_seeds_are_computed(patch):
    real = loop._awake

    def awake(pool, alpha_S, learning_S, dtype):
        return real(pool, torch.where(alpha_S == 0, 1e-30, alpha_S), learning_S, dtype)

    patch.setattr(loop, "_awake", awake)


def the_hosts_gradient_is_touched(patch):
    patch.setattr(
        kasmina._Alongside, "backward",
        staticmethod(lambda ctx, dy: (dy * (1 + 1e-3), ctx.to_rows(dy), None)),
    )  # fmt: skip


def a_rollback_forgets_the_optimizer(patch):
    real = Trainer._restore

    def restore(self, snapshot):
        kept = self.optimizer.state_dict()
        real(self, snapshot)
        self.optimizer.load_state_dict(kept)

    patch.setattr(Trainer, "_restore", restore)


def a_rollback_forgets_the_generators(patch):
    patch.setattr(Trainer, "set_random_state", lambda self, state: None)


def a_slope_is_wrong(patch):
    patch.setitem(reference._SLOPES, Phi.GELU, lambda dh, z: dh * torch.sigmoid(1.702 * z))


def a_frozen_seed_learns(patch):
    real = loop._awake

    def awake(pool, alpha_S, learning_S, dtype):
        return real(pool, alpha_S, torch.ones_like(learning_S), dtype)

    patch.setattr(loop, "_awake", awake)


def the_isolated_target_has_another_sign(patch):
    real = loop.target_of
    patch.setattr(loop, "target_of", lambda *args: -real(*args))


def outputs_are_off_by_a_thousandth(patch):
    of_loop(patch, lambda y, _: y * 1.001)


def an_old_seed_is_off_by_a_thousandth(patch):
    real = legacy._Seed.forward
    patch.setattr(legacy._Seed, "forward", lambda self, x: real(self, x) * 1.001)


def a_seed_hangs_on_its_place(patch):
    of_loop(patch, lambda y, _: y * torch.linspace(1, 1.001, y.shape[1]))


def a_row_hangs_on_its_batch(patch):
    of_loop(patch, lambda y, x: y + 1e-3 * x.mean())


def the_loop_trains_something_else(patch):
    of_loop(patch, lambda y, x: torch.where(torch.arange(y.shape[1]) % 2 == 0, 0 * y, 9 - y))


def the_loop_is_not_its_own_twin(patch):
    calls = itertools.count()
    of_loop(patch, lambda y, _: y * (1 + 1e-6 * math.sin(next(calls))))


def a_kernel_is_off_by_a_thousandth(patch):
    real = chunk.forward

    def forward(*args):
        y, stats = real(*args)
        return y * 1.001, stats

    patch.setattr(chunk, "forward", forward)


def a_kernel_forgets_a_gradient(patch):
    real = span.backward

    def backward(*args):
        dx, dw_in, db, *rest = real(*args)
        return dx, dw_in, torch.zeros_like(db), *rest

    patch.setattr(span, "backward", backward)


def the_optimizers_kernel_leaves_grafts_where_they_are(patch):
    real = pool_step.launch

    def launch(pool, flags, ramp, *rest):
        real(pool, flags, ramp._replace(alpha=ramp.alpha.clone()), *rest)

    patch.setattr(pool_step, "launch", launch)


def a_stage_change_is_a_change_of_code(patch):
    real_enter, real_forward = KasminaLayer.on_enter, KasminaLayer.forward

    def on_enter(self, seeds, stage, loss):
        real_enter(self, seeds, stage, loss)
        # once a life, or the compiler gives up and raises
        self.planted = getattr(self, "planted", False) or stage is Stage.FINE_TUNING

    def forward(self, *args):
        y = real_forward(self, *args)
        return y + 0 if getattr(self, "planted", False) else y

    patch.setattr(KasminaLayer, "on_enter", on_enter)
    patch.setattr(KasminaLayer, "forward", forward)


def a_compiled_layer_does_nothing(patch):
    real = KasminaLayer.forward

    def forward(self, h, source=None):
        return h if torch.compiler.is_compiling() else real(self, h, source)

    patch.setattr(KasminaLayer, "forward", forward)


def a_shut_gate_lets_through(patch):
    real = Shield.decide

    def decide(self, report):
        allowed = real(self, report)
        shut = [
            v.action for v in self.vetoes
            if v.interval == report.interval and isinstance(v.action, Advance)
            and " is shut" in v.reason
        ]  # fmt: skip
        return [*allowed, *shut[:1]]

    patch.setattr(Shield, "decide", decide)


def a_bucket_is_not_kept(patch):
    numbers = itertools.count()
    patch.setattr(snapshot, "_bucket", lambda prefix, model: next(numbers) * 7_919 % 10_000)


def a_full_share_leaves_some_out(patch):
    real = snapshot._bucket
    patch.setattr(snapshot, "_bucket", lambda prefix, model: real(prefix, model) + 200)


def p_values_are_halved(patch):
    real = planning.sign_flips
    patch.setattr(planning, "sign_flips", lambda d: tuple(p / 2 for p in real(d)))


FAULTS = [
    ("transitions", a_terminal_stage_is_left),
    ("transitions", a_legal_move_is_refused),
    ("transitions", a_culled_slot_keeps_its_blueprint),
    ("commanded_lattice", a_terminal_stage_is_left),
    ("commanded_lattice", a_culled_seed_keeps_its_alpha),
    ("legacy_stages", an_old_stage_is_another),
    ("legacy_stages", an_old_stage_is_missing),
    ("streams", one_number_too_many_is_drawn),
    ("streams", the_loop_draws_random_numbers),
    ("decisions", decisions_hang_on_something_else),
    ("decisions", the_report_of_the_loop_is_another),
    ("dormant", sleeping_seeds_are_computed),
    ("dormant", the_hosts_gradient_is_touched),
    ("rollback", a_rollback_forgets_the_optimizer),
    ("rollback", a_rollback_forgets_the_generators),
    ("shapes", a_slope_is_wrong),
    ("shapes", a_frozen_seed_learns),
    ("shapes", the_isolated_target_has_another_sign),
    ("shapes", outputs_are_off_by_a_thousandth),
    ("outputs", an_old_seed_is_off_by_a_thousandth),
    ("laws", a_seed_hangs_on_its_place),
    ("laws", a_row_hangs_on_its_batch),
    ("kernels", a_kernel_is_off_by_a_thousandth),
    ("kernels", a_kernel_forgets_a_gradient),
    ("kernels", the_optimizers_kernel_leaves_grafts_where_they_are),
    ("recompilations", a_stage_change_is_a_change_of_code),
    ("recompilations", a_compiled_layer_does_nothing),
    ("vetoes", a_shut_gate_lets_through),
    ("flags", a_bucket_is_not_kept),
    ("flags", a_full_share_leaves_some_out),
    ("false_wins", p_values_are_halved),
    ("equivalence", the_loop_trains_something_else),
    ("equivalence", the_loop_is_not_its_own_twin),
]


@pytest.mark.parametrize(
    ("name", "fault"),
    [slow(*f, names=("equivalence", "kernels", "recompilations")) for f in FAULTS],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_planted_fault_is_caught(name, fault, monkeypatch):
    fault(monkeypatch)
    assert SMALL[name]().problems


def test_every_check_has_a_fault():
    assert {name for name, _ in FAULTS} == SMALL.keys()


def run(**chosen):
    return run_checks({n: ("exact", c) for n, c in chosen.items()}, lambda record: None)


def test_a_check_that_raises_has_failed_and_measured_nothing():
    def broken():
        raise RuntimeError("planted")

    measured = run(dormant=broken, legacy_stages=exact.legacy_stages)
    assert measured.quantities["regression_failures"].value == 1
    assert "dormant_changed_bits" not in measured.quantities
    assert measured.checks[0].problems == ("RuntimeError: planted",)


def test_a_check_that_compared_nothing_has_failed():
    measured = run(empty=lambda: Finding((), 0))
    assert measured.checks[0].problems == ("nothing was compared",)


def test_the_gates_read_the_report():
    """Each quantity has the name and unit that the phases ask for, and decides there."""
    plan = load_migration(ROOT / "configs/morphogenetic_migration.yaml")
    names = ("transitions", "legacy_stages", "decisions", "dormant", "rollback", "outputs",
             "false_wins")  # fmt: skip
    measured = run(**{n: SMALL[n] for n in names})
    asked = {
        a.metric: a for p in plan.phases.phases for a in (*p.gates, *p.targets)
        if a.metric in measured.quantities
    }  # fmt: skip
    assert asked.keys() == measured.quantities.keys()
    evidence = GateEvidence(measured=measured, judged_at=measured.ended_at)
    verdict = judge_gate(evidence, tuple(asked.values()), plan.migration.policy)
    assert verdict.decision is Decision.ADVANCE


def test_a_failure_holds_the_gate(monkeypatch):
    an_old_stage_is_another(monkeypatch)
    plan = load_migration(ROOT / "configs/morphogenetic_migration.yaml")
    measured = run(legacy_stages=exact.legacy_stages)
    evidence = GateEvidence(measured=measured, judged_at=measured.ended_at)
    gates = plan.phases.phase(0).gates
    assert judge_gate(evidence, gates, plan.migration.policy).decision is Decision.HOLD
