"""From field reports to a policy: fitting the model of the gain, and judging it before use."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, cross_val_predict

from esper.config.base import ConfigError
from esper.controller.adaptations import Candidate, FieldReport
from esper.controller.learned import Encoding, PolicyModel, kind_of, transformed
from esper.evidence.offline import OfflineValue, offline_value
from esper.evidence.paired import Floats

LEAST_WAVES = 50
_FOLDS = 5
# what all candidates of a decision have in common does not tell which of them to choose
_COMMON = ("grown_frac", "interval", "loss", "held_out_loss", "grad_norm", "host_drift_frac")
# waves of a model from which on what these tell of a gain is taken away
_LEAST_OF_A_MODEL = 20
_LEAST_HELP = 0.01
_HEURISTIC = "bottleneck_per_cost"
Wave = Sequence[FieldReport]
Indices = NDArray[np.int64]


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
    saved nothing: 0. What the loss, its gradient and the like foretold of the gain, whatever was
    grown, is taken away, its mean excepted.

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
        of_it = models == model
        typical = np.sqrt(np.mean(worth[of_it] ** 2))
        worth[of_it] /= typical or 1.0
        worth[of_it] -= _foretold([w for w, x in zip(waves, of_it, strict=True) if x], worth[of_it])
    return worth


def _foretold(waves: Sequence[Wave], worth: Floats) -> Floats:
    """What was known of the runs before their waves explains of what these were worth, mean 0."""
    features = [w[0].chosen.features for w in waves]
    names = [n for n in _COMMON if all(n in f for f in features)]
    x = np.array([[transformed(n, f[n]) for n in names] for f in features])
    if len(waves) < _LEAST_OF_A_MODEL or not names:
        return np.zeros(len(waves))
    x = x[:, np.ptp(x, axis=0) > 0]
    if not x.size:
        return np.zeros(len(waves))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    found: Floats = BayesianRidge().fit(x, worth).predict(x)
    explained: Floats = found - found.mean()
    return explained


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
        ConfigError: If there are too few, or they are of one model and too few runs.
    """
    known = waves(reports)
    if len(known) < LEAST_WAVES:
        raise ConfigError("field reports", (
            f"there must be at least {LEAST_WAVES} waves to learn from, but there are "
            f"{len(known)}; gather more with a controller 'reported' or the service's "
            "/v1/feedback.",
        ))  # fmt: skip
    encoding = _selected(known)
    ridge = BayesianRidge().fit(_rows(encoding, known), rewards(known))
    return PolicyModel(
        encoding=encoding,
        intercept=float(ridge.intercept_), weights=tuple(ridge.coef_.tolist()),
        covariance=tuple(map(tuple, ridge.sigma_.tolist())),
        noise_sd=float(ridge.alpha_**-0.5), reports=len(reports), waves=len(known),
        models=tuple(sorted({r.model for r in reports})),
    )  # fmt: skip


def _selected(waves: Sequence[Wave]) -> Encoding:
    """What carries over from model to model.

    Beginning with what the heuristic scores by, so that a policy corrects it rather than forgets
    it, features, kinds, blueprints and grafts are taken up one after the other, always the one with
    which models that were left out are predicted best, until none makes the error smaller by a
    hundredth. If there is one model alone, fifths of its runs are left out in turn.
    """
    whole = _everything([r.chosen for wave in waves for r in wave])
    worth = rewards(waves)
    models, runs = [w[0].model for w in waves], [_run(w[0]) for w in waves]
    alone = len({*models}) == 1
    if alone and len({*runs}) < _FOLDS:
        raise ConfigError("field reports", (
            f"waves of one model must come from at least {_FOLDS} runs, but '{models[0]}' has "
            f"{len({*runs})}; gather more with a controller 'reported'.",
        ))  # fmt: skip
    parts = GroupKFold(_FOLDS) if alone else LeaveOneGroupOut()
    splits = list(parts.split(worth, groups=runs if alone else models))
    choices: list[tuple[str, int | None]] = [("features", i) for i in range(len(whole.features))]
    choices += [(name, None) for name in ("kinds", "blueprints", "grafts")]
    taken: list[tuple[str, int | None]] = []
    best = math.inf
    if _HEURISTIC in whole.features:
        taken.append(choices.pop(whole.features.index(_HEURISTIC)))
        best = _error(_part(whole, taken), waves, worth, splits)
    while choices:
        errors = [_error(_part(whole, [*taken, c]), waves, worth, splits) for c in choices]
        at = int(np.argmin(errors))
        if errors[at] > (1 - _LEAST_HELP) * best:
            break
        best = errors[at]
        taken.append(choices.pop(at))
    return _part(whole, taken)


def _everything(chosen: Sequence[Candidate]) -> Encoding:
    names = sorted({name for c in chosen for name in c.features} - {*_COMMON})
    means, scales = [], []
    for name in names:
        values = [transformed(name, c.features[name]) for c in chosen if name in c.features]
        means.append(float(np.mean(values)))
        # a feature that never changes says nothing, and must not divide by 0
        scales.append(float(np.std(values)) or 1.0)
    return Encoding(
        features=tuple(names), means=tuple(means), scales=tuple(scales),
        kinds=tuple(sorted({kind_of(c) for c in chosen})),
        blueprints=tuple(sorted({c.blueprint for c in chosen})),
        grafts=tuple(sorted({c.graft for c in chosen})),
    )  # fmt: skip


def _part(whole: Encoding, taken: Sequence[tuple[str, int | None]]) -> Encoding:
    """An encoding of some features, and of some of kinds, blueprints and grafts."""
    some = sorted(i for name, i in taken if i is not None)
    names = {name for name, _ in taken}
    return Encoding(
        **{k: tuple(getattr(whole, k)[i] for i in some) for k in ("features", "means", "scales")},
        **{k: getattr(whole, k) if k in names else () for k in ("kinds", "blueprints", "grafts")},
    )


def _error(
    encoding: Encoding, waves: Sequence[Wave], worth: Floats,
    splits: Sequence[tuple[Indices, Indices]],
) -> float:  # fmt: skip
    """Sum of the variances of the errors on parts left out; the level of each is taken as known."""
    rows = _rows(encoding, waves)
    missed = worth - cross_val_predict(BayesianRidge(), rows, worth, cv=splits)
    return sum(float(np.var(missed[left_out])) for _, left_out in splits)


def _rows(encoding: Encoding, waves: Sequence[Wave]) -> Floats:
    """Waves as the means of their seeds, shape `[waves, size]`."""
    return np.array([_shares(w) @ encoding.encode([r.chosen for r in w]) for w in waves])


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
