"""Whether what the shield forbids is left undone, under a controller that asks for anything."""

from typing import Any

import numpy as np

from esper.config.run import RunConfig
from esper.controller import Shield
from esper.regress.exact import GEOMETRIES, tiny_run, trial
from esper.regress.finding import Finding, capped
from esper.seeds.actions import Action, Advance, Cancel, Cull, Germinate, Promote, Rollback
from esper.seeds.report import Report

KINDS: tuple[type[Action], ...] = (Promote, Advance, Cull, Cancel, Rollback)
BLUEPRINTS = {"chunk": ("mlp_gelu", "low_rank"), "span": ("mlp_relu", "mlp_gelu")}


class _Wild:
    """A controller that asks for something random of half of the seeds, once an interval each."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.asked: list[tuple[int, Action]] = []

    def decide(self, report: Report) -> list[Action]:
        actions: list[Action] = []
        for site in report.sites:
            for seed in range(len(site.stage)):
                pick = int(self._rng.integers(2 * len(KINDS)))
                if pick < len(KINDS):
                    actions.append(KINDS[pick](site.name, seed))
                elif pick == len(KINDS):
                    names = BLUEPRINTS[site.geometry]
                    blueprint = names[int(self._rng.integers(len(names)))]
                    actions.append(Germinate(site.name, seed, blueprint))
        self.asked += [(report.interval, a) for a in actions]
        return actions

    def state_dict(self) -> dict[str, Any]:
        return dict(self._rng.bit_generator.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state


def vetoes(runs: int) -> Finding:
    """Whole runs of such a controller: what was vetoed is not in the log, all else is.

    Args:
        runs: Of both geometries in turn.
    """
    problems, asked, ignored, vetoed = list[str](), 0, 0, 0
    reasons = set[str]()
    for seed in range(runs):
        run = trial(_gated(seed), seed)
        wild = _Wild(seed)
        shield = run.controller = Shield(wild)
        while not run.done:
            run.run_for(0.0)
        done = {(t.interval, t.action) for t in run.trainer.lattice.log}
        forbidden = {(v.interval, v.action) for v in shield.vetoes}
        asked, vetoed = asked + len(wild.asked), vetoed + len(forbidden)
        reasons |= {v.reason.partition(":")[0] for v in shield.vetoes if " is shut" in v.reason}
        ignored += len(forbidden & done)
        # a rollback takes the run back, and what else was asked for in that interval with it
        back = {interval for interval, action in done if isinstance(action, Rollback)}
        undone = {a for a in set(wild.asked) - forbidden - done if a[0] not in back}
        if undone:
            problems.append(f"run {seed}: {len(undone)} allowed actions were not done")
    if ignored:
        problems.append(f"{ignored} of {vetoed} vetoed actions were done all the same")
    if not vetoed or not reasons:
        problems.append(f"{vetoed} actions were vetoed, by the gates {sorted(reasons)}: too few")
    return Finding(
        capped(problems), asked, {"shield_vetoes_ignored": (float(ignored), "count")},
        (f"{vetoed} of {asked} actions were vetoed; gates: {', '.join(sorted(reasons))}",),
    )  # fmt: skip


def _gated(seed: int) -> RunConfig:
    """A run whose gates let little through."""
    config = tiny_run(GEOMETRIES[seed % 2])
    gates = {"min_gain": 1e9, "min_explained_frac": 0.5, "max_parameters": 300}
    return config.model_copy(update={"growth": config.growth.model_copy(update=gates)})
