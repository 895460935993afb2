"""When a run is broken: its training loss exploded, or the host's weights moved too far."""

from dataclasses import dataclass
from statistics import median

from esper.config.run import GrowthConfig

# good intervals whose median loss is the reference
WINDOW = 5
# least reference, as a share of the first interval's loss: one that has come near 0 may multiply
# without harm. In 40 runs of the shipped configurations it rose up to 86-fold in an interval, but
# to 1.01 times the reference so raised at most; in 40 at three times the learning rate two spikes,
# from below 0.002 to 0.28 and 0.45, passed four times it, and the next largest 3.5 times.
FLOOR_FRAC = 0.1


@dataclass(frozen=True)
class LossHistory:
    """Mean training losses of the good intervals, as far as an alarm needs them.

    Attributes:
        first: Of the first interval, which tells the scale of the loss; None before it.
        recent: Of the last `WINDOW` intervals, oldest first.
    """

    first: float | None = None
    recent: tuple[float, ...] = ()

    def then(self, loss: float) -> "LossHistory":
        """The history with one more good interval."""
        first = loss if self.first is None else self.first
        return LossHistory(first, (*self.recent, loss)[-WINDOW:])


def alarm(
    loss: float, host_drift_frac: float | None, past: LossHistory, growth: GrowthConfig
) -> str | None:
    """Why the interval broke the run, if it did; a pure function.

    A loss that is no number needs no alarm: the trainer refuses it.

    Args:
        loss: Mean training loss of the interval; it may be negative.
        host_drift_frac: Relative change of the host's weights over the interval; None at first.
        past: The good intervals before.
        growth: With the limits.

    Returns:
        The reason with the values that decided; None if all is well.
    """
    if past.first is not None:
        usual = median(past.recent)
        ratio = growth.max_loss_ratio
        limit = max(usual + (ratio - 1) * abs(usual), ratio * FLOOR_FRAC * abs(past.first))
        if loss > limit:
            return f"training loss {loss:.4g} after {usual:.4g}, limit {limit:.4g}"
    most = growth.max_rollback_drift_frac
    if most is not None and host_drift_frac is not None and host_drift_frac > most:
        return f"the host drifted by {host_drift_frac:.3g} in an interval, limit {most:.3g}"
    return None
