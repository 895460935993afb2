"""How alike two outputs are: of two implementations, or of one that is run twice.

A difference means nothing without the difference that the control has from itself: `compare_runs`
takes the control twice. Everything is computed in float64, on copies that need no gradients.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Similarity:
    """How far `actual` is from `expected`, the larger the less alike but for `cosine` and `top1`.

    Attributes:
        elements: Number of elements.
        max_abs: Largest `|actual - expected|`.
        max_rel: Largest `|actual - expected| / |expected|` over elements where `expected` is not 0;
            None if it is 0 everywhere.
        ulps: Number of elements by distance in units in the last place of their type: key 0 holds
            those that are equal, and key k > 0 those at 2^(k-1) up to 2^k - 1 steps.
        cosine: Of the angle between the two as vectors; None if one of them is zero.
        top1: Share of rows whose largest element is at the same place; None below 2 columns.
        kl_nats: Mean over rows of KL(softmax(expected) || softmax(actual)); None like `top1`.
    """

    elements: int
    max_abs: float
    max_rel: float | None
    ulps: dict[int, int]
    cosine: float | None
    top1: float | None
    kl_nats: float | None

    @property
    def identical(self) -> bool:
        """Whether every element is equal; -0 equals 0."""
        return self.ulps == {0: self.elements}

    @property
    def max_ulps_bin(self) -> int:
        """The bin of the element that is furthest away."""
        return max(self.ulps)


@dataclass(frozen=True)
class Judged:
    """A treatment beside the control's own noise.

    Attributes:
        treatment: Treatment against the control's first run.
        noise: The control's second run against its first.
        within_noise: Whether the treatment is no further from the control than that is from itself,
            in every measure.
    """

    treatment: Similarity
    noise: Similarity
    within_noise: bool


def similarity(actual: Tensor, expected: Tensor) -> Similarity:
    """Compare two outputs element by element, and row by row as logits.

    Args:
        actual: `[..., columns]`, of any floating type.
        expected: Of the same shape and type.

    Raises:
        ValueError: If shapes or types differ, nothing is there, or a value is not finite.
    """
    _require_alike(actual, expected)
    a, e = (x.detach().cpu().to(torch.float64) for x in (actual, expected))
    difference, size = (a - e).abs(), e.abs()
    relative = difference[size > 0] / size[size > 0]
    has_rows = a.ndim > 0 and a.shape[-1] > 1
    top1 = kl = None
    if has_rows:
        top1 = float((a.argmax(-1) == e.argmax(-1)).double().mean())
        log_e, log_a = e.log_softmax(-1), a.log_softmax(-1)
        # rounding may give a sum just below 0, which no divergence is
        kl = max(0.0, float((log_e.exp() * (log_e - log_a)).sum(-1).mean()))
    return Similarity(
        elements=a.numel(),
        max_abs=float(difference.max()),
        max_rel=float(relative.max()) if relative.numel() else None,
        ulps=_histogram(ulp_distance(actual, expected)),
        cosine=_cosine(a.flatten(), e.flatten()),
        top1=top1,
        kl_nats=kl,
    )


def told(found: Similarity) -> str:
    """Every measure in a line."""
    top = "none" if found.top1 is None else f"{found.top1:.4f}"
    kl = "none" if found.kl_nats is None else f"{found.kl_nats:.2g} nats"
    return (
        f"max abs {found.max_abs:.2g}, max rel {found.max_rel or 0:.2g}, ULP bins {found.ulps}, "
        f"cosine {found.cosine}, top-1 {top}, KL {kl}"
    )


def compare_runs(treatment: Tensor, control: Tensor, control_again: Tensor) -> Judged:
    """Compare a treatment with a control that was run twice.

    Args:
        treatment: `[..., columns]`.
        control: Its first run, of the same shape and type.
        control_again: Its second run.

    Raises:
        ValueError: As `similarity` does.
    """
    found, noise = similarity(treatment, control), similarity(control_again, control)
    return Judged(found, noise, _no_further(found, noise))


def compare_models(treatment: nn.Module, control: nn.Module, inputs: Tensor) -> Judged:
    """Compare the outputs of two models on the same inputs, in the modes that they are in.

    Args:
        treatment: Gives a tensor `[..., columns]`.
        control: Gives one of the same shape and type; it is run twice.
        inputs: Of one batch.

    Raises:
        ValueError: As `similarity` does.
    """
    with torch.no_grad():
        return compare_runs(treatment(inputs), control(inputs), control(inputs))


def ulp_distance(actual: Tensor, expected: Tensor) -> Tensor:
    """Steps from one representable value to the next between two numbers, `int64`.

    0 for equal numbers and for +-0; at most 2^63 - 1, which only float64 can exceed.

    Raises:
        ValueError: As `similarity` does.
    """
    _require_alike(actual, expected)
    a, e = _ordered(actual), _ordered(expected)
    # beyond zero the difference may be more than int64 holds, and wraps
    across = (a < 0) != (e < 0)
    return torch.where(across, _saturating_sum(a.abs(), e.abs()), (a - e).abs())


def first_divergent_step(
    actual: Sequence[float], expected: Sequence[float], *, tolerance: float = 0.0
) -> int | None:
    """The index at which two curves first part, None if nowhere.

    Two NaN are alike: both runs broke at the same step. A curve that ends early parts there.

    Args:
        actual: One value a step.
        expected: One value a step.
        tolerance: Greatest difference that is none, in units of the curve.

    Raises:
        ValueError: If `tolerance` is negative or not finite.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be at least 0 and finite, but got {tolerance=}.")
    for step, (a, e) in enumerate(zip(actual, expected, strict=False)):
        if a == e or (math.isnan(a) and math.isnan(e)):
            continue
        if not abs(a - e) <= tolerance:
            return step
    shorter, longer = sorted((len(actual), len(expected)))
    return None if shorter == longer else shorter


@dataclass(frozen=True)
class Parted:
    """Where curves part from the control's first run.

    Attributes:
        treatment_step: Of the treatment; None if it never parts.
        noise_step: Of the control's second run.
        within_noise: Whether the treatment parts no earlier than the control from itself.
    """

    treatment_step: int | None
    noise_step: int | None
    within_noise: bool


def compare_curves(
    treatment: Sequence[float],
    control: Sequence[float],
    control_again: Sequence[float],
    *,
    tolerance: float = 0.0,
) -> Parted:
    """Say where a treatment's curve parts from the control's, and where the control's own does.

    Args:
        treatment: One value a step.
        control: Its first run.
        control_again: Its second run.
        tolerance: Greatest difference that is none, in units of the curve.

    Raises:
        ValueError: If `tolerance` is negative or not finite.
    """
    found, noise = (
        first_divergent_step(curve, control, tolerance=tolerance)
        for curve in (treatment, control_again)
    )
    return Parted(found, noise, found is None or (noise is not None and found >= noise))


def _require_alike(actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ValueError(
            f"actual and expected must be alike, but got {tuple(actual.shape)} of {actual.dtype} "
            f"and {tuple(expected.shape)} of {expected.dtype}; convert neither, find out why."
        )
    if actual.numel() == 0 or not actual.dtype.is_floating_point:
        raise ValueError(
            f"outputs must be floating-point numbers, but got {actual.numel()} of {actual.dtype}."
        )
    for name, x in (("actual", actual), ("expected", expected)):
        wrong = int((~torch.isfinite(x)).sum())
        if wrong:
            raise ValueError(f"{name} must be finite, but {wrong} of {x.numel()} elements are not.")


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of the numbers, one apart where the numbers are neighbours."""
    x = x.detach().cpu().contiguous()
    if x.dtype not in _INTEGERS:
        x = x.to(torch.float64)
    kind = _INTEGERS.get(x.dtype, torch.int64)
    bits = x.view(kind).to(torch.int64)
    # sign and magnitude to two's complement; -0 becomes 0
    least = torch.iinfo(kind).min
    return torch.where(bits < 0, least - bits, bits)


def _saturating_sum(a: Tensor, b: Tensor) -> Tensor:
    most = torch.iinfo(torch.int64).max
    return torch.where(a > most - b, torch.full_like(a, most), a + b)


def _histogram(distance: Tensor) -> dict[int, int]:
    """Counts by the number of binary digits of the distance."""
    values, counts = distance.flatten().unique(return_counts=True)
    histogram: Counter[int] = Counter()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        histogram[value.bit_length()] += count
    return dict(sorted(histogram.items()))


def _cosine(a: Tensor, e: Tensor) -> float | None:
    if torch.equal(a, e) and bool(e.any()):
        return 1.0
    norms = float(a.norm() * e.norm())
    return min(1.0, max(-1.0, float(a @ e) / norms)) if norms else None


def _no_further(found: Similarity, noise: Similarity) -> bool:
    larger_is_worse = [
        (found.max_abs, noise.max_abs),
        (found.max_rel, noise.max_rel),
        (found.max_ulps_bin, noise.max_ulps_bin),
        (found.kl_nats, noise.kl_nats),
    ]
    smaller_is_worse = [(found.cosine, noise.cosine), (found.top1, noise.top1)]
    return all(_at_most(f, n) for f, n in larger_is_worse) and all(
        _at_most(n, f) for f, n in smaller_is_worse
    )


def _at_most(a: float | None, b: float | None) -> bool:
    """Whether a <= b; a measure that one side does not have agrees only with its like."""
    if a is None or b is None:
        return a is b
    return a <= b
