"""The contract of every controller, as tests that any plug-in inherits.

Example:
    >>> from esper.controller import RandomOptions
    >>> class TestMine(ControllerContract):
    ...     def make(self, seed):
    ...         return RandomOptions(at_intervals=(1, 2)).build(seed)
    >>> TestMine().test_every_action_is_legal()

pytest collects such a class; its tests need no fixture, so that they run anywhere.
"""

import copy
import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace

import numpy as np

from esper.config.run import GrowthConfig
from esper.controller.base import Controller, memory_of, remind
from esper.seeds.actions import Action
from esper.seeds.blueprints import BLUEPRINTS, Geometry
from esper.seeds.grafting import GRAFTS
from esper.seeds.lifecycle import advance
from esper.seeds.report import Floats, Report, SiteReport
from esper.seeds.state import GRAFTED_STAGES, Stage
from esper.surgery.growth_log import pack_action

NUM_REPORTS = 30
_LIVE = [s for s in Stage if s is not Stage.DORMANT]


class ControllerContract:
    """What holds for every controller; a subclass says how to make one."""

    def make(self, seed: int) -> Controller:
        """A controller at the start of a run."""
        raise NotImplementedError(f"{type(self).__name__} must define make(seed).")

    def test_it_returns_a_list_of_actions(self) -> None:
        """Nothing but actions, also on a report that holds every stage."""
        for _, actions in self._run(seed=0):
            assert isinstance(actions, list)
            assert all(isinstance(action, Action) for action in actions), actions

    def test_every_action_is_legal(self) -> None:
        """Applied in order, no action of a report meets a stage that refuses it."""
        for seed in range(5):
            for report, actions in self._run(seed):
                states = {
                    (site.name, i): site.state(i)
                    for site in report.sites
                    for i in range(len(site.stage))
                }
                for action in actions:
                    place = (action.site, action.seed)
                    states[place] = advance(states[place], action)

    def test_the_same_seed_and_reports_give_the_same_actions(self) -> None:
        """A run can be repeated."""
        for seed in range(3):
            first, second = ([a for _, a in self._run(seed)] for _ in range(2))
            assert first == second

    def test_the_report_is_left_as_it_is(self) -> None:
        """Whoever gets the report next sees what was measured."""
        controller = self.make(0)
        for report in random_reports(0):
            before = pickle.dumps(report)
            controller.decide(report)
            assert pickle.dumps(report) == before

    def test_a_copied_or_pickled_report_gives_the_same_actions(self) -> None:
        """Reports travel between processes."""
        here, there = self.make(0), self.make(0)
        for i, report in enumerate(random_reports(0)):
            travelled = pickle.loads(pickle.dumps(report)) if i % 2 else copy.deepcopy(report)
            assert here.decide(report) == there.decide(travelled)

    def test_its_memory_survives_a_file_and_a_rollback(self) -> None:
        """A new controller, or the same one later, goes on as the first did from there."""
        reports = list(random_reports(0))
        for middle in (1, 4, 15):
            controller = self.make(0)
            for report in reports[:middle]:
                controller.decide(report)
            memory = memory_of(controller)
            expected = [controller.decide(report) for report in reports[middle:]]
            for again in (controller, self.make(0)):
                remind(again, json.loads(json.dumps(memory)))
                assert [again.decide(report) for report in reports[middle:]] == expected

    def test_a_model_without_sites_gets_no_action(self) -> None:
        """A host alone can be run with any controller."""
        controller = self.make(0)
        for report in random_reports(0):
            assert controller.decide(replace(report, sites=())) == []

    def _run(self, seed: int) -> Iterator[tuple[Report, list[Action]]]:
        controller = self.make(seed)
        for report in random_reports(seed):
            yield report, controller.decide(report)


def without_reasons(actions: Iterable[Action]) -> list[object]:
    """What is decided, to be compared; reasons quote measurements, which differ in rounding."""
    packed = map(pack_action, actions)
    return [(p["action"], {k: v for k, v in p["fields"].items() if k != "reason"}) for p in packed]


def random_reports(seed: int, count: int = NUM_REPORTS) -> Iterator[Report]:
    """Reports of consecutive intervals with seeds in all stages; every value is measured.

    Args:
        seed: Seed of the draw.
        count: Number of reports.
    """
    rng = np.random.default_rng(seed)
    growth = GrowthConfig(patience_intervals=2, fine_tuning_intervals=2, embargo_intervals=2)
    for interval in range(1, count + 1):
        # at times nothing is in the pipeline, so that a controller may start a wave
        busy_frac = rng.choice([0.0, 0.3, 1.0])
        yield Report(
            interval=interval,
            step=100 * interval,
            loss=float(rng.random()),
            held_out_loss=float(rng.random()),
            grad_norm=float(rng.random()),
            host_drift_frac=float(rng.random()),
            host_parameters=1000,
            parameters=1000 + int(rng.integers(500)),
            growth=growth,
            sites=(
                random_site(rng, "chunks", "chunk", busy_frac),
                random_site(rng, "span->span", "span", busy_frac),
            ),
        )


def random_site(
    rng: np.random.Generator, name: str, geometry: Geometry, busy_frac: float, num_seeds: int = 24
) -> SiteReport:
    """One site with seeds in all stages.

    Args:
        rng: Source of the draws.
        name: Name of the site.
        geometry: 'chunk' or 'span'.
        busy_frac: Share of the seeds that are not dormant.
        num_seeds: Seeds.
    """
    live = rng.random(num_seeds) < busy_frac
    stage = np.where(live, rng.choice(_LIVE, num_seeds), Stage.DORMANT).astype(np.int32)
    measured: dict[str, Floats] = {
        f.name: rng.random(num_seeds, dtype=np.float32)
        for f in fields(SiteReport)
        if f.type is Floats
    }
    measured["alpha"] = np.where(np.isin(stage, list(GRAFTED_STAGES)), measured["alpha"], 0.0)
    measured["gain"] = measured["gain"] - np.float32(0.5)
    return SiteReport(
        name=name,
        geometry=geometry,
        stage=stage,
        blueprint_id=np.where(live, tuple(BLUEPRINTS).index("mlp_relu"), 0).astype(np.int32),
        epochs=rng.integers(0, 5, num_seeds, dtype=np.int32),
        graft_id=rng.integers(0, len(GRAFTS), num_seeds, dtype=np.int32),
        seed_parameters={
            n: BLUEPRINTS[n].parameters(geometry, 4, 4 if geometry == "chunk" else 1, 4)
            for n in BLUEPRINTS
            if geometry in BLUEPRINTS[n].geometries
        },
        unexplained=float(rng.random()),
        scored_blueprint="mlp_relu",
        **measured,
    )
