"""What new seeds promise at each site, and what they begin with, by the last measurement.

Shapes: S = seeds, T = rows, I = features that a span reads, C = channels that a chunk seed reads.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from esper.seeds.blueprints import Blueprint
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.matching import (
    SCORED_CANDIDATES,
    Rows,
    chunk_units,
    linear_unit,
    span_units,
    without,
)
from esper_kernels import PHI

# incoming weights `[C, n]` (of a span `[I, 1]`) and biases `[n]` of the n units of one seed
Unit = tuple[Tensor, Tensor]
# units of a span that are told apart in a report
RANKED_UNITS = 8
# units of a span that are chosen out of one draw of candidates
UNITS_AT_ONCE = 64


class Prospects:
    """What was measured last, and what new seeds could make of it.

    Args:
        rows: By site; empty: nothing was measured.
    """

    def __init__(self, rows: Mapping[str, Rows] | None = None) -> None:
        self._rows = dict(rows or {})

    def __contains__(self, site: str) -> bool:
        return site in self._rows

    def source(self, site: str) -> Tensor | None:
        """Rows that the seeds of a site read, `[T, I]`; None if it was not measured."""
        return self._rows[site].source if site in self._rows else None

    def unexplained(self, site: str) -> float:
        """Mean square of the wanted change that the host cannot make; NaN if not measured."""
        if site not in self._rows:
            return math.nan
        rows = self._rows[site]
        return float(rows.unexplained(rows.wanted).square().sum(1).mean())

    def bottleneck(
        self,
        site: str,
        layer: KasminaLayer,
        dormant: list[int],
        blueprints: Sequence[Blueprint],
        draw: Callable[[], torch.Generator],
    ) -> tuple[Tensor, str | None]:
        """The bottleneck of the dormant seeds, and whose units promise it.

        Args:
            site: Name of the site.
            layer: Its layer.
            dormant: The seeds.
            blueprints: Whose units are tried, as far as they fit the site.
            draw: Makes the generator of the candidates, the same at each call.

        Returns:
            `[S]`, NaN for other seeds; NaN for all and None where nothing was measured.
        """
        fitting = [b for b in blueprints if b.fits(layer.geometry, layer.hidden)]
        if site not in self._rows or not dormant or not fitting:
            return torch.full((layer.num_seeds,), math.nan), None
        found = [self._bottleneck_of(b, site, layer, dormant, draw()) for b in fitting]
        worth = [
            float(gain[dormant].max()) / layer.seed_parameters(b)
            for b, gain in zip(fitting, found, strict=True)
        ]
        best = worth.index(max(worth))
        return found[best], fitting[best].name

    def _bottleneck_of(
        self, blueprint: Blueprint, site: str, layer: KasminaLayer, dormant: list[int],
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """The bottleneck of the dormant seeds for units of one blueprint; NaN for other seeds."""
        found = torch.full((layer.num_seeds,), math.nan)
        rows, phi = self._rows[site], PHI[blueprint.phi]
        if layer.geometry == "span":
            # slots are alike: the lowest is worth the best unit, the next what is left then
            count = min(len(dormant), RANKED_UNITS)
            units = span_units(
                rows, phi, count, generator, biased=layer.biased, candidates=SCORED_CANDIDATES
            )
            # no later slot is worth more, so that the lowest is taken first
            gain = units.gain[0].cpu().cummin(0).values
            found[dormant] = torch.cat([gain, gain[-1:].expand(len(dormant) - count)])
        else:
            count = blueprint.hidden(layer.hidden)
            units = chunk_units(rows, dormant, layer.num_seeds, phi, count, generator)
            found[dormant] = units.gain.sum(1).cpu()
        return found

    def units(
        self,
        site: str,
        layer: KasminaLayer,
        seeds: list[int],
        blueprint: Blueprint,
        how: Literal["matched", "gradmax", "tiny"],
        draw: Callable[[int], torch.Generator],
    ) -> Iterator[tuple[int, Unit]]:
        """Each seed of a wave with its units; what they explain is taken from the measurement.

        Args:
            site: Name of the site, which was measured.
            layer: Its layer.
            seeds: The wave.
            blueprint: Of all of them.
            how: Which units.
            draw: Makes the generator of a seed.
        """
        phi = PHI[blueprint.phi]
        if layer.geometry == "chunk":
            for seed in seeds:
                count, generator = blueprint.hidden(layer.hidden), draw(seed)
                units = chunk_units(
                    self._rows[site], [seed], layer.num_seeds, phi, count, generator
                )
                yield seed, (units.w_in[0], units.bias[0])
        elif how != "matched":
            for seed in seeds:
                units, self._rows[site] = linear_unit(self._rows[site], tiny=how == "tiny")
                yield seed, (units.w_in[0], units.bias[0])
        else:
            for first in range(0, len(seeds), UNITS_AT_ONCE):
                some, rows = seeds[first : first + UNITS_AT_ONCE], self._rows[site]
                units = span_units(rows, phi, len(some), draw(some[0]), biased=layer.biased)
                # what comes next, of this wave or of another blueprint, is to find something else
                hidden = phi(rows.source @ units.w_in[0] + units.bias[0])
                self._rows[site] = without(rows, hidden)
                for at, seed in enumerate(some):
                    yield seed, (units.w_in[0, :, at : at + 1], units.bias[0, at : at + 1])
