"""The lattice: one handle on all seeds of a model, and `attach`, which makes it."""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.config.run import GrowthConfig
from esper.seeds.actions import Action, Germinate
from esper.seeds.blueprints import BLUEPRINTS, Blueprint, Geometry
from esper.seeds.grafting import GRAFTS, GraftSignals
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.lifecycle import Transition, advance
from esper.seeds.local_rows import is_distributed, whole
from esper.seeds.matching import (
    SCORED_CANDIDATES,
    Rows,
    chunk_units,
    copied_unit,
    linear_unit,
    span_units,
    without,
)
from esper.seeds.report import Report, SiteReport
from esper.seeds.state import AWAKE_STAGES, BLUEPRINT, EPOCHS, STAGE, SeedState, Stage
from esper.surgery.measure import Loss, measure_rows
from esper.surgery.sites import Site, find_sites, input_features, output_channels
from esper_kernels import PHI

# held-out losses: one number a sample (its standard error is then known), or their mean
Evaluate = Callable[[], Tensor | float]
_HANDLE = "_esper_lattice"
# weights of each host tensor that the drift is measured on
DRIFT_SAMPLES = 4096
# units of a span that are told apart in a report
RANKED_UNITS = 8
# units of a span that are chosen out of one draw of candidates
UNITS_AT_ONCE = 64


@dataclass(frozen=True)
class Attached:
    """One site with its layer, and the hooks that run it.

    The handles are kept because a copy or a pickle keeps the hooks apart from later ones
    only with them.
    """

    site: Site
    layer: KasminaLayer
    hooks: tuple[RemovableHandle, ...]


class Lattice:
    """All seeds of one model.

    Made by `attach`. Once an interval, call `report` and give its result to a controller, then
    `apply` the controller's actions.

    Attributes:
        model: The host, with the lattice's layers inside it.
        growth: Times, thresholds and limits.
        seed: Seed of every random draw of the lattice.
        interval: Intervals finished.
        log: Every transition so far.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model = model
        self.growth = GrowthConfig()
        self.seed = seed
        self.interval = 0
        self.log: list[Transition] = []
        self.attached: dict[str, Attached] = {}
        self._signals = GraftSignals()
        self._grad_norms: list[float] = []
        self._drift_base: list[Tensor] | None = None
        # what the last report measured; new seeds are matched to it
        self._measured: dict[str, Rows] = {}

    def layer(self, site: str) -> KasminaLayer:
        """The layer of a site.

        Raises:
            ValueError: If the lattice has no such site.
        """
        if site not in self.attached:
            raise ValueError(f"site must be one of {', '.join(self.attached)}, but got '{site}'.")
        return self.attached[site].layer

    def parameters(self) -> Iterator[nn.Parameter]:
        """The pools of all sites; give them to your own optimizer, once, for the whole run."""
        for attached in self.attached.values():
            yield from attached.layer.pool()

    def host_parameters(self) -> Iterator[nn.Parameter]:
        """The host's own parameters, without the lattice's."""
        ours = {id(p) for p in self.parameters()}
        return (p for p in self.model.parameters() if id(p) not in ours)

    def count_parameters(self) -> int:
        """Parameters of the host and of every awake seed, by its blueprint."""
        blueprints = [BLUEPRINTS[name] for name in BLUEPRINTS]
        return sum(p.numel() for p in self.host_parameters()) + sum(
            number * layer.seed_parameters(blueprints[kind])
            for layer in self._layers()
            for kind, number in Counter(layer.state[_awake(layer), BLUEPRINT].tolist()).items()
        )

    def count_awake(self) -> int:
        """Seeds that are awake, over all sites."""
        return sum(int(_awake(layer).sum()) for layer in self._layers())

    @property
    def steps(self) -> int:
        """Optimizer steps that moved the lattice."""
        return max((layer.steps for layer in self._layers()), default=0)

    def report(
        self,
        loss: float | None = None,
        evaluate: Evaluate | None = None,
        measure: Loss | None = None,
        affordable_parameters: int | None = None,
    ) -> Report:
        """What happened since the last report; one device read a site, and a new interval.

        Args:
            loss: Mean training loss of the interval.
            evaluate: Returns the held-out loss of the model as it is now, as one value a
                sample, `[N]`, or as their mean. Called in eval mode without gradient: once, and
                once more for each seed in EVALUATING, with that seed switched off.
            measure: Returns the mean loss of a batch of training data, with its gradient, for the
                bottleneck and matched units. Called once, in eval mode; the parameters'
                gradients are left as they are.
            affordable_parameters: Host and awake seeds together that a budget of your own has room
                for now; it limits germination as `growth.max_parameters` does.

        Returns:
            The report; values that could not be measured are None or NaN.

        Raises:
            ValueError: If seeds should have learned but no optimizer holds their parameters, or
                `measure` does not run the model.
            NotFiniteError: If what is measured holds values that are not finite.
        """
        self._require_moving()
        loss = None if loss is None else float(loss)
        held_out = self._evaluate(evaluate)
        self._measured = {} if measure is None else measure_rows(self.model, self.attached, measure)
        self.interval += 1
        for layer in self._layers():
            layer.state[:, EPOCHS] += layer.state[:, STAGE] != Stage.DORMANT
        room = self._room(affordable_parameters)
        sites = tuple(
            self._site_report(name, a.layer, evaluate, held_out, scored=room)
            for name, a in self.attached.items()
        )
        grad_norm = self._grad_norm()
        if grad_norm is not None:
            self._grad_norms = [*self._grad_norms[-30:], grad_norm]
        self._signals = GraftSignals(
            loss=loss,
            previous_loss=self._signals.loss,
            host_drift_frac=self._drift(),
            grad_norm=grad_norm,
            median_grad_norm=median(self._grad_norms) if self._grad_norms else None,
        )
        for layer in self._layers():
            layer.reset_telemetry()
        return Report(
            interval=self.interval,
            step=self.steps,
            loss=loss,
            held_out_loss=None if held_out is None else float(held_out.mean()),
            grad_norm=grad_norm,
            host_drift_frac=self._signals.host_drift_frac,
            host_parameters=sum(p.numel() for p in self.host_parameters()),
            parameters=self.count_parameters(),
            growth=self.growth,
            sites=sites,
            affordable_parameters=affordable_parameters,
        )

    def apply(self, actions: Sequence[Action] = ()) -> list[Transition]:
        """Apply the actions in order; all are checked before anything changes.

        Args:
            actions: From a controller.

        Returns:
            The transitions, which are also appended to `log`.

        Raises:
            IllegalTransitionError: If a seed's stage does not allow its action.
            ValueError: If a site or seed does not exist, a blueprint does not fit, or a graft
                strategy or a seed to be matched needs what the last report did not measure.
        """
        transitions = self.check(actions)
        changed = dict.fromkeys(t.action.site for t in transitions)
        for site in changed:
            states = self.layer(site).states()
            for t in transitions:
                if t.action.site == site:
                    states[t.action.seed] = t.after
            self.layer(site).write_states(states)
        self._enter(transitions, self._match_waves(transitions))
        for layer in self._layers():
            if layer.ramping.any():
                layer.set_paces(self._signals, self.growth)
        self.log += transitions
        return transitions

    def check(self, actions: Sequence[Action]) -> list[Transition]:
        """The transitions that `apply` would make; raises what it would raise."""
        states = {name: a.layer.states() for name, a in self.attached.items()}
        transitions = []
        # read from the device once, not once an action
        steps = self.steps
        for action in actions:
            layer = self.layer(action.site)
            if not 0 <= action.seed < layer.num_seeds:
                raise ValueError(
                    f"seed of site '{action.site}' must be in 0..{layer.num_seeds - 1}, "
                    f"but got {action.seed}."
                )
            before = states[action.site][action.seed]
            after = advance(before, action)
            if isinstance(action, Germinate):
                BLUEPRINTS[action.blueprint].require(layer.geometry, layer.hidden)
                self._require_measured(action)
            states[action.site][action.seed] = after
            transitions.append(Transition(self.interval, steps, action, before, after))
        grafts = [GRAFTS[name] for name in GRAFTS]
        for table in states.values():
            for kind in {table[seed].graft_id for seed in table.seeds_in({Stage.GRAFTING})}:
                grafts[kind].pace(self._signals, self.growth)
        return transitions

    def plant(self, site: str, seed: int, blueprint: str) -> None:
        """Put a finished seed in place before training, with ordinary random weights.

        For topologies that are trained from scratch, such as the static-final arm of an
        experiment; a growing network germinates its seeds instead.

        Raises:
            ValueError: If the slot is not dormant or the blueprint does not fit.
        """
        layer = self.layer(site)
        states = layer.states()
        if not 0 <= seed < layer.num_seeds:
            raise ValueError(
                f"seed of site '{site}' must be in 0..{layer.num_seeds - 1}, but got {seed}."
            )
        if states[seed].stage is not Stage.DORMANT:
            raise ValueError(
                f"seed {seed} of '{site}' must be DORMANT to be planted, "
                f"but is {states[seed].stage.name}."
            )
        BLUEPRINTS[blueprint].require(layer.geometry, layer.hidden)
        names = tuple(BLUEPRINTS)
        states[seed] = SeedState(Stage.FINE_TUNING, names.index(blueprint))
        layer.write_states(states)
        layer.initialise({seed: self._generator(site, seed)}, outgoing=True)
        with torch.no_grad():
            layer.alpha[seed] = layer.progress[seed] = 1

    def fold(self) -> nn.Module:
        """Turn every grafted seed into plain modules and remove the lattice; see `fold_model`."""
        from esper.surgery.fold import fold_model

        return fold_model(self)

    def detach(self) -> nn.Module:
        """Remove the lattice and all its seeds; the host is as it would be without them."""
        for attached in self.attached.values():
            for hook in attached.hooks:
                hook.remove()
        ours = {id(layer) for layer in self._layers()}
        for module in list(self.model.modules()):
            for name in [n for n, child in module.named_children() if id(child) in ours]:
                delattr(module, name)
        self.attached.clear()
        if _HANDLE in self.model.__dict__:
            delattr(self.model, _HANDLE)
        return self.model

    def restart_drift(self) -> None:
        """Measure the host's drift from its present weights on, after they were replaced."""
        self._drift_base = None
        # it is measured from report to report, so before the first there is none
        if self.interval:
            self._drift()

    def configure_layers(self) -> None:
        """Tell every layer what the settings mean for it."""
        for layer in self._layers():
            layer.ramp_steps = self.growth.ramp_steps
            layer.young_rate, layer.young_steps = self.growth.young_rate, self.growth.young_steps
            layer.objective = self.growth.objective

    def _layers(self) -> list[KasminaLayer]:
        return [a.layer for a in self.attached.values()]

    def _enter(
        self,
        transitions: Sequence[Transition],
        matched: Mapping[tuple[str, int], tuple[Tensor, Tensor]],
    ) -> None:
        """Do what the new stages ask for, to all seeds at once that enter the same one."""
        # the moves of one seed keep their order; seeds do not depend on one another
        moves: Counter[tuple[str, int]] = Counter()
        waves: dict[tuple[int, str, Stage], list[int]] = {}
        for t in transitions:
            site, seed = t.action.site, t.action.seed
            waves.setdefault((moves[site, seed], site, t.after.stage), []).append(seed)
            moves[site, seed] += 1
        for (_, site, stage), seeds in sorted(waves.items(), key=lambda wave: wave[0][0]):
            layer = self.layer(site)
            layer.on_enter(seeds, stage, self._signals.loss)
            if stage is Stage.GERMINATED:
                units = {seed: matched[site, seed] for seed in seeds if (site, seed) in matched}
                layer.initialise({s: self._generator(site, s) for s in seeds}, units=units)

    def _require_measured(self, action: Germinate) -> None:
        wanted = self.growth.initialisation not in ("random", "net2net")
        if (
            wanted
            and BLUEPRINTS[action.blueprint].elementwise
            and action.site not in self._measured
        ):
            raise ValueError(
                f"'{action.site}' must be measured before a seed is matched to it, but is not; "
                "give `measure` to `lattice.report(...)` or set growth.initialisation to 'random'."
            )
        if self.growth.initialisation == "net2net":
            self._host_units(action.site)

    def _host_units(self, site: str) -> nn.Linear | None:
        """The module whose units a new seed may copy; None at a chunk site, which has none."""
        if self.layer(site).geometry == "chunk":
            return None
        first = self.model.get_submodule(self.attached[site].site.first)
        if not isinstance(first, nn.Linear):
            raise ValueError(
                f"'{site}' must begin with a Linear for its units to be copied, but begins with a "
                f"{type(first).__name__}; set growth.initialisation to 'random'."
            )
        return first

    def _match_waves(
        self, transitions: Sequence[Transition]
    ) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """Units for the new seeds that are not drawn, by site and seed; a whole wave at once."""
        waves: dict[tuple[str, int], list[int]] = {}
        for t in transitions:
            kind = t.after.blueprint_id
            new = t.after.stage is Stage.GERMINATED and self.growth.initialisation != "random"
            # units of blueprints that mix them cannot be told apart, and are drawn
            if new and BLUEPRINTS[tuple(BLUEPRINTS)[kind]].elementwise:
                waves.setdefault((t.action.site, kind), []).append(t.action.seed)
        return {
            (site, seed): unit
            for (site, kind), seeds in waves.items()
            for seed, unit in self._match(site, seeds, kind)
        }

    def _match(
        self, site: str, seeds: list[int], kind: int
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Each seed with the incoming weights and biases of its units."""
        layer, how = self.layer(site), self.growth.initialisation
        if how == "net2net":
            if host := self._host_units(site):
                for seed in seeds:
                    yield seed, copied_unit(host, self._generator(site, seed))
            return
        blueprint, rows = BLUEPRINTS[tuple(BLUEPRINTS)[kind]], self._measured[site]
        phi = PHI[blueprint.phi]
        if layer.geometry == "chunk":
            for seed in seeds:
                count, generator = blueprint.hidden(layer.hidden), self._generator(site, seed)
                units = chunk_units(rows, [seed], layer.num_seeds, phi, count, generator)
                yield seed, (units.w_in[0], units.bias[0])
        elif how != "matched":
            for seed in seeds:
                units, self._measured[site] = linear_unit(self._measured[site], tiny=how == "tiny")
                yield seed, (units.w_in[0], units.bias[0])
        else:
            for first in range(0, len(seeds), UNITS_AT_ONCE):
                some, rows = seeds[first : first + UNITS_AT_ONCE], self._measured[site]
                generator = self._generator(site, some[0])
                units = span_units(rows, phi, len(some), generator, biased=layer.biased)
                # what comes next, of this wave or of another blueprint, is to find something else
                hidden = phi(rows.source @ units.w_in[0] + units.bias[0])
                self._measured[site] = without(rows, hidden)
                for at, seed in enumerate(some):
                    yield seed, (units.w_in[0, :, at : at + 1], units.bias[0, at : at + 1])

    def _room(self, affordable_parameters: int | None) -> bool:
        """Whether the limits leave room for a seed; places are not scored for nothing."""
        growth = self.growth
        if growth.max_active_seeds is not None and self.count_awake() >= growth.max_active_seeds:
            return False
        limits = [n for n in (growth.max_parameters, affordable_parameters) if n is not None]
        if not limits:
            return True
        costs = [
            layer.seed_parameters(BLUEPRINTS[n])
            for layer in self._layers()
            for n in BLUEPRINTS
            if BLUEPRINTS[n].fits(layer.geometry, layer.hidden) and BLUEPRINTS[n].phi
        ]
        left = min(limits) - self.count_parameters()
        return any(cost <= left for cost in costs)

    def _bottleneck(
        self, site: str, layer: KasminaLayer, dormant: list[int]
    ) -> tuple[Tensor, str | None]:
        """The bottleneck of the dormant seeds, and whose units promise it.

        NaN for other seeds and None where nothing was measured.
        """
        named = [BLUEPRINTS[n] for n in self.growth.scored_at(site)]
        fitting = [b for b in named if b.fits(layer.geometry, layer.hidden)]
        if site not in self._measured or not dormant or not fitting:
            return torch.full((layer.num_seeds,), math.nan), None
        found = [self._bottleneck_of(b, site, layer, dormant) for b in fitting]
        worth = [
            float(gain[dormant].max()) / layer.seed_parameters(b)
            for b, gain in zip(fitting, found, strict=True)
        ]
        best = worth.index(max(worth))
        return found[best], fitting[best].name

    def _bottleneck_of(
        self, blueprint: Blueprint, site: str, layer: KasminaLayer, dormant: list[int]
    ) -> Tensor:
        """The bottleneck of the dormant seeds for units of one blueprint; NaN for other seeds."""
        found = torch.full((layer.num_seeds,), math.nan)
        generator = self._generator(site, -1)
        rows, phi = self._measured[site], PHI[blueprint.phi]
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

    def _generator(self, site: str, seed: int) -> torch.Generator:
        # a function of where and when, so that a resumed run draws the same weights
        key = f"{self.seed}|{site}|{seed}|{self.interval}".encode()
        return torch.Generator().manual_seed(zlib.crc32(key))

    def _require_moving(self) -> None:
        for name, attached in self.attached.items():
            if attached.layer.starved:
                raise ValueError(
                    f"seeds of '{name}' must be moved by an optimizer, but none holds their "
                    "parameters; add `lattice.parameters()` to your optimizer."
                )

    def _site_report(
        self, name: str, layer: KasminaLayer, evaluate: Evaluate | None, held_out: Tensor | None,
        *, scored: bool,
    ) -> SiteReport:  # fmt: skip
        columns = {k: v.numpy() for k, v in layer.telemetry().items()}
        ints = {
            k: columns.pop(k).astype("int32")
            for k in ("stage", "blueprint_id", "epochs", "graft_id")
        }
        gain = torch.full((2, layer.num_seeds), math.nan)
        asked = self.growth.min_gain is not None
        if asked and evaluate is not None and held_out is not None:
            for seed in (ints["stage"] == Stage.EVALUATING).nonzero()[0]:
                gain[:, seed] = self._gain(layer, int(seed), evaluate, held_out)
        fitting = {
            n: layer.seed_parameters(BLUEPRINTS[n])
            for n in BLUEPRINTS
            if BLUEPRINTS[n].fits(layer.geometry, layer.hidden)
        }
        dormant = [int(s) for s in (ints["stage"] == Stage.DORMANT).nonzero()[0]] if scored else []
        bottleneck, scored_blueprint = self._bottleneck(name, layer, dormant)
        silent = layer.silent_frac(self._measured[name].source if name in self._measured else None)
        ratio = layer.grad_rms() / self._host_grad_rms(self.attached[name].site)
        return SiteReport(
            name=name, geometry=layer.geometry, **ints, **columns, bottleneck=bottleneck.numpy(),
            silent_frac=silent.numpy(), grad_ratio=ratio.numpy(), gain=gain[0].numpy(),
            gain_se=gain[1].numpy(), seed_parameters=fitting,
            unexplained=self._unexplained(name), scored_blueprint=scored_blueprint,
        )  # fmt: skip

    def _unexplained(self, site: str) -> float:
        if site not in self._measured:
            return math.nan
        rows = self._measured[site]
        return float(rows.unexplained(rows.wanted).square().sum(1).mean())

    def _host_grad_rms(self, site: Site) -> float:
        """Root mean square gradient of the host's parameters at a site; NaN without any."""
        modules = dict.fromkeys((site.first, site.last))
        params = [p for n in modules for p in self.model.get_submodule(n).parameters(recurse=False)]
        grads = [p.grad.float() for p in params if p.grad is not None]
        size = sum(g.numel() for g in grads)
        # of a sharded one each process sums its part
        squares = sum(float(whole(g.square().sum())) for g in grads)
        return math.sqrt(squares / size) if size else math.nan

    def _gain(self, layer: KasminaLayer, seed: int, evaluate: Evaluate, held_out: Tensor) -> Tensor:
        """Held-out loss without the seed minus with it, and its standard error, `[2]`."""
        alpha = layer.alpha[seed].clone()
        layer.alpha[seed] = 0
        try:
            without = self._evaluate(evaluate)
        finally:
            layer.alpha[seed] = alpha
        assert without is not None
        saved = without - held_out
        spread = saved.std() / math.sqrt(len(saved)) if len(saved) > 1 else math.nan
        return torch.tensor([float(saved.mean()), float(spread)])

    def _evaluate(self, evaluate: Evaluate | None) -> Tensor | None:
        if evaluate is None:
            return None
        modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                losses = torch.as_tensor(evaluate(), dtype=torch.float64)
        finally:
            # each its own: a host may keep some of its modules in eval mode while it trains
            for module, mode in modes:
                module.training = mode
        return losses.detach().cpu().reshape(-1)

    def _grad_norm(self) -> float | None:
        grads = [p.grad for p in self.host_parameters() if p.grad is not None]
        if not grads:
            return None
        # the norm of norms is that of all; a sharded one is summed over the processes by itself
        norms = [whole(torch.linalg.vector_norm(g)) if is_distributed(g) else g for g in grads]
        return float(nn.utils.get_total_norm(norms))

    def _drift(self) -> float | None:
        """Relative change since the last report, on evenly spaced weights of each tensor."""
        now = [
            whole(p.detach()).reshape(-1)[:: max(1, p.numel() // DRIFT_SAMPLES)].clone()
            for p in self.host_parameters()
        ]
        before, self._drift_base = self._drift_base, now
        if before is None:
            return None
        # the model may have been moved to another device or dtype since
        before = [b.to(a) for a, b in zip(now, before, strict=True)]
        moved = sum(float((a - b).square().sum()) for a, b in zip(now, before, strict=True))
        size = sum(float(b.square().sum()) for b in before)
        return math.sqrt(moved / size) if size else None


def attach(
    model: nn.Module,
    sites: str,
    seeds_per_layer: int,
    *,
    geometry: Geometry = "chunk",
    hidden: int | None = None,
    channels: int | None = None,
    channel_axis: int | None = None,
    biased: bool | None = None,
    growth: GrowthConfig | None = None,
    seed: int | None = None,
) -> Lattice:
    """Give every matching site of a model a lattice of dormant seeds, in place.

    The model's output stays the same bit for bit until a seed is grafted, and its own
    `state_dict` keys stay as they are. Several calls on one model share one handle.

    Args:
        model: Any PyTorch model; its code is not touched.
        sites: Module path or glob, or a span `a->b` inside one module that runs both ends.
        seeds_per_layer: Seeds at each site; for chunk sites a divisor of the channels.
        geometry: 'chunk', or 'span' for units across a module or span.
        hidden: Hidden units of a chunk seed; None: the chunk's width, at least 2.
        channels: Channels of the site's output, where its type does not tell.
        channel_axis: Axis of the channels; None: known from the type, else the last.
        biased: Whether units of a span have a bias; None: as the span's first module.
        growth: Times, thresholds and limits; None leaves them as they are.
        seed: Seed of the lattice's random draws; None leaves it as it is (0 at first).

    Returns:
        The handle.

    Raises:
        ValueError: If nothing matches, a site has a lattice already, or sizes do not fit;
            the model is then unchanged.
    """
    if geometry not in get_args(Geometry):
        raise ValueError(f"geometry must be 'chunk' or 'span', but got '{geometry}'.")
    lattice = lattice_of(model) or Lattice(model)
    found = find_sites(model, sites, geometry)
    for name in {n for s in found for n in (growth or lattice.growth).scored_at(s.name)}:
        if not BLUEPRINTS[name].elementwise:
            raise ValueError(
                "scored_blueprint must have hidden units that are functions of one number, but got "
                f"'{name}'; use 'mlp_relu' or 'low_rank'."
            )
    layers = [
        _make_layer(
            model, site, lattice, seeds_per_layer, geometry, hidden, channels, channel_axis, biased
        )
        for site in found
    ]
    # everything fits: only now is the model touched
    for site, layer in zip(found, layers, strict=True):
        lattice.attached[site.name] = _hook(model, site, layer)
    lattice.growth = growth or lattice.growth
    lattice.seed = lattice.seed if seed is None else seed
    lattice.configure_layers()
    model.__dict__[_HANDLE] = lattice
    return lattice


def lattice_of(model: nn.Module) -> Lattice | None:
    """The lattice of a model, also of a deep copy; None if it has none."""
    handle = model.__dict__.get(_HANDLE)
    return handle if isinstance(handle, Lattice) else None


def biased_as_host(model: nn.Module, first: str, geometry: str) -> bool:
    """Whether units have a bias if nobody says so: those of a span are made as the host's own."""
    return geometry == "chunk" or getattr(model.get_submodule(first), "bias", True) is not None


def _awake(layer: KasminaLayer) -> Tensor:
    """Mask of the awake seeds, `[S]`."""
    stages = layer.state[:, STAGE]
    return torch.isin(stages, torch.tensor(sorted(AWAKE_STAGES), device=stages.device))


def _make_layer(
    model: nn.Module, site: Site, lattice: Lattice, num_seeds: int, geometry: Geometry,
    hidden: int | None, channels: int | None, channel_axis: int | None, biased: bool | None,
) -> KasminaLayer:  # fmt: skip
    if site.name in lattice.attached:
        raise ValueError(
            f"sites must have no lattice yet, but '{site.name}' has one; attach once a site."
        )
    last = model.get_submodule(site.last)
    if _owner(last) is None or type(last).forward is nn.Module.forward:
        raise ValueError(
            f"sites must be modules that compute something, but '{site.last}' is "
            f"{'an empty' if _owner(last) is None else 'a'} {type(last).__name__}; "
            "name the modules inside it or around it."
        )
    known = output_channels(last)
    if channels is None and known is None:
        raise ValueError(
            f"channels must be given for '{site.last}', since a {type(last).__name__} does not "
            "tell its width; pass `channels` (and `channel_axis` if it is not the last)."
        )
    width, axis = known or (0, -1)
    inputs = input_features(model.get_submodule(site.first)) if geometry == "span" else None
    if geometry == "span" and inputs is None:
        kind = type(model.get_submodule(site.first)).__name__
        raise ValueError(
            f"sites must be spans that begin at a Linear, Conv or norm module, "
            f"but '{site.first}' is a {kind}; begin the span one module later or earlier."
        )
    if biased is not None and geometry == "chunk":
        raise ValueError(
            f"biased must be left out for a chunk site, whose units have one, but got {biased}."
        )
    tensor = next(last.parameters(), next(model.parameters(), torch.zeros(())))
    layer = KasminaLayer(
        channels or width, num_seeds, geometry=geometry, hidden=hidden, in_features=inputs,
        channel_axis=axis if channel_axis is None else channel_axis,
        biased=biased_as_host(model, site.first, geometry) if biased is None else biased,
        dtype=tensor.dtype, device=tensor.device,
    )  # fmt: skip
    return layer.train(last.training)


def _owner(module: nn.Module) -> nn.Module | None:
    """Where the layer is registered: a container would run it, or index it, as its own child."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next((m for m in module.modules() if not isinstance(m, containers)), None)


def _hook(model: nn.Module, site: Site, layer: KasminaLayer) -> Attached:
    last, first = model.get_submodule(site.last), model.get_submodule(site.first)
    owner = _owner(last)
    assert owner is not None
    taken = sum(name.startswith("kasmina") for name, _ in owner.named_children())
    owner.add_module(f"kasmina_{taken}" if taken else "kasmina", layer)
    hooks = [last.register_forward_hook(layer.graft_output)]
    if layer.geometry == "span":
        hooks.append(first.register_forward_pre_hook(layer.capture_source))
    return Attached(site, layer, tuple(hooks))
