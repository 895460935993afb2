"""Matched units: incoming weights that fit what the present network cannot express.

The wanted change of a site's output is `v = -dL/dy`. What the host's own trainable weights could do
of it in one linear step is taken away (Verbockhaven et al., "Growing Tiny Networks", TMLR 2024).
Of many candidate units those are taken, one after the other, whose activations explain most of the
rest, each freed of what those before it explain: orthogonal matching pursuit (Pati et al., 1993)
over hidden units, the candidates' version of cascade correlation (Fahlman and Lebiere, 1990).
Unlike closed forms over the moments of x and v it knows the function of the units, biases and dead
units included. Where units are linear there is nothing to know, and the best ones have such a form.

Shapes: T = rows, S = seeds, C = channels that a seed reads, O = channels that it writes,
K = candidates, B = features that the host's present parameters weigh.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from esper_kernels import PHI, Phi

Function = Callable[[Tensor], Tensor]

# rows that are looked at; candidates of a new unit of a span, of a span's score, of a chunk seed
MAX_ROWS = 2048
SPAN_CANDIDATES = 512
SCORED_CANDIDATES = 64
CHUNK_CANDIDATES = 64
# length of a unit's incoming weights: twice that of a row as `nn.Linear` draws it, for any fan-in.
# Scaled to the spread of z instead, units did worse where inputs are small (digits).
WEIGHT_NORM = 2 / 3**0.5
# of the mean square of a feature: what is weaker explains nothing but noise
RIDGE_FRAC = 1e-3
# of the largest singular value: what varies less is not counted as known
CUT_FRAC = 0.03
# standard deviation of a copied unit's noise over that of the host's weights
COPY_NOISE_FRAC = 0.1
# numbers of the largest tensor that is made at once
BLOCK_NUMBERS = 2**24


class NotFiniteError(ValueError):
    """Activations or gradients that units were to be matched to are no numbers."""


@dataclass(frozen=True)
class Rows:
    """Some rows of one batch at one site, fp32.

    Attributes:
        source: What the seeds read, `[T, I]`; of a chunk site all its channels, `[T, D]`.
        known: What the host's trainable weights and awake seeds weigh, `[T, B]`.
        wanted: `-dL/dy`, for each sample by itself, `[T, D]`.
    """

    source: Tensor
    known: Tensor
    wanted: Tensor

    def __post_init__(self) -> None:
        if not (self.source.isfinite().all() and self.wanted.isfinite().all()):
            raise NotFiniteError(
                "activations and gradients must be finite to match units to them, but are not; "
                "roll the run back to where they were."
            )

    @cached_property
    def basis(self) -> Tensor:
        """Orthonormal features that span what `known` can express, `[T, at most B]`."""
        if not self.known.shape[1]:
            return self.known
        left, sizes, _ = torch.linalg.svd(self.known, full_matrices=False)
        # a direction that hardly varies would take a weight out of all proportion
        kept: Tensor = left[:, sizes > CUT_FRAC * sizes.max()]
        return kept

    def unexplained(self, features: Tensor) -> Tensor:
        """Features without what `known` can express of them, `[T, n]`."""
        return features - self.basis @ (self.basis.T @ features)


@dataclass(frozen=True)
class Units:
    """Hidden units in the order in which they were chosen, of each of some seeds.

    Attributes:
        w_in: Incoming weights, `[S, C, n]`.
        bias: Biases, `[S, n]`.
        gain: Mean square over the rows of the wanted change that each explains beyond those
            before it, `[S, n]`.
    """

    w_in: Tensor
    bias: Tensor
    gain: Tensor


def span_units(
    rows: Rows, phi: Function, count: int, generator: torch.Generator, *, biased: bool = True,
    candidates: int = SPAN_CANDIDATES,
) -> Units:  # fmt: skip
    """The next units for a span, `S = 1`.

    Args:
        rows: What was measured.
        phi: Function of the units.
        count: Units wanted.
        generator: CPU generator of the candidates.
        biased: Whether units have a bias.
        candidates: How many are drawn.
    """
    if phi is PHI[Phi.IDENTITY]:
        return _linear_units(rows, count, generator)
    wanted = rows.unexplained(rows.wanted)
    # where a linear unit would look: the moments of what is read and what is wanted
    moment = (rows.source - rows.source.mean(0)).T @ wanted
    looks = torch.linalg.svd(moment, full_matrices=False)[0].T
    drawn = torch.randn(candidates, rows.source.shape[1], generator=generator)
    directions = torch.cat([drawn.to(looks), looks, -looks])
    w, b = _scaled(rows.source[:, None], directions[None], generator)
    if not biased:
        b = torch.zeros_like(b)
    hidden = phi(rows.source @ w[0].T + b[0])
    chosen, gain = pursue(hidden[None], wanted[None], rows.basis, count)
    return Units(w[:, chosen[0]].transpose(1, 2), b[:, chosen[0]], gain)


def _linear_units(rows: Rows, count: int, generator: torch.Generator) -> Units:
    """The linear units that together explain most of what is wanted, best first; biases begin at 0.

    In the whitened source they are the leading singular vectors of its moment with what is wanted,
    and the squares of its singular values are what each explains. Beyond the rank of that moment
    nothing is left to explain, and units are drawn.
    """
    source, wanted = rows.unexplained(rows.source).double(), rows.unexplained(rows.wanted).double()
    white = _whitening(source)
    left, sizes, _ = torch.linalg.svd(white @ (source.T @ wanted), full_matrices=False)
    kept = min(count, len(sizes))
    drawn = torch.randn(source.shape[1], count - kept, generator=generator).to(source)
    w = torch.cat([white @ left[:, :kept], drawn], 1)
    w = WEIGHT_NORM * w / w.norm(dim=0).clamp(min=1e-30)
    gain = torch.cat([sizes[:kept].square() / len(source), sizes.new_zeros(count - kept)])
    return Units(
        w[None].to(rows.source), torch.zeros_like(gain)[None].to(rows.source),
        gain[None].to(rows.source),
    )  # fmt: skip


def _whitening(source: Tensor) -> Tensor:
    """The inverse square root of the source's second moments over all rows, `[I, I]`."""
    values, vectors = torch.linalg.eigh(source.T @ source)
    ridge = RIDGE_FRAC * values.mean().clamp(min=1e-30)
    white: Tensor = (vectors / (values.clamp(min=0) + ridge).sqrt()) @ vectors.T
    return white


def linear_unit(rows: Rows, *, tiny: bool) -> tuple[Units, Rows]:
    """The next unit by a closed form that takes it for linear: a control for matched units.

    Args:
        rows: What was measured.
        tiny: False: the direction along which the outgoing weights get the largest gradient
            (Evci et al., "GradMax", ICLR 2022). True: the linear unit that explains most of what
            the host cannot express (Verbockhaven et al., TMLR 2024).

    Returns:
        The unit, without bias; and the rows in which the next one is to be looked for.
    """
    wanted = rows.unexplained(rows.wanted) if tiny else rows.wanted
    moment = rows.source.T @ wanted
    whitening = torch.eye(len(moment), device=moment.device)
    if tiny:
        whitening = _whitening(rows.source)
    left, sizes, _ = torch.linalg.svd(whitening @ moment, full_matrices=False)
    w = whitening @ left[:, :1]
    w = WEIGHT_NORM * w / w.norm().clamp(min=1e-30)
    gain = sizes[0].square() / len(rows.source)
    units = Units(w[None], torch.zeros(1, 1, device=w.device), gain.view(1, 1))
    unit = w / w.norm().clamp(min=1e-30)
    return units, replace(rows, source=rows.source - (rows.source @ unit) @ unit.T)


def copied_unit(host: nn.Linear, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A noisy copy of one of the host's own units: a control for matched units.

    After Chen et al., "Net2Net" (ICLR 2016), who also share the outgoing weights between the
    two; here those of the new unit begin at 0, as every seed's do.

    Args:
        host: Whose rows are units.
        generator: CPU generator.

    Returns:
        Incoming weights `[I, 1]` and bias `[1]`.
    """
    weight = host.weight.detach()
    at = int(torch.randint(len(weight), (), generator=generator))
    noise = torch.randn(weight.shape[1], generator=generator).to(weight)
    w = weight[at] + COPY_NOISE_FRAC * weight.std() * noise
    bias = weight.new_zeros(1) if host.bias is None else host.bias.detach()[at : at + 1].clone()
    return w[:, None], bias


def chunk_units(
    rows: Rows, seeds: list[int], num_seeds: int, phi: Function, count: int,
    generator: torch.Generator,
) -> Units:  # fmt: skip
    """The units of some chunk seeds.

    Args:
        rows: What was measured.
        seeds: Which seeds.
        num_seeds: Seeds of the site.
        phi: Function of the units.
        count: Hidden units of each.
        generator: CPU generator of the candidates.
    """
    wanted = rows.unexplained(rows.wanted).unflatten(1, (num_seeds, -1))
    read = rows.source.unflatten(1, (num_seeds, -1))
    T, _, C = read.shape
    at_once = max(1, BLOCK_NUMBERS // (T * CHUNK_CANDIDATES))
    parts = []
    for first in range(0, len(seeds), at_once):
        some = seeds[first : first + at_once]
        drawn = torch.randn(len(some), CHUNK_CANDIDATES, C, generator=generator).to(read)
        w, b = _scaled(read[:, some], drawn, generator)
        hidden = phi(torch.einsum("tsc,skc->tsk", read[:, some], w) + b)
        chosen, gain = pursue(
            hidden.transpose(0, 1), wanted[:, some].transpose(0, 1), rows.basis, count
        )
        w = torch.take_along_dim(w, chosen[:, :, None], 1).transpose(1, 2)
        parts.append(Units(w, torch.take_along_dim(b, chosen, 1), gain))
    return Units(*(torch.cat([getattr(p, n) for p in parts]) for n in ("w_in", "bias", "gain")))


def pursue(features: Tensor, wanted: Tensor, basis: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit, for many problems at once.

    Args:
        features: Candidates, `[S, T, K]`.
        wanted: What they are to explain, at right angles to the basis, `[S, T, O]`.
        basis: Orthonormal features that are there already, `[T, B]`.
        count: How many to choose, at most K.

    Returns:
        Indices and gains in the order of choice, `[S, count]` each; a gain is the mean over the
        rows of the squares that the feature explains beyond those before it.

    Raises:
        ValueError: If more are asked for than there are candidates.
    """
    if count > features.shape[2]:
        raise ValueError(
            f"units must be at most the {features.shape[2]} candidates, but got {count}."
        )
    whole = features.square().sum(1)
    # the candidates' lengths beyond the basis; they themselves are made when they are chosen
    size = whole - (basis.T @ features).square().sum(1)
    ridge = RIDGE_FRAC * whole.mean(1, keepdim=True).clamp(min=1e-30)
    cross = features.mT @ wanted
    chosen, gains, taken = [], [], features.new_zeros(*features.shape[:2], 0)
    for left in reversed(range(count)):
        gain = cross.square().sum(2) / (size.clamp(min=0) + ridge)
        best = gain.argmax(1, keepdim=True)
        chosen.append(best)
        gains.append(gain.gather(1, best))
        if left:
            f = features.take_along_dim(best[:, :, None], 2)
            f = f - basis @ (basis.T @ f)
            f = f - taken @ (taken.mT @ f)
            q = f / (f.square().sum(1, keepdim=True) + ridge[:, :, None]).sqrt()
            taken = torch.cat([taken, q], 2)
            shared = features.mT @ q
            size = size - shared[:, :, 0].square()
            cross = cross - shared * (q.mT @ wanted)
    return torch.cat(chosen, 1), torch.cat(gains, 1) / features.shape[1]


def _scaled(read: Tensor, directions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights and biases of candidates: of one length, and with `z = 0` at a row drawn for each.

    Args:
        read: `[T, S, C]`.
        directions: `[S, K, C]`.
        generator: CPU generator.

    Returns:
        `[S, K, C]` and `[S, K]`.
    """
    length = directions.norm(dim=2, keepdim=True)
    weights = WEIGHT_NORM * directions / torch.where(length > 0, length, 1.0)
    z = torch.einsum("tsc,skc->skt", read, weights)
    at = torch.randint(len(read), z.shape[:2], generator=generator).to(z.device)
    return weights, -z.gather(2, at[:, :, None])[:, :, 0]


def without(rows: Rows, features: Tensor) -> Rows:
    """The rows when some features `[T, n]` can be weighed as well."""
    more = replace(rows, known=torch.cat([rows.known, features], 1))
    if features.shape[1] == 1:
        # one more direction needs no new decomposition, which would take longer than all the rest
        left = rows.unexplained(rows.unexplained(features))
        grown = left.norm() > CUT_FRAC * features.norm()
        new = left / left.norm() if grown else left[:, :0]
        more.__dict__["basis"] = torch.cat([rows.basis, new], 1)
    return more
