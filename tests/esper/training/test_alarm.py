"""The alarm catches explosions at any scale, and leaves noise and losses near 0 alone."""

import numpy as np
import pytest

from esper.config.run import GrowthConfig
from esper.training.alarm import WINDOW, LossHistory, alarm

GROWTH = GrowthConfig()


def history(*losses):
    past = LossHistory()
    for loss in losses:
        past = past.then(loss)
    return past


EXPLODED = {
    "as the issue has it": ([0.7, 0.6, 0.5, 0.5], 8),
    "after a steep fall": ([8, 4, 2, 1, 0.5], 8.1),
    "after one interval": ([0.69], 3),
    "a large scale": ([900, 500, 400], 2001),
    "a small scale": ([9e-6, 5e-6, 4e-6], 2.1e-5),
    "back to chance from nearly 0": ([0.69, 0.1, 1e-4, 1e-4, 1e-4], 0.69),
    "a negative loss": ([-4, -5, -5], 11),
}


@pytest.mark.parametrize("case", EXPLODED)
def test_an_explosion_is_caught(case):
    losses, loss = EXPLODED[case]
    reason = alarm(loss, None, history(*losses), GROWTH)
    assert reason is not None
    assert reason.startswith(f"training loss {loss:.4g} after ")


HARMLESS = {
    "the first interval": ([], 1e9),
    "a rise within the ratio": ([0.7, 0.6, 0.5, 0.5], 1.9),
    "a slower start": ([0.69], 2.7),
    "near 0": ([0.69, 0.1, 0.01, 1e-3, 1e-4, 1e-4], 1e-3),
    "very near 0": ([0.69, 0.1, 1e-8, 1e-8, 1e-8], 1e-2),
    "exactly 0": ([2.3, 0.0, 0.0, 0.0], 0.5),
    "a negative loss": ([-4, -5, -5], 9),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_no_explosion_is_left_alone(case):
    losses, loss = HARMLESS[case]
    assert alarm(loss, None, history(*losses), GROWTH) is None


def test_noise_of_half_its_size_gives_no_alarm():
    rng = np.random.default_rng(0)
    past = LossHistory()
    for trend in np.geomspace(2.3, 1e-3, 2000):
        loss = float(trend * np.exp(0.4 * rng.normal()))
        assert alarm(loss, None, past, GROWTH) is None
        past = past.then(loss)


def test_the_limit_is_configured():
    past = history(1.0, 1.0, 1.0)
    assert alarm(3, None, past, GrowthConfig(max_loss_ratio=2)) is not None
    assert alarm(3, None, past, GrowthConfig(max_loss_ratio=1e9)) is None


@pytest.mark.parametrize(
    ("drift", "limit", "fires"),
    [(0.9, None, False), (None, 0.5, False), (0.5, 0.5, False), (0.6, 0.5, True)],
)
def test_drift_counts_only_where_it_is_measured_and_limited(drift, limit, fires):
    reason = alarm(1, drift, history(1.0), GrowthConfig(max_rollback_drift_frac=limit))
    assert reason == ("the host drifted by 0.6 in an interval, limit 0.5" if fires else None)


def test_a_history_keeps_its_first_and_its_last_losses():
    past = history(*range(20))
    assert past.first == 0
    assert past.recent == tuple(range(20 - WINDOW, 20))
