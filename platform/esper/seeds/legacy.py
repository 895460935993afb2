"""The legacy layer: one seed at a time in a Python loop, five stages, the old interface.

It is what `esper.seeds.kasmina.KasminaLayer` replaces, and the baseline that the parallel layer
is compared with: given the same seeds, both compute the same.

`KasminaLayer` and `SeedLifecycleState` are the names that users have; each use of them warns and
names what to use instead (docs/migration/deprecations.md). `SequentialLayer` is the same layer
without the warnings: what baselines and the regression suite measure against.
"""

import warnings
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import deprecated

from esper.seeds import kasmina
from esper.seeds.blueprints import BLUEPRINTS, blueprint_id
from esper.seeds.loop import seed_output
from esper.seeds.state import SeedState, Stage


class LegacyStage(IntEnum):
    """The five stages of the old interface, which knew them as `SeedLifecycleState`."""

    DORMANT = 0
    LOADING = 1
    ACTIVE = 2
    ERROR_RECOVERY = 3
    FOSSILIZED = 4


# how the eleven stages map onto the five
LEGACY_STAGE = {
    Stage.DORMANT: LegacyStage.DORMANT,
    Stage.GERMINATED: LegacyStage.LOADING,
    Stage.TRAINING: LegacyStage.LOADING,
    Stage.GRAFTING: LegacyStage.LOADING,
    Stage.STABILIZATION: LegacyStage.ACTIVE,
    Stage.EVALUATING: LegacyStage.ACTIVE,
    Stage.FINE_TUNING: LegacyStage.ACTIVE,
    Stage.FOSSILIZED: LegacyStage.FOSSILIZED,
    Stage.CULLED: LegacyStage.ERROR_RECOVERY,
    Stage.CANCELLED: LegacyStage.DORMANT,
    Stage.ROLLED_BACK: LegacyStage.ERROR_RECOVERY,
}


class _Seed(nn.Module):
    """One seed with its own little weights."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(channels, hidden))
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.zeros(hidden, channels))
        self.blueprint = BLUEPRINTS["noop"]

    def forward(self, x: Tensor) -> Tensor:
        used = self.blueprint.hidden(self.b1.shape[0])
        return seed_output(x, self.w1, self.b1, self.w2, self.blueprint.phi, used)


class SequentialLayer(nn.Module):
    """A linear layer whose output is refined by seeds, one after the other.

    Args:
        input_size: Input features.
        output_size: Output features; divisible by `num_seeds`.
        num_seeds: Seeds, each on its own chunk of the output.
        hidden: Hidden units of a seed; None: the chunk's width, at least 2.
        telemetry_enabled: Whether `get_layer_stats` counts calls.
        layer_name: Name in the statistics.

    Raises:
        ValueError: If `output_size` is not divisible by `num_seeds`.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_seeds: int = 4,
        *,
        hidden: int | None = None,
        telemetry_enabled: bool = True,
        layer_name: str = "kasmina_layer",
    ) -> None:
        super().__init__()
        if output_size % num_seeds:
            raise ValueError(
                f"num_seeds must divide output_size ({output_size}), but got {num_seeds}."
            )
        self.num_seeds, self.layer_name = num_seeds, layer_name
        self.telemetry_enabled = telemetry_enabled
        self.default_transform = nn.Linear(input_size, output_size)
        width = output_size // num_seeds
        self.seeds = nn.ModuleList(_Seed(width, hidden or max(2, width)) for _ in range(num_seeds))
        self.alpha_blend = [0.0] * num_seeds
        self.lifecycle_states = [LegacyStage.DORMANT] * num_seeds
        self.total_forward_calls = self.total_kernel_executions = 0

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., input_size]` to `[..., output_size]`."""
        base = self.default_transform(x)
        chunks = list(base.chunk(self.num_seeds, dim=-1))
        executed = 0
        for i, seed in enumerate(self.seeds):
            # a seed that is switched off is not computed: NaN in its weights stays there
            if self.alpha_blend[i] != 0.0:
                chunks[i] = chunks[i] + self.alpha_blend[i] * seed(chunks[i])
                executed += 1
        if self.telemetry_enabled:
            self.total_forward_calls += 1
            self.total_kernel_executions += executed
        return torch.cat(chunks, dim=-1) if executed else base

    def load_kernel(self, seed_idx: int, artifact_id: str) -> bool:
        """Give a seed a blueprint, with random incoming and zero outgoing weights.

        Raises:
            ValueError: If the index is out of range or the blueprint does not fit.
        """
        seed = self._seed(seed_idx)
        blueprint = BLUEPRINTS[artifact_id]
        blueprint.require("chunk", seed.b1.shape[0])
        self.lifecycle_states[seed_idx] = LegacyStage.LOADING
        seed.blueprint = blueprint
        nn.init.kaiming_uniform_(seed.w1.mT, a=5**0.5)
        nn.init.zeros_(seed.w2)
        self.lifecycle_states[seed_idx] = LegacyStage.ACTIVE
        return True

    def unload_kernel(self, seed_idx: int) -> bool:
        """Put a seed to sleep."""
        self._seed(seed_idx).blueprint = BLUEPRINTS["noop"]
        self.alpha_blend[seed_idx] = 0.0
        self.lifecycle_states[seed_idx] = LegacyStage.DORMANT
        return True

    def set_seed_alpha(self, seed_idx: int, alpha: float) -> None:
        """Set how much of a seed is blended in; clamped to [0, 1], as it always was.

        Raises:
            ValueError: If the index is out of range.
        """
        self._seed(seed_idx)
        self.alpha_blend[seed_idx] = max(0.0, min(1.0, alpha))

    def get_layer_stats(self) -> dict[str, Any]:
        """Counts of calls and of seeds by stage."""
        calls = self.total_forward_calls
        counts = {
            f"{state.name.lower()}_seeds": self.lifecycle_states.count(state)
            for state in LegacyStage
        }
        return {
            "layer_name": self.layer_name,
            "total_forward_calls": calls,
            "total_kernel_executions": self.total_kernel_executions,
            "kernel_execution_ratio": self.total_kernel_executions / max(calls, 1),
            "state_stats": {"num_seeds": self.num_seeds, **counts},
            "telemetry_enabled": self.telemetry_enabled,
        }

    @torch.no_grad()
    def copy_seeds(self, layer: kasmina.KasminaLayer) -> None:
        """Take over the seeds of a parallel chunk layer: weights, blueprints, alphas, stages.

        Raises:
            ValueError: If the layers have different seeds or sizes.
        """
        self._require_same_sizes(layer)
        blueprints = BLUEPRINTS.values()
        for i, state in enumerate(layer.states()):
            seed = self._seed(i)
            for mine, theirs in zip((seed.w1, seed.b1, seed.w2), layer.pool(), strict=True):
                mine.copy_(theirs[i])
            seed.blueprint = blueprints[state.blueprint_id]
            self.alpha_blend[i] = float(layer.alpha[i])
            self.lifecycle_states[i] = LEGACY_STAGE[state.stage]

    @torch.no_grad()
    def give_seeds(self, layer: kasmina.KasminaLayer) -> None:
        """Hand the seeds over to a parallel chunk layer, which then computes the same.

        A seed that is blended in becomes FINE_TUNING (or stays FOSSILIZED) with alpha 1, and its
        old alpha goes into its outgoing weights. A loaded one with alpha 0 becomes GERMINATED, and
        keeps its weights; the others sleep.

        Raises:
            ValueError: If the layers have different seeds or sizes, or the parallel layer has
                seeds that are not dormant.
        """
        self._require_same_sizes(layer)
        if set(layer.states().stages()) != {Stage.DORMANT}:
            raise ValueError(
                "layer must have dormant seeds only, but some are not; attach a new lattice."
            )
        states = [SeedState()] * self.num_seeds
        for i, alpha in enumerate(self.alpha_blend):
            seed = self._seed(i)
            if seed.blueprint.name == "noop":
                continue
            stage = Stage.FINE_TUNING if alpha else Stage.GERMINATED
            if alpha and self.lifecycle_states[i] is LegacyStage.FOSSILIZED:
                stage = Stage.FOSSILIZED
            states[i] = SeedState(stage, blueprint_id(seed.blueprint.name))
            weights = seed.w1, seed.b1, seed.w2 * alpha if alpha else seed.w2
            for theirs, mine in zip(layer.pool(), weights, strict=True):
                theirs[i] = mine
            layer.alpha[i] = layer.progress[i] = float(alpha != 0)
        layer.write_states(states)

    def _require_same_sizes(self, layer: kasmina.KasminaLayer) -> None:
        shape = (self.num_seeds, *self._seed(0).w1.shape)
        if layer.geometry != "chunk" or layer.pool()[0].shape != shape:
            raise ValueError(
                f"layer must be a chunk layer with weights {shape}, "
                f"but got {layer.geometry} with {tuple(layer.pool()[0].shape)}."
            )

    def _seed(self, index: int) -> _Seed:
        if not 0 <= index < self.num_seeds:
            raise ValueError(f"seed_idx must be in 0..{self.num_seeds - 1}, but got {index}.")
        seed = self.seeds[index]
        assert isinstance(seed, _Seed)
        return seed


# The messages are written out, because type checkers and editors show them only if they are.
@deprecated(
    "esper.seeds.legacy.KasminaLayer is deprecated since 0.1.0 and will be removed in 0.5.0; "
    "use esper.attach (docs/migration/guide.md)."
)
class KasminaLayer(SequentialLayer):
    """`SequentialLayer` under its old name; every use of it warns."""

    @deprecated(
        "esper.seeds.legacy.KasminaLayer.load_kernel is deprecated since 0.1.0 and will be removed "
        "in 0.5.0; use esper.Germinate with Lattice.apply (docs/migration/guide.md)."
    )
    def load_kernel(self, seed_idx: int, artifact_id: str) -> bool:
        """See `SequentialLayer`."""
        return super().load_kernel(seed_idx, artifact_id)

    @deprecated(
        "esper.seeds.legacy.KasminaLayer.unload_kernel is deprecated since 0.1.0 and will be "
        "removed in 0.5.0; use esper.Cull with Lattice.apply (docs/migration/guide.md)."
    )
    def unload_kernel(self, seed_idx: int) -> bool:
        """See `SequentialLayer`."""
        return super().unload_kernel(seed_idx)

    @deprecated(
        "esper.seeds.legacy.KasminaLayer.set_seed_alpha is deprecated since 0.1.0 and will be "
        "removed in 0.5.0; use esper.Germinate.graft (docs/migration/guide.md)."
    )
    def set_seed_alpha(self, seed_idx: int, alpha: float) -> None:
        """See `SequentialLayer`."""
        super().set_seed_alpha(seed_idx, alpha)

    @deprecated(
        "esper.seeds.legacy.KasminaLayer.get_layer_stats is deprecated since 0.1.0 and will be "
        "removed in 0.5.0; use Lattice.report (docs/migration/guide.md)."
    )
    def get_layer_stats(self) -> dict[str, Any]:
        """See `SequentialLayer`."""
        return super().get_layer_stats()


def __getattr__(name: str) -> Any:
    if name == "SeedLifecycleState":
        warnings.warn(
            "esper.seeds.legacy.SeedLifecycleState is deprecated since 0.1.0 and will be removed "
            "in 0.5.0; use esper.Stage (docs/migration/guide.md).",
            DeprecationWarning,
            stacklevel=2,
        )
        return LegacyStage
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'.")
