"""From field reports to a policy: fitting the model of the gain, and judging it before use."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import BayesianRidge

from esper.config.base import ConfigError
from esper.controller.adaptations import Candidate, FieldReport
from esper.controller.learned import Encoding, PolicyModel, kind_of, transformed
from esper.evidence.offline import OfflineValue, offline_value
from esper.evidence.paired import Floats

LEAST_WAVES = 50
_FOLDS = 5
# what all candidates of a decision have in common does not tell which of them to choose
_COMMON = {"grown_frac", "interval", "loss", "held_out_loss", "grad_norm", "host_drift_frac"}
Wave = Sequence[FieldReport]


class Judged(NamedTuple):
    """A policy on logged choices.

    Attributes:
        name: Whose.
        value: What its choices are estimated to be worth; see `rewards`.
    """

    name: str
    value: OfflineValue


def waves(reports: Sequence[FieldReport]) -> list[Wave]:
    """Reports of seeds that were germinated together: of a run, at the same time."""
    found = dict[tuple[str, int], list[FieldReport]]()
    for report in reports:
        found.setdefault((_run(report), report.interval), []).append(report)
    return [*found.values()]


def rewards(waves: Sequence[Wave]) -> Floats:
    """What each wave was worth, shape `[waves]`.

    The share of the held-out loss that was saved from its choice to its last evaluation, at most 1
    (a loss that doubled counts as -1), over the share of the host's parameters that it cost, and in
    units of the root mean square of these in its model, so that models with much to gain do not
    outvote the others. A wave that was given up before its evaluation, or that had no parameters,
    saved nothing: 0.

    What its seeds are worth one by one is not asked: seeds that learned together share their work,
    and one that is taken away is missed more than one that never was.

    Raises:
        ConfigError: If a report does not say what its seed cost, or what the loss was before.
    """
    worth = np.zeros(len(waves))
    for i, wave in enumerate(waves):
        cost = sum(_known(r, "cost_frac") for r in wave)
        before = _known(wave[0], "held_out_loss")
        after = [r.after for r in sorted(wave, key=lambda r: r.ended) if r.after is not None]
        if after and cost > 0:
            share = (before - after[-1]) / max(abs(before), 1e-12)
            worth[i] = np.clip(share, -1.0, 1.0) / cost
    models = np.array([wave[0].model for wave in waves])
    for model in np.unique(models):
        typical = np.sqrt(np.mean(worth[models == model] ** 2))
        worth[models == model] /= typical or 1.0
    return worth


def _known(report: FieldReport, name: str) -> float:
    value = report.chosen.features.get(name)
    if value is None:
        raise ConfigError("field reports", (
            f"features must hold {name}, but those of '{report.request_id}' do not; report with "
            "the features that `esper.controller.adaptations.features_of` gives.",
        ))  # fmt: skip
    return value


def _shares(wave: Wave) -> Floats:
    """Of the wave's parameters that each of its seeds has, shape `[seeds]`."""
    costs = np.array([_known(r, "cost_frac") for r in wave])
    total = costs.sum()
    return costs / total if total > 0 else np.full(len(wave), 1 / len(wave))


def fit(reports: Sequence[FieldReport]) -> PolicyModel:
    """A Bayesian ridge regression of what waves are worth; its priors are chosen by the evidence.

    A wave is described by the mean of its seeds, each weighted by its parameters, so that the
    model tells what a parameter of each seed is worth.

    Args:
        reports: What became of adaptations, however they were chosen.

    Raises:
        ConfigError: If there are too few.
    """
    known = waves(reports)
    if len(known) < LEAST_WAVES:
        raise ConfigError("field reports", (
            f"there must be at least {LEAST_WAVES} waves to learn from, but there are "
            f"{len(known)}; gather more with a controller 'reported' or the service's "
            "/v1/feedback.",
        ))  # fmt: skip
    chosen = [r.chosen for r in reports]
    names = sorted({name for c in chosen for name in c.features} - _COMMON)
    means, scales = [], []
    for name in names:
        values = [transformed(name, c.features[name]) for c in chosen if name in c.features]
        means.append(float(np.mean(values)))
        # a feature that never changes says nothing, and must not divide by 0
        scales.append(float(np.std(values)) or 1.0)
    encoding = Encoding(
        features=tuple(names), means=tuple(means), scales=tuple(scales),
        kinds=tuple(sorted({kind_of(c) for c in chosen})),
        blueprints=tuple(sorted({c.blueprint for c in chosen})),
        grafts=tuple(sorted({c.graft for c in chosen})),
    )  # fmt: skip
    rows = [_shares(wave) @ encoding.encode([r.chosen for r in wave]) for wave in known]
    ridge = BayesianRidge().fit(np.array(rows), rewards(known))
    return PolicyModel(
        encoding=encoding,
        intercept=float(ridge.intercept_), weights=tuple(ridge.coef_.tolist()),
        covariance=tuple(map(tuple, ridge.sigma_.tolist())),
        noise_sd=float(ridge.alpha_**-0.5), reports=len(reports), waves=len(known),
        models=tuple(sorted({r.model for r in reports})),
    )  # fmt: skip


def predicted(model: PolicyModel, waves: Sequence[Wave]) -> Floats:
    """What a model thinks that each wave is worth, shape `[waves]`."""
    found = [_shares(wave) @ model.predict([r.chosen for r in wave])[0] for wave in waves]
    return np.array(found)


def judge(reports: Sequence[FieldReport], explore_frac: float) -> list[Judged]:
    """The learned policy against two that need no model, on choices that were drawn by chance.

    Each choice is judged by what its wave was worth, the wave's other seeds as they were, and by a
    model that has not seen its run.

    Args:
        reports: Field reports; those without a draw are fitted to, but judge nothing.
        explore_frac: As in the controller's options.

    Raises:
        ConfigError: If too few choices were drawn, or they come from too few runs.
    """
    known = [wave for wave in waves(reports) if any(r.draw is not None for r in wave)]
    runs = sorted({_run(wave[0]) for wave in known})
    if len(known) < LEAST_WAVES or len(runs) < 2 * _FOLDS:
        raise ConfigError("field reports", (
            f"at least {LEAST_WAVES} waves in {2 * _FOLDS} runs must have been drawn by chance "
            f"to judge a policy by them, but {len(known)} in {len(runs)} were; gather more with a "
            "controller 'learned' without a model.",
        ))  # fmt: skip
    fold = {run: i % _FOLDS for i, run in enumerate(runs)}
    models = [fit([r for r in reports if fold.get(_run(r)) != i]) for i in range(_FOLDS)]
    found = []
    for name in ("learned", "most energy", "any"):
        parts: list[tuple[float, float, float, float, float]] = []
        names: list[str] = []
        for wave, worth in zip(known, rewards(known), strict=True):
            run = _run(wave[0])
            model = models[fold[run]]
            shares = _shares(wave)
            (whole,) = predicted(model, [wave]).tolist()
            for report, share in zip(wave, shares, strict=True):
                if report.draw is None:
                    continue
                candidates, at = report.draw.candidates, report.draw.chosen
                mean, _ = model.predict(candidates)
                chances = _chances(name, model, candidates, explore_frac)
                parts.append((
                    float(worth), report.draw.propensity, float(chances[at]), whole,
                    whole + share * float(chances @ mean - mean[at]),
                ))  # fmt: skip
                names.append(run)
        r, p, t, q, v = (list(column) for column in zip(*parts, strict=True))
        found.append(Judged(name, offline_value(r, p, t, q, v, names)))
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
