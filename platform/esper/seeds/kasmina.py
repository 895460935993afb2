"""Kasmina: the layer that runs all seeds of one site at once.

Two geometries share one state tensor, one pool of weights and one lifecycle. The site's output
passes through `forward`; with no seed awake it comes back as the very same tensor.

Shapes: S = seeds, D = channels of the site's output, C = D / S, H = hidden units of a chunk
seed, I = input features of a span, T = rows (batch x positions).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from esper.config.run import GrowthConfig
from esper.seeds import isolated, optimizer_guard
from esper.seeds.blueprints import BLUEPRINTS, Blueprint, Geometry
from esper.seeds.grafting import GRAFTS, GraftSignals
from esper.seeds.state import (
    BLUEPRINT,
    EPOCHS,
    GRAFT,
    GRAFTED_STAGES,
    STAGE,
    TRAINABLE_STAGES,
    SeedState,
    Stage,
)
from esper_kernels import chunk_seeds, span_seeds
from esper_kernels.reference.span import span_hidden

DEAD_BELOW = 1e-6
# telemetry is read in every n-th training pass; a score is a mean, it does not need them all
OBSERVE_EVERY = 4


class KasminaLayer(nn.Module):
    """All seeds of one site.

    Args:
        channels: Channels D of the site's output.
        num_seeds: Seeds S; divides D for chunk sites.
        geometry: 'chunk' or 'span'.
        hidden: Hidden units H of a chunk seed; None: C, at least 2.
        in_features: Input features I; span sites only.
        channel_axis: Axis of the channels in the site's output.
        dtype: Of the pool; at least fp32.
        device: Of everything.

    Raises:
        ValueError: If the channels are not divisible by the seeds, a size is less than 1, or an
            argument is missing.
    """

    w_in: nn.Parameter
    bias: nn.Parameter
    w_out: nn.Parameter
    state: Tensor
    alpha: Tensor
    progress: Tensor
    ramped_steps: Tensor
    graft_loss: Tensor
    pace: Tensor
    fresh: Tensor
    moment_age: Tensor
    trainable: Tensor
    ramping: Tensor
    cosine: Tensor
    phi: Tensor
    hidden_used: Tensor
    training_rows: Tensor

    def __init__(
        self,
        channels: int,
        num_seeds: int,
        *,
        geometry: Geometry = "chunk",
        hidden: int | None = None,
        in_features: int | None = None,
        channel_axis: int = -1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_seeds < 1:
            raise ValueError(f"seeds_per_layer must be at least 1, but got {num_seeds}.")
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden must be at least 1, but got {hidden}.")
        if geometry == "chunk" and channels % num_seeds:
            fits = [s for s in range(1, channels + 1) if channels % s == 0]
            raise ValueError(
                f"seeds_per_layer must divide the site's {channels} channels, "
                f"but got {num_seeds}; use one of {fits}."
            )
        if geometry == "span" and in_features is None:
            raise ValueError("in_features must be given for a span site, but is missing.")
        if hidden is not None and geometry == "span":
            raise ValueError(f"hidden must be left out for a span site, but got {hidden}.")
        self.geometry: Geometry = geometry
        self.channels, self.num_seeds, self.channel_axis = channels, num_seeds, channel_axis
        self.fan_in = channels // num_seeds if geometry == "chunk" else int(in_features or 0)
        self.fan_out = channels // num_seeds if geometry == "chunk" else channels
        self.hidden = (hidden or max(2, self.fan_in)) if geometry == "chunk" else 1
        self.objective: isolated.Objective = "desired_update"
        self.ramp_steps = 100
        self._make_pool(torch.promote_types(dtype, torch.float32), device)
        self._make_state(device)
        self.steps = 0
        self._source: Tensor | None = None
        self.reset_telemetry()
        self.refresh()
        optimizer_guard.watch(self)

    def _make_pool(self, dtype: torch.dtype, device: torch.device | str | None) -> None:
        S, H = self.num_seeds, self.hidden
        chunk = self.geometry == "chunk"
        shapes = {
            "w_in": (S, self.fan_in, H) if chunk else (S, self.fan_in),
            "bias": (S, H) if chunk else (S,),
            "w_out": (S, H, self.fan_out) if chunk else (S, self.fan_out),
        }
        for name, shape in shapes.items():
            weights = torch.zeros(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(weights))

    def _make_state(self, device: torch.device | str | None) -> None:
        S = self.num_seeds
        self.register_buffer("state", torch.zeros(S, 4, dtype=torch.int32, device=device))
        for name in ("alpha", "progress", "ramped_steps"):
            self.register_buffer(name, torch.zeros(S, device=device))
        self.register_buffer("graft_loss", torch.full((S,), math.nan, device=device))
        self.register_buffer("pace", torch.ones(S, device=device))
        # seeds whose moments the optimizer is to forget, one row for each tensor of the pool
        self.register_buffer("fresh", torch.zeros(3, S, dtype=torch.bool, device=device))
        # steps that each seed's moments have gathered since
        self.register_buffer("moment_age", torch.zeros(3, S, device=device))
        # what follows is derived from the state by `refresh`
        for name, fill in {
            "trainable": torch.zeros(S, dtype=torch.bool),
            "ramping": torch.zeros(S),
            "cosine": torch.zeros(S, dtype=torch.bool),
            "phi": torch.zeros(S, dtype=torch.int32),
            "hidden_used": torch.zeros(S, dtype=torch.int32),
            "training_rows": torch.zeros(0, dtype=torch.int64),
        }.items():
            self.register_buffer(name, fill.to(device), persistent=False)

    def pool(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Incoming weights, biases and outgoing weights of all seeds, seeds first."""
        return self.w_in, self.bias, self.w_out

    def trainable_like(self, tensor: Tensor) -> Tensor:
        """Mask of the rows that may move, broadcastable to a `[S, ...]` tensor."""
        return self.trainable.view(-1, *[1] * (tensor.ndim - 1))

    def states(self) -> list[SeedState]:
        """The state of every seed; one device read."""
        rows = self.state.tolist()
        return [SeedState(Stage(r[STAGE]), r[BLUEPRINT], r[EPOCHS], r[GRAFT]) for r in rows]

    @torch.no_grad()
    def write_states(self, states: list[SeedState]) -> None:
        """Replace the whole state tensor; alpha and weights follow from `on_enter`."""
        rows = [[s.stage, s.blueprint_id, s.epochs, s.graft_id] for s in states]
        self.state.copy_(torch.tensor(rows, dtype=torch.int32))
        self.refresh()

    @torch.no_grad()
    def on_enter(self, seed: int, state: SeedState, loss: float | None) -> None:
        """What entering a stage does to one seed's data.

        Args:
            seed: Which.
            state: Its new state.
            loss: Last training loss, remembered when grafting begins.
        """
        match state.stage:
            case Stage.GRAFTING:
                self.progress[seed] = self.ramped_steps[seed] = 0
                self.graft_loss[seed] = math.nan if loss is None else loss
                # the objective changes, so old moments would push in a stale direction
                self._forget_moments(seed)
            case Stage.STABILIZATION:
                self.progress[seed] = 1
                self.alpha[seed] = 1
            case Stage.CULLED | Stage.CANCELLED | Stage.ROLLED_BACK | Stage.DORMANT:
                self.progress[seed] = 0
                self.alpha[seed] = 0

    @torch.no_grad()
    def initialise(self, seed: int, generator: torch.Generator, *, outgoing: bool = False) -> None:
        """Fresh weights for one seed, as `torch.nn.Linear` draws them.

        Args:
            seed: Which.
            generator: CPU generator of all draws.
            outgoing: False: outgoing weights 0, so that the seed changes nothing whatever alpha
                is. True: random ones, for a topology that is trained from scratch.
        """
        for weights, fan, random in (
            (self.w_in, self.fan_in, True),
            (self.bias, self.fan_in, True),
            (self.w_out, max(1, int(self.hidden_used[seed])), outgoing),
        ):
            bound = 1 / math.sqrt(fan) if random else 0.0
            draw = torch.rand(weights[seed].shape, generator=generator, dtype=torch.float64)
            weights[seed] = ((2 * draw - 1) * bound).to(weights)
        self.progress[seed] = 0
        self.alpha[seed] = 0
        self.graft_loss[seed] = math.nan
        self._forget_moments(seed)

    def _forget_moments(self, seed: int) -> None:
        self.fresh[:, seed] = True
        self.any_fresh = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive masks and flags from the state tensor; after every change of it."""
        states = self.states()
        blueprints = tuple(BLUEPRINTS[name] for name in BLUEPRINTS)
        grafts = tuple(GRAFTS[name] for name in GRAFTS)
        of = [blueprints[s.blueprint_id] for s in states]

        def put(name: str, values: list[Any]) -> None:
            buffer: Tensor = getattr(self, name)
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype))

        put("trainable", [s.stage in TRAINABLE_STAGES for s in states])
        put("ramping", [s.stage is Stage.GRAFTING for s in states])
        put("cosine", [grafts[s.graft_id].curve == "cosine" for s in states])
        put("phi", [b.phi for b in of])
        put("hidden_used", [b.hidden(self.hidden) for b in of])
        training = [i for i, s in enumerate(states) if s.stage is Stage.TRAINING]
        self.training_rows = torch.tensor(training, dtype=torch.int64, device=self.state.device)
        self.any_fresh = bool(self.fresh.any())
        stages = {s.stage for s in states}
        self._any_training = Stage.TRAINING in stages
        self._any_ramping = Stage.GRAFTING in stages
        self._any_grafted = bool(stages & GRAFTED_STAGES)
        self._any_frozen = bool(stages & (GRAFTED_STAGES - TRAINABLE_STAGES))
        self.any_trainable = bool(stages & TRAINABLE_STAGES)

    def set_paces(self, signals: GraftSignals, growth: GrowthConfig) -> None:
        """Decide how fast each grafting seed moves in the next interval."""
        names = tuple(GRAFTS)
        paces = [
            GRAFTS[names[s.graft_id]].pace(signals, growth) if s.stage is Stage.GRAFTING else 1.0
            for s in self.states()
        ]
        self.pace.copy_(torch.tensor(paces))

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Move every graft one step on; called by the optimizer guard."""
        self.steps += 1
        self._moved = True
        self.any_fresh = self.any_fresh and bool(self.fresh.any())
        if self._any_ramping:
            # whole steps are counted, so that the ramp ends at exactly 1
            self.ramped_steps += self.ramping * self.pace
            torch.clamp(self.ramped_steps / self.ramp_steps, max=1.0, out=self.progress)
            eased = (1 - torch.cos(math.pi * self.progress)) / 2
            alpha = torch.where(self.cosine, eased, self.progress)
            torch.where(self.ramping > 0, alpha, self.alpha, out=self.alpha)

    def forward(self, output: Tensor, source: Tensor | None = None) -> Tensor:
        """The site's output with every awake seed's contribution.

        Args:
            output: Output of the site, channels on `channel_axis`.
            source: Input of the span, for span sites.

        Returns:
            `output` itself while no seed is awake (while training, a copy of its bits where the
            gradient could not be observed otherwise: of a view, or behind a frozen host); else
            a tensor of its shape, dtype and layout.

        Raises:
            ValueError: If the channels or the positions do not fit the layer.
        """
        self._check(output)
        learning = self.training and torch.is_grad_enabled()
        training = self._any_training and learning
        y = output
        if self._any_grafted or training:
            rows = self._rows(output)
            y_rows = self._run(rows, source)
            if y_rows is not rows:
                y = self._unrows(y_rows, output)
            if training:
                y = self._tap(y, rows, source)
        if learning:
            y = self._observe(output, y)
        return y

    def _run(self, rows: Tensor, source: Tensor | None) -> Tensor:
        w_in, bias, w_out = (self._moving(w) for w in self.pool())
        if self.geometry == "chunk":
            return chunk_seeds(rows, w_in, bias, w_out, self.alpha, self.phi, self.hidden_used)
        x = self._source_rows(source)
        return span_seeds(x, rows, w_in, bias, w_out, self.alpha, self.phi)

    def _moving(self, weights: Tensor) -> Tensor:
        """The pool with the gradient cut off for frozen seeds."""
        if not self._any_frozen:
            return weights
        return torch.where(self.trainable_like(weights), weights, weights.detach())

    def _tap(self, y: Tensor, rows: Tensor, source: Tensor | None) -> Tensor:
        x, idx = rows.detach(), self.training_rows
        read = self._source_rows(source).detach() if self.geometry == "span" else x

        def unexplained(dy: Tensor, w_in: Tensor, bias: Tensor, w_out: Tensor) -> Tensor:
            grad = self._rows(dy)
            if self.geometry == "span":
                target = isolated.target_of(self.objective, x.to(w_in), grad.to(w_in), (0, 1))
                phi = self.phi[idx]
                return isolated.span_unexplained(read.to(w_in), target, w_in, bias, w_out, phi)
            chunks, grads = (self._chunks(t)[idx].to(w_in) for t in (x, grad))
            target = isolated.target_of(self.objective, chunks, grads, (1, 2))
            return isolated.chunk_unexplained(
                chunks, target, w_in, bias, w_out, self.phi[idx], self.hidden_used[idx]
            )

        def observe(explained: Tensor) -> None:
            self._explained.index_add_(0, idx, explained.to(self._explained))
            self._explained_passes += 1

        tapped: Tensor = isolated.IsolatedTap.apply(  # type: ignore[no-untyped-call]
            y, unexplained, observe, idx, *self.pool()
        )
        return tapped

    def _check(self, output: Tensor) -> None:
        if output.shape[self.channel_axis] != self.channels:
            raise ValueError(
                f"channels must be {self.channels} on axis {self.channel_axis} of the site's "
                f"output, but got shape {tuple(output.shape)}; attach with the right `channels` "
                "and `channel_axis`."
            )

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.channel_axis, -1).reshape(-1, tensor.shape[self.channel_axis])

    def _unrows(self, rows: Tensor, like: Tensor) -> Tensor:
        shape = like.movedim(self.channel_axis, -1).shape
        y = rows.reshape(shape).movedim(-1, self.channel_axis)
        # the host may rely on the layout: in a `view`, or in the last bit of its convolutions
        return y if y.stride() == like.stride() else torch.empty_like(like).copy_(y)

    def _chunks(self, rows: Tensor) -> Tensor:
        chunks: Tensor = rows.unflatten(1, (self.num_seeds, self.fan_in)).transpose(0, 1)
        return chunks

    def _source_rows(self, source: Tensor | None) -> Tensor:
        if source is None:
            raise ValueError(
                "source must be the input of the span, but is missing; the span's first module "
                "must take it as a positional argument, and run before its last, in every "
                "forward pass."
            )
        return self._rows(source)

    def capture_source(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a span's first module."""
        self._source = args[0] if args else None

    def graft_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the site, or of a span's last module."""
        source = None
        if self.geometry == "span":
            source, self._source = self._source, None
            if source is None:
                self._source_rows(None)
        if not isinstance(output, tuple):
            return self(output, source)
        outputs = (self(output[0], source), *output[1:])
        return output._make(outputs) if hasattr(output, "_make") else outputs

    def reset_telemetry(self) -> None:
        """Start a new interval."""
        device = self.state.device
        self._passes = self._observed_rows = self._grad_passes = self._explained_passes = 0
        self._moved = False
        self._sum, self._sum_sq, self._dead = torch.zeros(3, self.channels, device=device)
        self._energy = torch.zeros(self.num_seeds, device=device)
        self._explained = torch.zeros(self.num_seeds, device=device)

    def _observe(self, output: Tensor, y: Tensor) -> Tensor:
        """Gather statistics in every n-th training pass; returns y, ready for its gradient."""
        if not y.requires_grad:
            # behind a frozen host nothing asks for this gradient but the score of the seeds
            y = y.detach().requires_grad_().clone()
        self._passes += 1
        if (self._passes - 1) % OBSERVE_EVERY:
            return y
        rows = self._rows(output.detach()).float()
        self._observed_rows += len(rows)
        self._sum += rows.sum(0)
        self._sum_sq += rows.square().sum(0)
        self._dead += (rows.abs() < DEAD_BELOW).sum(0)
        if y._is_view():
            # a module that works in place on a view would take the hook away with its history
            y = y.clone()
        y.register_hook(self._observe_grad)
        return y

    @torch.no_grad()
    def _observe_grad(self, grad: Tensor) -> None:
        rows = self._rows(grad).float() * (grad.numel() // self.channels)
        energy = rows.square().mean(0)
        if self.geometry == "chunk":
            self._energy += energy.view(self.num_seeds, -1).mean(1)
        else:
            self._energy += energy.mean()
        self._grad_passes += 1

    def telemetry(self) -> dict[str, Tensor]:
        """Everything the report needs, one value a seed, on the CPU; one device read.

        Values that were not measured in this interval are NaN.
        """
        n, S = self._observed_rows, self.num_seeds
        mean = self._sum / n if n else torch.full_like(self._sum, math.nan)
        variance = self._sum_sq / max(n, 1) - mean.square()
        dead = self._dead / n if n else mean

        def per_seed(values: Tensor) -> Tensor:
            chunk = self.geometry == "chunk"
            return values.view(S, -1).mean(1) if chunk else values.mean().expand(S)

        def mean_of(total: Tensor, passes: int) -> Tensor:
            return total / passes if passes else torch.full_like(total, math.nan)

        explained = mean_of(self._explained, self._explained_passes)
        in_training = self.state[:, STAGE] == Stage.TRAINING
        columns = {
            "stage": self.state[:, STAGE],
            "blueprint_id": self.state[:, BLUEPRINT],
            "epochs": self.state[:, EPOCHS],
            "graft_id": self.state[:, GRAFT],
            "alpha": self.alpha,
            "progress": self.progress,
            "grad_energy": mean_of(self._energy, self._grad_passes),
            "variance": per_seed(variance).clamp(min=0),
            "dead_frac": per_seed(dead),
            "explained_frac": torch.where(in_training, explained, math.nan),
            "graft_loss": self.graft_loss,
        }
        # fp32 holds every int32 here exactly: stages, ids and interval counts are small
        together = torch.stack([c.float() for c in columns.values()]).cpu()
        return dict(zip(columns, together, strict=True))

    @property
    def starved(self) -> bool:
        """True if seeds should have learned in this interval, but no optimizer moved them."""
        return self.any_trainable and self._passes > 0 and not self._moved

    def span_hidden(self, source: Tensor, rows: Tensor) -> Tensor:
        """Hidden activations of the given span units, `[T, n]`."""
        return span_hidden(source, self.w_in[rows], self.bias[rows], self.phi[rows])

    def seed_parameters(self, blueprint: Blueprint) -> int:
        """Parameters of one seed of that blueprint on this site."""
        return blueprint.parameters(self.geometry, self.fan_in, self.hidden, self.fan_out)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> "KasminaLayer":
        def exact(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            # not by way of `moved`, which a half-precision host has rounded already
            return tensor.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

        super()._apply(exact, recurse)  # type: ignore[no-untyped-call]
        # alpha blends in fp32 whatever the host's dtype
        for name in (
            "alpha",
            "progress",
            "ramped_steps",
            "graft_loss",
            "pace",
            "ramping",
            "moment_age",
        ):
            setattr(self, name, getattr(self, name).float())
        self.reset_telemetry()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        optimizer_guard.watch(self)

    def extra_repr(self) -> str:
        """One line: geometry, sizes, how many seeds are awake."""
        grafted = int((self.alpha > 0).sum())
        return (
            f"{self.geometry}, seeds={self.num_seeds}, channels={self.channels}, "
            f"hidden={self.hidden}, grafted={grafted}"
        )
