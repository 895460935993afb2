"""Gates G0 to G5 on hand-made reports: open, shut, and never by default."""

from dataclasses import replace

import pytest

from esper.config.run import GrowthConfig
from esper.seeds import gates
from esper.seeds.gates import Gate, MissingMeasurementError
from esper.seeds.state import Stage

NAN = float("nan")


@pytest.mark.parametrize(
    ("limits", "gate"),
    [
        ({}, Gate("G0", True, "100 parameters more make 1100")),
        ({"max_parameters": 1100}, Gate("G0", True, "100 parameters more make 1100")),
        ({"max_parameters": 1099}, Gate("G0", False, "1100 parameters would pass 1099")),
        ({"max_active_seeds": 3}, Gate("G0", True, "100 parameters more make 1100")),
        ({"max_active_seeds": 2}, Gate("G0", False, "2 seeds are awake, the limit is reached")),
    ],
)
def test_g0_resources(make_site, make_report, limits, gate):
    site = make_site(stage=[Stage.GERMINATED, Stage.FOSSILIZED, Stage.CULLED, Stage.DORMANT])
    report = make_report(site, growth=GrowthConfig(**limits))
    assert gates.resources(report, site, "mlp_relu") == gate


def test_g0_keeps_to_what_the_operations_allow(make_site, make_report):
    site = make_site()
    report = replace(make_report(site), affordable_parameters=1100)
    assert gates.resources(report, site, "mlp_relu").passed
    report = replace(report, affordable_parameters=1099)
    reason = "1100 parameters would pass 1099, all that the operations allow"
    assert gates.resources(report, site, "mlp_relu") == Gate("G0", False, reason)


@pytest.mark.parametrize(
    ("stage", "epochs", "gate"),
    [
        (Stage.DORMANT, 0, Gate("G1", True, "the slot is DORMANT")),
        (Stage.TRAINING, 9, Gate("G1", False, "the slot is TRAINING")),
        (Stage.FOSSILIZED, 9, Gate("G1", False, "the slot is FOSSILIZED")),
        (Stage.CULLED, 4, Gate("G1", False, "embargo 4 of 5 intervals")),
        (Stage.ROLLED_BACK, 5, Gate("G1", True, "embargo 5 of 5 intervals")),
    ],
)
def test_g1_slot_free(make_site, make_report, stage, epochs, gate):
    site = make_site(stage=[stage], epochs=epochs)
    assert gates.slot_free(make_report(site), site, 0) == gate


@pytest.mark.parametrize(
    ("epochs", "explained", "gate"),
    [
        (1, 0.9, Gate("G2", False, "trained 1 of 2 intervals")),
        # too early to be asked: not an error yet
        (1, NAN, Gate("G2", False, "trained 1 of 2 intervals")),
        (2, 0.25, Gate("G2", True, "explains 0.250, needs 0.250")),
        (2, 0.2, Gate("G2", False, "explains 0.200, needs 0.250")),
    ],
)
def test_g2_isolated_objective(make_site, make_report, epochs, explained, gate):
    growth = GrowthConfig(training_intervals=2, min_explained_frac=0.25)
    site = make_site(stage=[Stage.TRAINING], epochs=epochs, explained_frac=explained)
    assert gates.next_gate(make_report(site, growth=growth), site, 0) == gate


@pytest.mark.parametrize(("alpha", "passed"), [(0.0, False), (1 - 2**-24, False), (1.0, True)])
def test_g3_ramp_complete(make_site, make_report, alpha, passed):
    site = make_site(stage=[Stage.GRAFTING], alpha=alpha)
    assert gates.next_gate(make_report(site), site, 0).passed is passed


@pytest.mark.parametrize(
    ("epochs", "before", "loss", "passed"),
    [
        (0, 1.0, 1.0, False),
        (1, 1.0, 1.5, True),
        (1, 1.0, 1.51, False),
        # half of a negative loss up, not down
        (1, -1.0, -0.5, True),
        (1, -1.0, -0.49, False),
    ],
)
def test_g4_host_stable(make_site, make_report, epochs, before, loss, passed):
    site = make_site(stage=[Stage.STABILIZATION], epochs=epochs, graft_loss=before)
    assert gates.next_gate(make_report(site, loss=loss), site, 0).passed is passed


@pytest.mark.parametrize(("gain", "passed"), [(0.01, True), (0.0099, False), (-1.0, False)])
def test_g5_held_out_gain(make_site, make_report, gain, passed):
    site = make_site(stage=[Stage.EVALUATING], gain=gain)
    report = make_report(site, growth=GrowthConfig(min_gain=0.0099999))
    assert gates.next_gate(report, site, 0).passed is passed


@pytest.mark.parametrize(
    ("tolerance", "gain", "passed"),
    [(1.0, -0.05, True), (1.0, -0.15, False), (-2.0, 0.15, False), (-2.0, 0.25, True)],
)
def test_g5_gives_the_benefit_of_the_doubt_or_demands_proof(
    make_site, make_report, tolerance, gain, passed
):
    site = make_site(stage=[Stage.EVALUATING], gain=gain, gain_se=0.1)
    report = make_report(site, growth=GrowthConfig(gain_tolerance_se=tolerance))
    assert gates.next_gate(report, site, 0).passed is passed
    blind = make_site(stage=[Stage.EVALUATING], gain=gain, gain_se=NAN)
    with pytest.raises(MissingMeasurementError, match="gain_se must be measured"):
        gates.next_gate(report, blind, 0)


def test_g2_asks_nothing_of_a_seed_that_learns_on_the_task(make_site, make_report):
    site = make_site(stage=[Stage.TRAINING], epochs=0, explained_frac=NAN)
    report = make_report(site, growth=GrowthConfig(training_intervals=0))
    assert gates.next_gate(report, site, 0).passed


def test_fine_tuning_lasts_its_time(make_site, make_report):
    site = make_site(stage=[Stage.FINE_TUNING] * 2, epochs=[9, 10])
    report = make_report(site)
    assert [gates.next_gate(report, site, s).passed for s in (0, 1)] == [False, True]


@pytest.mark.parametrize(
    ("stage", "missing", "message"),
    [
        (Stage.TRAINING, "explained_frac", r"explained_frac must be measured for seed 0 of 'a'"),
        (Stage.STABILIZATION, "graft_loss", r"graft_loss must be measured .* \(STABILIZATION\)"),
        (Stage.EVALUATING, "gain", r"gain must be measured .*give `evaluate`"),
    ],
)
def test_a_value_that_nobody_measured_is_an_error(make_site, make_report, stage, missing, message):
    site = make_site(stage=[stage], epochs=5, **{missing: NAN})
    with pytest.raises(MissingMeasurementError, match=message):
        gates.next_gate(make_report(site), site, 0)


def test_g4_without_a_training_loss_is_an_error(make_site, make_report):
    site = make_site(stage=[Stage.STABILIZATION], epochs=5)
    with pytest.raises(MissingMeasurementError, match=r"loss must be measured for gate G4"):
        gates.next_gate(make_report(site, loss=None), site, 0)


@pytest.mark.parametrize("stage", [Stage.DORMANT, Stage.GERMINATED, Stage.FOSSILIZED])
def test_a_stage_without_an_advance_has_no_gate(make_site, make_report, stage):
    site = make_site(stage=[stage])
    with pytest.raises(KeyError):
        gates.next_gate(make_report(site), site, 0)
