"""From field reports to a policy: fitting the model of the gain, and judging it before use."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import BayesianRidge

from esper.config.base import ConfigError
from esper.controller.adaptations import Candidate, FieldReport
from esper.controller.learned import Encoding, PolicyModel, transformed
from esper.evidence.offline import OfflineValue, offline_value
from esper.evidence.paired import Floats

LEAST_REPORTS = 50
_FOLDS = 5


class Judged(NamedTuple):
    """A policy on logged choices.

    Attributes:
        name: Whose.
        value: Its estimated reward a choice.
    """

    name: str
    value: OfflineValue


def reward(report: FieldReport) -> float:
    """Share of the held-out loss that the adaptation saved while it was evaluated.

    An adaptation that was given up before anything was measured saved nothing: 0. One share of a
    loss is at most 1; a loss that a seed multiplied counts as doubled.
    """
    if report.gain is None or report.before is None:
        return 0.0
    return float(np.clip(report.gain / max(abs(report.before), 1e-12), -1.0, 1.0))


def fit(reports: Sequence[FieldReport]) -> PolicyModel:
    """A Bayesian ridge regression of the reward; its priors are chosen by the evidence.

    Args:
        reports: What became of adaptations, however they were chosen.

    Raises:
        ConfigError: If there are too few.
    """
    if len(reports) < LEAST_REPORTS:
        raise ConfigError("field reports", (
            f"there must be at least {LEAST_REPORTS} to learn from, but there are {len(reports)}; "
            "gather more with a controller 'reported' or the service's /v1/feedback.",
        ))  # fmt: skip
    chosen = [r.chosen for r in reports]
    names = sorted({name for c in chosen for name in c.features})
    means, scales = [], []
    for name in names:
        values = [transformed(name, c.features[name]) for c in chosen if name in c.features]
        means.append(float(np.mean(values)))
        # a feature that never changes says nothing, and must not divide by 0
        scales.append(float(np.std(values)) or 1.0)
    encoding = Encoding(
        features=tuple(names), means=tuple(means), scales=tuple(scales),
        blueprints=tuple(sorted({c.blueprint for c in chosen})),
        grafts=tuple(sorted({c.graft for c in chosen})),
    )  # fmt: skip
    ridge = BayesianRidge().fit(encoding.encode(chosen), [reward(r) for r in reports])
    return PolicyModel(
        encoding=encoding,
        intercept=float(ridge.intercept_), weights=tuple(ridge.coef_.tolist()),
        covariance=tuple(map(tuple, ridge.sigma_.tolist())),
        noise_sd=float(ridge.alpha_**-0.5), reports=len(reports),
        models=tuple(sorted({r.model for r in reports})),
    )  # fmt: skip


def judge(reports: Sequence[FieldReport], explore_frac: float) -> list[Judged]:
    """The learned policy against two that need no model, on choices that were drawn by chance.

    Each run's choices are judged by a model that has not seen the run.

    Args:
        reports: Field reports; those without a draw are fitted to, but judge nothing.
        explore_frac: As in the controller's options.

    Raises:
        ConfigError: If too few choices were drawn, or they come from too few runs.
    """
    drawn = [r for r in reports if r.draw is not None]
    runs = sorted({_run(r) for r in drawn})
    if len(drawn) < LEAST_REPORTS or len(runs) < 2 * _FOLDS:
        raise ConfigError("field reports", (
            f"at least {LEAST_REPORTS} choices in {2 * _FOLDS} runs must have been drawn by chance "
            f"to judge a policy by them, but {len(drawn)} in {len(runs)} were; gather more with a "
            "controller 'learned' without a model.",
        ))  # fmt: skip
    fold = {run: i % _FOLDS for i, run in enumerate(runs)}
    models = [fit([r for r in reports if fold.get(_run(r)) != i]) for i in range(_FOLDS)]
    found = []
    for name in ("learned", "most energy", "any"):
        parts: list[tuple[float, float, float, float, float]] = []
        for report in drawn:
            assert report.draw is not None
            model = models[fold[_run(report)]]
            candidates = report.draw.candidates
            mean, _ = model.predict(candidates)
            chances = _chances(name, model, candidates, explore_frac)
            at = report.draw.chosen
            parts.append((
                reward(report), report.draw.propensity, float(chances[at]), float(mean[at]),
                float(chances @ mean),
            ))  # fmt: skip
        r, p, t, q, v = (list(column) for column in zip(*parts, strict=True))
        found.append(Judged(name, offline_value(r, p, t, q, v, [_run(x) for x in drawn])))
    return found


def _chances(
    name: str, model: PolicyModel, candidates: Sequence[Candidate], explore_frac: float
) -> Floats:
    even = np.full(len(candidates), 1 / len(candidates))
    if name == "any":
        return even
    if name == "learned":
        return explore_frac * even + (1 - explore_frac) * model.chances(candidates, 0)
    energy = np.array([c.features.get("grad_energy", -np.inf) for c in candidates])
    best = (energy == energy.max()).astype(np.float64)
    shares: Floats = best / best.sum()
    return shares


def _run(report: FieldReport) -> str:
    return report.request_id.partition(".")[0]
