"""Kasmina: the layer that runs all seeds of one site at once.

Two geometries share one state tensor, one pool of weights and one lifecycle. The site's output
passes through `forward`; with no seed awake it comes back as the very same tensor.

Seeds in TRAINING learn without touching the host, bit for bit: the operator passes their input
on, and makes of the gradient that comes back, for them alone, a gradient of their own objective
(`esper_kernels.reference.isolated`). What is awake and who learns is data on the device, so in
a compiled model or a CUDA graph nothing is compiled or captured again when it changes.

Shapes: S = seeds, D = channels of the site's output, C = D / S, H = hidden units of a chunk
seed, I = input features of a span, T = rows (batch x positions).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from esper.config.run import Execution, GrowthConfig
from esper.seeds import loop, optimizer_guard, telemetry
from esper.seeds.blueprints import BLUEPRINTS, Blueprint, Geometry
from esper.seeds.grafting import GRAFTS, GraftSignals
from esper.seeds.local_rows import all_rows, by_process, local_rows, put_rows
from esper.seeds.outputs import first_of, with_first
from esper.seeds.state import (
    AWAKE_STAGES,
    BLUEPRINT,
    EPOCHS,
    GRAFT,
    GRAFTED_STAGES,
    STAGE,
    TRAINABLE_STAGES,
    SeedState,
    SeedTable,
    Stage,
)
from esper_kernels import chunk_seeds, span_seeds
from esper_kernels.learning import FROZEN, ISOLATED, TASK, Objective
from esper_kernels.reference.span import span_hidden
from esper_kernels.support import needs_plain

# passes are observed at every n-th optimizer step; a score is a mean, it does not need them all.
# Counted by steps, because a checkpointed pass must run again just as it did.
OBSERVE_EVERY = 4


class _Options(TypedDict):
    learning_S: Tensor
    probe: Tensor | None
    objective: Objective
    observe: bool


class _Alongside(Function):
    """A copy of the output; its gradient goes to the host as it came, and to `rows` as well.

    By way of the rows, the gradient would reach the host in another layout, and be summed there
    in another order.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, rows: Tensor, to_rows: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.to_rows = to_rows
        # a copy, because a view made here could not be modified in place by the host's next module
        return output.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return dy, ctx.to_rows(dy), None


class KasminaLayer(nn.Module):
    """All seeds of one site.

    Args:
        channels: Channels D of the site's output.
        num_seeds: Seeds S; divides D for chunk sites.
        geometry: 'chunk' or 'span'.
        hidden: Hidden units H of a chunk seed; None: C, at least 2.
        in_features: Input features I; span sites only.
        channel_axis: Axis of the channels in the site's output.
        biased: Whether hidden units have a bias; without one it stays 0 and is no parameter.
        dtype: Of the pool; at least fp32.
        device: Of everything.
        execution: How the seeds are computed; see `execution`.

    Attributes:
        w_in: Incoming weights, `[S, C, H]`; of a span `[S, I]`.
        bias: Biases of the hidden units, `[S, H]`; of a span `[S]`.
        w_out: Outgoing weights, `[S, H, C]`; of a span `[S, D]`.
        state: One row a seed, `[S, 4]` int32; see `esper.seeds.state`.
        alpha: Blend weights in [0, 1], `[S]` fp32, as all that follows unless it says otherwise.
        progress: Of each graft, in [0, 1].
        ramped_steps: Steps of its ramp that a seed has gone.
        pace: Steps of its ramp that it goes in a step of the optimizer.
        graft_loss: Training loss when its grafting began; NaN before.
        fresh: Whose moments the optimizer is to forget, `[3, S]` bool, one row a tensor of the
            pool.
        moment_age: Steps that each seed's moments have gathered since, `[3, S]`.
        replayed_steps: Steps of the optimizer in replayed CUDA graphs, `[1]` int32.
        counted_steps: All other steps of the optimizer.
        trainable: Whose weights may move, bool; this and what follows is derived from the state.
        ramping: 1 for the seeds that are being grafted, else 0.
        cosine: Whose ramp is half a cosine, bool; the others' are linear.
        phi: Codes of the seeds' functions (`esper_kernels.Phi`), int32.
        hidden_used: Hidden units that each seed uses, int32.
        learning: What each seed learns (`esper_kernels.learning`), int32.
        any_fresh: Whether some seed is fresh; likewise `any_trainable`, `any_training` (alone),
            `any_ramping` and `any_grafted`.
        probe: Gathers what passes measure as its gradient; see `esper.seeds.telemetry`.
        objective: What seeds learn alone.
        ramp_steps: Steps of a whole ramp at full pace.
        young_rate: Factor on the learning rate of a seed's first step, which comes to 1 over
            `young_steps` steps of its own.

    Raises:
        ValueError: If the channels are not divisible by the seeds, a size is less than 1, an
            argument is missing, or the execution is unknown.
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
    replayed_steps: Tensor
    trainable: Tensor
    ramping: Tensor
    cosine: Tensor
    phi: Tensor
    hidden_used: Tensor
    learning: Tensor
    probe: Tensor

    def __init__(
        self,
        channels: int,
        num_seeds: int,
        *,
        geometry: Geometry = "chunk",
        hidden: int | None = None,
        in_features: int | None = None,
        channel_axis: int = -1,
        biased: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        execution: Execution = "kernels",
    ) -> None:
        super().__init__()
        self.execution = execution
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
        self.biased = biased
        self.objective: Objective = "desired_update"
        self.ramp_steps = 100
        # the seeds that are computed here; None: all
        self._held: slice | None = None
        # factor on the learning rate of a seed's first step, and steps until it is 1
        self.young_rate, self.young_steps = 1.0, 100
        self._make_pool(torch.promote_types(dtype, torch.float32), device)
        self._make_state(device)
        self.counted_steps = self._counted_before = self._steps_before = 0
        self._source: Tensor | None = None
        # whether training passes ran in this interval
        self._seen = False
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
        # Python counts no step that a CUDA graph replays
        replayed = torch.zeros(1, dtype=torch.int32, device=device)
        self.register_buffer("replayed_steps", replayed, persistent=False)
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
            # what the gradient of each seed is: none, that of the task, or the isolated one
            "learning": torch.zeros(S, dtype=torch.int32),
        }.items():
            self.register_buffer(name, fill.to(device), persistent=False)

    def share(self, mesh: Any) -> None:
        """Compute a part of the seeds here: of ranges of one size, that of this process's rank.

        From now on `forward` takes, and gives, the channels of these seeds alone, as a
        column-parallel module has them. States and flags of all seeds stay here; reports tell of
        all seeds, so that every process must ask for them. Call it before an optimizer is built.

        Args:
            mesh: One axis of processes (`torch.distributed.device_mesh`).

        Raises:
            ValueError: If the seeds cannot be split so.
        """
        count = mesh.size()
        if self.geometry != "chunk":
            raise ValueError(
                "geometry must be 'chunk' for shards to share the seeds of a site, but got 'span': "
                "what its units learn depends on sums that no shard has before the host has "
                "reduced them; use chunk seeds, or parallel: data."
            )
        if self.num_seeds % count:
            raise ValueError(
                f"seeds_per_layer must be a multiple of the {count} shards that share them, but "
                f"got {self.num_seeds}; change one of them."
            )
        from torch.distributed.tensor import Shard

        for name in ("w_in", "bias", "w_out"):
            weights: Tensor = getattr(self, name).detach()
            own = nn.Parameter(by_process(weights, mesh, [Shard(0)]))
            self.register_parameter(name, own)
        self._held = local_rows(self.w_in)[1]
        del self.probe
        self.reset_telemetry()

    def _sizes(self) -> tuple[int, int]:
        """Channels and seeds that are computed here."""
        if self._held is None:
            return self.channels, self.num_seeds
        seeds = self._held.stop - self._held.start
        return seeds * self.fan_in, seeds

    def _mine(self, flags_S: Tensor) -> Tensor:
        """Of one value a seed, those of the seeds that are computed here."""
        return flags_S if self._held is None else flags_S[self._held]

    @property
    def execution(self) -> Execution:
        """How the seeds are computed; all three give the same values within rounding.

        'kernels': all at once, by Triton where there is a GPU, else in plain PyTorch.
        'vectorised': all at once, in plain PyTorch on every device.
        'loop': one awake seed after another, as the legacy layer does; not in a compiled model.

        It may be changed between any two passes: weights, state and telemetry are the same.
        """
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if execution not in get_args(Execution):
            names = ", ".join(get_args(Execution))
            raise ValueError(f"execution must be one of {names}, but got '{execution}'.")
        self._execution: Execution = execution

    def pool(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Incoming weights, biases and outgoing weights of all seeds, seeds first."""
        return self.w_in, self.bias, self.w_out

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.w_in, self.bias if self.biased else self.bias.detach(), self.w_out
        return weights if self._held is None else _local(weights)

    def states(self) -> SeedTable:
        """The state of every seed, as a copy; one device read."""
        return SeedTable(self.state.cpu().numpy().copy())

    def awake(self) -> Tensor:
        """Mask of the awake seeds, `[S]`, on the layer's device."""
        stages = self.state[:, STAGE]
        return torch.isin(stages, torch.tensor(sorted(AWAKE_STAGES), device=stages.device))

    @torch.no_grad()
    def write_states(self, states: SeedTable | Sequence[SeedState]) -> None:
        """Replace the whole state tensor; alpha and weights follow from `on_enter`."""
        table = states if isinstance(states, SeedTable) else SeedTable.of(states)
        self.state.copy_(torch.from_numpy(table.rows))
        self.refresh()

    @torch.no_grad()
    def on_enter(self, seeds: Sequence[int], stage: Stage, loss: float | None) -> None:
        """What entering a stage does to the data of some seeds.

        Args:
            seeds: Which; a whole wave costs no more operations than one seed.
            stage: Their new stage.
            loss: Last training loss, remembered when grafting begins.
        """
        rows = torch.as_tensor(seeds, device=self.alpha.device)
        match stage:
            case Stage.GRAFTING:
                self.progress[rows] = 0
                self.ramped_steps[rows] = 0
                self.graft_loss[rows] = math.nan if loss is None else loss
                # the objective changes, so old moments would push in a stale direction
                self._forget_moments(rows)
            case Stage.STABILIZATION:
                self.progress[rows] = 1
                self.alpha[rows] = 1
            case Stage.CULLED | Stage.CANCELLED | Stage.ROLLED_BACK | Stage.DORMANT:
                self.progress[rows] = 0
                self.alpha[rows] = 0

    @torch.no_grad()
    def initialise(
        self,
        generators: Mapping[int, torch.Generator],
        *,
        outgoing: bool = False,
        units: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Fresh weights for some seeds, as `torch.nn.Linear` draws them.

        Args:
            generators: Seeds, each with the CPU generator of all its draws.
            outgoing: False: outgoing weights 0, so that a seed changes nothing whatever alpha
                is. True: random ones, for a topology that is trained from scratch.
            units: Of some of them, incoming weights `[C, n]` and biases `[n]` of the first n
                hidden units, in place of drawn ones; of a span `[I, 1]` and `[1]`.
        """
        seeds = list(generators)
        used = self.hidden_used.tolist()
        fans = [self.fan_in] * len(seeds), [max(1, used[s]) for s in seeds]
        for weights, fan, random in (
            (self.w_in, fans[0], True),
            (self.bias, fans[0], self.biased),
            (self.w_out, fans[1], outgoing),
        ):
            # every process draws all numbers, and one of them holds the seed
            drawn = [
                torch.rand(weights.shape[1:], generator=generator, dtype=torch.float64)
                for generator in generators.values()
            ]
            bounds = [1 / math.sqrt(n) if random else 0.0 for n in fan]
            fresh = [(2 * draw - 1) * bound for draw, bound in zip(drawn, bounds, strict=True)]
            put_rows(weights, dict(zip(seeds, fresh, strict=True)))
        # blueprints may differ in how many units they use
        by_count: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        for seed, unit in (units or {}).items():
            by_count.setdefault(unit[0].shape[-1], {})[seed] = unit
        for some in by_count.values():
            for i, weights in enumerate((self.w_in, self.bias)):
                put_rows(weights, {seed: unit[i] for seed, unit in some.items()})
        rows = torch.as_tensor(seeds, device=self.alpha.device)
        self.progress[rows] = 0
        self.alpha[rows] = 0
        self.graft_loss[rows] = math.nan
        self._forget_moments(rows)

    def _forget_moments(self, rows: Tensor) -> None:
        self.fresh[:, rows] = True
        self.any_fresh = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive masks and flags from the state tensor; after every change of it."""
        table = self.states()
        stages = set(table.stages())
        blueprints = BLUEPRINTS.values()
        cosine = [graft.curve == "cosine" for graft in GRAFTS.values()]

        def put(name: str, column: int, values: Sequence[Any]) -> None:
            """Fill a buffer with the value that belongs to each seed's entry in a column."""
            buffer: Tensor = getattr(self, name)
            buffer.copy_(torch.from_numpy(np.array(values)[table.rows[:, column]]))

        put("trainable", STAGE, [s in TRAINABLE_STAGES for s in Stage])
        put("ramping", STAGE, [s is Stage.GRAFTING for s in Stage])
        put("learning", STAGE, [_learning(s) for s in Stage])
        put("phi", BLUEPRINT, [b.phi for b in blueprints])
        put("hidden_used", BLUEPRINT, [b.hidden(self.hidden) for b in blueprints])
        put("cosine", GRAFT, cosine)
        codes = {blueprints[kind].phi for kind in np.unique(table.rows[:, BLUEPRINT])}
        chunk = self.fan_in, self.hidden
        self._plain = needs_plain(codes, *chunk if self.geometry == "chunk" else ())
        self.any_fresh = bool(self.fresh.any())
        self.any_training = Stage.TRAINING in stages
        self.any_ramping = Stage.GRAFTING in stages
        self.any_grafted = bool(stages & GRAFTED_STAGES)
        self.any_trainable = bool(stages & TRAINABLE_STAGES)

    def set_paces(self, signals: GraftSignals, growth: GrowthConfig) -> None:
        """Decide how fast each grafting seed moves in the next interval."""
        grafts, rows = GRAFTS.values(), self.states().rows
        ramping = rows[:, STAGE] == Stage.GRAFTING
        paces = np.ones(self.num_seeds)
        for kind in np.unique(rows[ramping, GRAFT]):
            pace = grafts[kind].pace(signals, growth)
            paces[ramping & (rows[:, GRAFT] == kind)] = pace
        self.pace.copy_(torch.from_numpy(paces))

    @property
    def steps(self) -> int:
        """Optimizer steps so far, those of replayed CUDA graphs included; one device read."""
        replayed = 0 if self.replayed_steps.is_meta else int(self.replayed_steps)
        return self.counted_steps + replayed

    @steps.setter
    def steps(self, steps: int) -> None:
        self.counted_steps = steps
        self.replayed_steps.zero_()

    def forward(self, output: Tensor, source: Tensor | None = None) -> Tensor:
        """The site's output with every awake seed's contribution.

        Args:
            output: Output of the site, channels on `channel_axis`.
            source: Input of the span, for span sites.

        Returns:
            `output` itself while no seed is awake (while training, a copy of its bits where the
            gradient could not be observed otherwise: of a view, or behind a frozen host); else,
            and always in a compiled model and a CUDA graph, a tensor of its shape, dtype and
            layout.

        Raises:
            ValueError: If the channels or the positions do not fit the layer, or a loop is to be
                compiled or captured.
        """
        self._check(output)
        learning = self.training and torch.is_grad_enabled()
        if torch.compiler.is_compiling() or _is_captured(output):
            if self._execution == "loop":
                raise ValueError(
                    "execution must be 'kernels' in a compiled model or a CUDA graph, but got "
                    "'loop', which asks the device which seeds are awake; set layer.execution."
                )
            # no flag that a stage change moves may be read: it would be compiled in
            return self._run(output, source, learning, observe=learning)
        self._seen = self._seen or learning
        steps = self.counted_steps - self._counted_before
        observe = learning and steps % OBSERVE_EVERY == 0
        if self.any_grafted and self._may_blend():
            return self._run(output, source, learning, observe)
        if self.any_training and learning:
            return self._train_alone(output, source, observe)
        return self._watch(output, observe) if learning else output

    def _run(self, output: Tensor, source: Tensor | None, learning: bool, observe: bool) -> Tensor:
        return self._unrows(self._run_rows(self.rows(output), source, learning, observe), output)

    def _run_rows(
        self, rows: Tensor, source: Tensor | None, learning: bool, observe: bool
    ) -> Tensor:
        learns = self._mine(self.learning)
        if not learning and torch.is_grad_enabled():
            # seeds learn alone only while the model trains
            learns = learns * (learns == TASK)
        options = _Options(
            learning_S=learns, probe=self.probe if learning else None, objective=self.objective,
            observe=observe,
        )  # fmt: skip
        plain = self._plain or self._execution == "vectorised"
        seeds = *self._weights(), self._mine(self.alpha), self._mine(self.phi)
        if self.geometry == "chunk":
            used = self._mine(self.hidden_used)
            if self._execution == "loop":
                return loop.chunk_seeds(rows, *seeds, used, **options)
            return chunk_seeds(rows, *seeds, used, **options, plain=plain)
        x = self._source_rows(source)
        if self._execution == "loop":
            return loop.span_seeds(x, rows, *seeds, **options)
        return span_seeds(x, rows, *seeds, **options, plain=plain)

    def _may_blend(self) -> bool:
        """False if every alpha is 0, as in a ramp's first step; a GPU is not asked."""
        return self.alpha.device.type != "cpu" or bool(self.alpha.any())

    def _train_alone(self, output: Tensor, source: Tensor | None, observe: bool) -> Tensor:
        """Show the gradient to the seeds in TRAINING, while no seed is awake."""
        read = None if source is None else source.detach()
        rows = self._run_rows(self.rows(output).detach(), read, True, observe)
        y: Tensor = _Alongside.apply(output, rows, self.rows)  # type: ignore[no-untyped-call]
        return y

    def _watch(self, output: Tensor, observe: bool) -> Tensor:
        """Gather statistics while no seed is awake; returns the output, ready for its gradient."""
        y, plain = output, self._execution != "kernels"
        if not y.requires_grad:
            # behind a frozen host nothing asks for this gradient but the score of the seeds
            y = y.detach().requires_grad_().clone()
        if observe:
            telemetry.add_activations(self._told(), self.rows(output), plain=plain)
            if y._is_view():
                # a module that works in place on a view would take the hook away with its history
                y = y.clone()
            y.register_hook(
                lambda dy: telemetry.add_gradient(self._told(), self.rows(dy), plain=plain)
            )
        return y

    def _check(self, output: Tensor) -> None:
        channels = self._sizes()[0]
        if output.shape[self.channel_axis] != channels:
            raise ValueError(
                f"channels must be {channels} on axis {self.channel_axis} of the site's "
                f"output, but got shape {tuple(output.shape)}; attach with the right `channels` "
                "and `channel_axis`."
            )

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor with its channels last and all other axes in one, `[T, D]`."""
        return tensor.movedim(self.channel_axis, -1).reshape(-1, tensor.shape[self.channel_axis])

    def _unrows(self, rows: Tensor, like: Tensor) -> Tensor:
        # rows that nobody else holds, seen in the host's shape but not as a view: the next module
        # may work in place, which would take hooks off a view
        if self.channel_axis in (-1, like.ndim - 1):
            y: Tensor = torch.ops.aten._unsafe_view(rows, like.shape)
        else:
            shape = like.movedim(self.channel_axis, -1).shape
            y = rows.view(shape).movedim(-1, self.channel_axis)
        # the host may rely on the layout: in a `view`, or in the last bit of its convolutions
        return y if y.stride() == like.stride() else torch.empty_like(like).copy_(y)

    def _source_rows(self, source: Tensor | None) -> Tensor:
        if source is None:
            raise ValueError(
                "source must be the input of the span, but is missing; the span's first module "
                "must take it as a positional argument, and run before its last, in every "
                "forward pass."
            )
        return self.rows(source)

    def capture_source(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a span's first module.

        To compile a model with `torch.utils.checkpoint` around a span, allow this note to be
        taken once: `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True`.
        """
        self._source = args[0] if args else None

    def graft_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the site, or of a span's last module."""
        source = None
        if self.geometry == "span":
            source, self._source = self._source, None
            if source is None:
                self._source_rows(None)
        return with_first(output, self(first_of(output), source))

    def reset_telemetry(self) -> None:
        """Start a new interval."""
        self._seen = False
        self._steps_before, self._counted_before = self.steps, self.counted_steps
        device = self.state.device
        if self.__dict__.get("probe") is None or self.probe.device != device:
            self.probe = telemetry.make_probe(*self._sizes(), device)
        # in place, because CUDA graphs add to this very memory
        telemetry.gathered(self.probe).zero_()

    def _told(self) -> telemetry.Told:
        return telemetry.told(self.probe, *self._sizes())

    def telemetry(self) -> dict[str, Tensor]:
        """Everything the report needs, one value a seed, on the CPU; one device read.

        Values that were not measured in this interval are NaN.
        """
        measured = telemetry.summary(self._told(), self.geometry)
        if self._held is not None:
            together = all_rows(torch.stack([*measured.values()], 1), self.w_in)
            measured = dict(zip(measured, together.unbind(1), strict=True))
        in_training = self.state[:, STAGE] == Stage.TRAINING
        explained = torch.where(in_training, measured["explained_frac"], math.nan)
        columns = {
            "stage": self.state[:, STAGE],
            "blueprint_id": self.state[:, BLUEPRINT],
            "epochs": self.state[:, EPOCHS],
            "graft_id": self.state[:, GRAFT],
            "alpha": self.alpha,
            "progress": self.progress,
            **measured,
            "explained_frac": explained,
            "graft_loss": self.graft_loss,
        }
        # fp32 holds every int32 here exactly: stages, ids and interval counts are small
        told = torch.stack([c.float() for c in columns.values()]).cpu()
        return dict(zip(columns, told, strict=True))

    def all_channels(self, rows_TD: Tensor) -> Tensor:
        """Rows of the whole output, `[T, D]`, from those of the channels that are computed here."""
        if self._held is None:
            return rows_TD
        by_seed = rows_TD.t().reshape(self._sizes()[1], -1)
        return all_rows(by_seed, self.w_in).view(self.channels, -1).t().contiguous()

    @property
    def starved(self) -> bool:
        """True if seeds should have learned in this interval, but no optimizer moved them."""
        if not self.any_trainable or self.steps > self._steps_before:
            return False
        # compiled passes move no Python flag, but they count on the device
        told = self._told()
        return self._seen or bool(told.passes + told.isolated > 0)

    def span_hidden(self, source: Tensor, rows: Tensor) -> Tensor:
        """Hidden activations of the given span units, `[T, n]`."""
        return span_hidden(source, self.w_in[rows], self.bias[rows], self.phi[rows])

    def fitting(self) -> list[Blueprint]:
        """Blueprints that a seed of this site may have."""
        return [b for b in BLUEPRINTS.values() if b.fits(self.geometry, self.hidden)]

    def seed_parameters(self, blueprint: Blueprint) -> int:
        """Parameters of one seed of that blueprint on this site."""
        all_biased = blueprint.parameters(self.geometry, self.fan_in, self.hidden, self.fan_out)
        return all_biased - (not self.biased and blueprint.hidden_frac > 0)

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

    def __getstate__(self) -> dict[str, Any]:
        # a pickled leaf loses its gradient, and that is all there is to a probe
        return {**self.__dict__, "probe": telemetry.gathered(self.probe)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        gathered = self.probe
        self.probe = telemetry.with_gathered(torch.zeros_like(gathered), gathered)
        optimizer_guard.watch(self)

    def extra_repr(self) -> str:
        """One line: geometry, sizes, how many seeds are awake."""
        grafted = int((self.alpha > 0).sum())
        return (
            f"{self.geometry}, seeds={self.num_seeds}, channels={self.channels}, "
            f"hidden={self.hidden}, grafted={grafted}"
        )


def _local(weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows held here, through which the gradient reaches the sharded weights."""
    sharded: Any = weights
    w_in, bias, w_out = (w.to_local() for w in sharded)
    return w_in, bias, w_out


def _learning(stage: Stage) -> int:
    if stage is Stage.TRAINING:
        return ISOLATED
    return TASK if stage in TRAINABLE_STAGES else FROZEN


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
