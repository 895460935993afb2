"""Pictures hold what they are to show, down to their pixels."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from esper.evidence.records import Registration, TransitionRecord, TrialRecord
from esper.evidence.verdict import Verdict, judge_all
from esper.seeds.state import Stage
from esper.tracking.growth_picture import curves_on_steps
from esper.tracking.lattice_picture import STAGE_COLORS, STAGES
from esper.tracking.pictures import (
    arms_overview,
    forest_plot,
    growth_curves,
    lattice_over_time,
    stage_matrix,
)
from esper.tracking.style import ARM_COLORS, VERDICT_COLORS, arm_colors

MakeTrial = Callable[..., TrialRecord]
FOLLOWERS = frozenset({"static-final", "random", "schedule"})


def has_color(path: Path, color: str, least_pixels: int = 20) -> bool:
    """True if the picture is a PNG of 900 pixels' width with that many pixels of the colour."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", head[16:20]) == (900,)
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = np.round(imread(path)[..., :3] * 255)
    return int((np.abs(pixels - wanted).max(axis=-1) <= 1).sum()) >= least_pixels


def with_log(record: TrialRecord, *moves: tuple[int, str, int, str]) -> TrialRecord:
    log = [
        TransitionRecord(
            interval=0,
            step=step,
            site=site,
            seed=seed,
            action="a",
            before="b",
            after=after,
            blueprint="relu",
            reason="r",
        )
        for step, site, seed, after in moves
    ]
    return record.model_copy(update={"transitions": log})


class TestStageMatrix:
    def test_replays_the_growth_log(self, make_trial: MakeTrial) -> None:
        record = with_log(
            make_trial("esper", 0, num_intervals=5, num_seeds=2),
            (200, "fc2", 1, "GERMINATED"),
            (300, "fc2", 1, "TRAINING"),
            (300, "fc1", 1, "GERMINATED"),
            (400, "fc2", 1, "CULLED"),
            (400, "fc2", 1, "DORMANT"),
        )
        matrix = stage_matrix(record)
        assert matrix.rows == (("fc1", 1), ("fc1", 0), ("fc2", 1), ("fc2", 0))
        assert matrix.stages.tolist() == [
            [0, 0, 1, 1, 1],
            [0, 0, 0, 0, 0],
            [0, 1, 2, 0, 0],
            [0, 0, 0, 0, 0],
        ]
        assert matrix.asleep == {"fc1": 0, "fc2": 0}

    def test_of_many_seeds_only_those_that_woke_have_a_row(self, make_trial: MakeTrial) -> None:
        record = with_log(
            make_trial("esper", 0, num_intervals=3, num_seeds=4096),
            (100, "fc1", 7, "GERMINATED"),
            (200, "fc1", 3, "GERMINATED"),
        )
        matrix = stage_matrix(record)
        assert matrix.rows == (("fc1", 7), ("fc1", 3))
        assert matrix.asleep == {"fc1": 4094, "fc2": 4096}

    def test_what_came_after_the_last_interval_is_in_the_last_column(
        self, make_trial: MakeTrial
    ) -> None:
        record = with_log(
            make_trial("esper", 0, num_intervals=3, num_seeds=1), (350, "fc1", 0, "ROLLED_BACK")
        )
        assert stage_matrix(record).stages[0].tolist() == [0, 0, Stage.ROLLED_BACK]

    def test_unknown_stages_and_sites_are_refused(self, make_trial: MakeTrial) -> None:
        trial = make_trial("esper", 0)
        with pytest.raises(ValueError, match=r"stage must be one of DORMANT, .*, but got ASLEEP"):
            stage_matrix(with_log(trial, (100, "fc1", 0, "ASLEEP")))
        with pytest.raises(ValueError, match=r"site must be one of fc1, fc2, but .* has fc9"):
            stage_matrix(with_log(trial, (100, "fc9", 0, "TRAINING")))

    def test_a_trial_without_an_interval_is_refused(self, make_trial: MakeTrial) -> None:
        empty = make_trial("esper", 0).model_copy(update={"curves": {"step": []}})
        with pytest.raises(ValueError, match="curves of esper-000 must hold at least one interval"):
            stage_matrix(empty)

    def test_numbers_are_those_of_the_lifecycle(self) -> None:
        assert tuple(stage.name for stage in Stage) == STAGES


class TestLattice:
    def test_shows_each_stage_that_occurs(self, make_trial: MakeTrial, tmp_path: Path) -> None:
        record = with_log(
            make_trial("esper", 0, num_seeds=4),
            *((300 * i, "fc1", i % 4, stage) for i, stage in enumerate(STAGES)),
        )
        path = lattice_over_time(record, tmp_path / "lattice.png")
        assert all(has_color(path, color, 100) for color in STAGE_COLORS.values())

    def test_thousands_of_seeds_in_many_sites(self, make_trial: MakeTrial, tmp_path: Path) -> None:
        sites = {f"blocks.{i}": 1024 for i in range(12)}
        moves = [(100 * (1 + i % 29), f"blocks.{i % 8}", i, "FOSSILIZED") for i in range(800)]
        record = make_trial("esper", 0).model_copy(update={"sites": sites})
        path = lattice_over_time(with_log(record, *moves), tmp_path / "lattice.png")
        assert has_color(path, STAGE_COLORS["FOSSILIZED"], 1000)
        assert imread(path).shape[0] < 1200

    def test_a_host_that_never_grew(self, make_trial: MakeTrial, tmp_path: Path) -> None:
        path = lattice_over_time(make_trial("host", 0), tmp_path / "lattice.png")
        assert has_color(path, STAGE_COLORS["DORMANT"], 100)


class TestCurves:
    def test_shorter_trials_are_nan_where_they_have_no_value(self, make_trial: MakeTrial) -> None:
        long, short = make_trial("esper", 0, num_intervals=3), make_trial("esper", 1)
        short = short.model_copy(update={"curves": {"step": [100.0], "train_loss": [np.inf]}})
        steps, values = curves_on_steps([long, short], "train_loss")
        assert steps.tolist() == [100, 200, 300]
        assert values[0].tolist() == long.curves["train_loss"]
        assert np.isnan(values[1]).all()

    def test_each_arm_has_its_color(self, sweep_records: list[TrialRecord], tmp_path: Path) -> None:
        path = growth_curves(sweep_records, "test_accuracy", tmp_path / "growth.png")
        assert all(has_color(path, color) for color in ARM_COLORS.values())

    def test_an_arm_that_collapsed_at_once(self, make_trial: MakeTrial, tmp_path: Path) -> None:
        dead = make_trial("random", 0, collapsed=True)
        gone = {
            k: v if k in ("step", "parameters") else [np.nan] * 30 for k, v in dead.curves.items()
        }
        records = [make_trial("esper", 0), dead.model_copy(update={"curves": gone})]
        path = growth_curves(records, "test_accuracy", tmp_path / "growth.png")
        assert has_color(path, ARM_COLORS["esper"])

    def test_a_trial_that_completed_no_interval(
        self, make_trial: MakeTrial, tmp_path: Path
    ) -> None:
        dead = make_trial("random", 0, collapsed=True)
        empty: dict[str, list[float]] = {name: [] for name in dead.curves}
        records = [make_trial("esper", 0), dead.model_copy(update={"curves": empty})]
        path = growth_curves(records, "test_accuracy", tmp_path / "growth.png")
        assert has_color(path, ARM_COLORS["esper"])

    def test_a_missing_curve_is_refused(self, make_trial: MakeTrial, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="curves of esper-000 must hold 'test_f1', but got"):
            growth_curves([make_trial("esper", 0)], "test_f1", tmp_path / "x.png")
        with pytest.raises(ValueError, match="records must hold at least one trial"):
            growth_curves([], "test_accuracy", tmp_path / "x.png")


class TestForest:
    def test_each_verdict_has_its_color(self, verdicts: list[Verdict], tmp_path: Path) -> None:
        names = list(VERDICT_COLORS)[: len(verdicts)]
        shown = [v.model_copy(update={"verdict": n}) for v, n in zip(verdicts, names, strict=True)]
        path = forest_plot(shown, tmp_path / "forest.png")
        assert all(has_color(path, VERDICT_COLORS[name]) for name in names)

    def test_a_verdict_without_numbers(
        self, sweep_records: list[TrialRecord], registration: Registration, tmp_path: Path
    ) -> None:
        unhealthy = judge_all(sweep_records[:-1], registration, FOLLOWERS)
        path = forest_plot(unhealthy, tmp_path / "forest.png")
        assert has_color(path, VERDICT_COLORS["UNHEALTHY"])

    def test_two_metrics_are_refused(self, verdicts: list[Verdict], tmp_path: Path) -> None:
        other = verdicts[1].model_copy(update={"metric": "test_loss"})
        with pytest.raises(ValueError, match="must be about one metric with one margin"):
            forest_plot([verdicts[0], other], tmp_path / "x.png")


class TestArms:
    def test_each_arm_has_its_color(self, sweep_records: list[TrialRecord], tmp_path: Path) -> None:
        path = arms_overview(sweep_records, "test_accuracy", tmp_path / "arms.png")
        assert all(has_color(path, color) for color in ARM_COLORS.values())

    def test_a_missing_metric_is_refused(self, make_trial: MakeTrial, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="metrics of esper-000 must hold 'test_f1', but got"):
            arms_overview([make_trial("esper", 0)], "test_f1", tmp_path / "x.png")

    def test_an_arm_keeps_its_color_among_others(self) -> None:
        assert arm_colors(["esper", "zeta", "alpha"])["esper"] == ARM_COLORS["esper"]
        colors = arm_colors(["zeta", "alpha", "host"])
        assert len(set(colors.values())) == len(colors)

    def test_many_arms_shade_in_the_order_of_their_numbers(self) -> None:
        widths = [f"width-{2**i}" for i in range(8)]
        colors = arm_colors(["esper", *reversed(widths)])
        assert len(set(colors.values())) == len(colors)
        light = [sum(int(colors[w][i : i + 2], 16) for i in (1, 3, 5)) for w in widths]
        assert light == sorted(light)
