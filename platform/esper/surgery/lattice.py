"""The lattice: one handle on all seeds of a model; `esper.surgery.attach` makes it."""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.config.run import GrowthConfig
from esper.seeds.actions import Action, Germinate
from esper.seeds.blueprints import BLUEPRINTS, Blueprint, blueprint_id
from esper.seeds.diagnosis import grad_rms as seeds_grad_rms
from esper.seeds.diagnosis import silent_frac
from esper.seeds.grafting import GRAFTS, GraftSignals
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.lifecycle import Transition, advance
from esper.seeds.matching import copied_unit
from esper.seeds.report import Report, SiteReport
from esper.seeds.state import BLUEPRINT, EPOCHS, STAGE, SeedState, Stage
from esper.surgery.host_signs import Drift, grad_norm, grad_rms
from esper.surgery.measure import Loss, measure_rows
from esper.surgery.modes import evaluating
from esper.surgery.new_seeds import Prospects, Unit
from esper.surgery.sites import Site

# held-out losses: one number a sample (its standard error is then known), or their mean
Evaluate = Callable[[], Tensor | float]
# the attribute of a model that holds its lattice
HANDLE = "_esper_lattice"


@dataclass(frozen=True)
class Attached:
    """One site with its layer, and the hooks that run it.

    Attributes:
        site: The place.
        layer: All seeds there.
        hooks: Kept because a copy or a pickle keeps the hooks apart from later ones only with
            their handles.
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
        attached: Every site with its layer, by name.
        signals: What the paces of grafts are decided on, as of the last report.
        grad_norms: Norms of the host's gradient at the ends of the last intervals, oldest first.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model = model
        self.growth = GrowthConfig()
        self.seed = seed
        self.interval = 0
        self.log: list[Transition] = []
        self.attached: dict[str, Attached] = {}
        self.signals = GraftSignals()
        self.grad_norms: list[float] = []
        self._drift = Drift()
        # what the last report measured; new seeds are matched to it
        self._prospects = Prospects()

    def layer(self, site: str) -> KasminaLayer:
        """The layer of a site.

        Raises:
            ValueError: If the lattice has no such site.
        """
        if site not in self.attached:
            raise ValueError(f"site must be one of {', '.join(self.attached)}, but got '{site}'.")
        return self.attached[site].layer

    def layers(self) -> list[KasminaLayer]:
        """The layers of all sites."""
        return [a.layer for a in self.attached.values()]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The pools of all sites; give them to your own optimizer, once, for the whole run."""
        for layer in self.layers():
            yield from layer.pool()

    def host_parameters(self) -> Iterator[nn.Parameter]:
        """The host's own parameters, without the lattice's."""
        ours = {id(p) for p in self.parameters()}
        return (p for p in self.model.parameters() if id(p) not in ours)

    def count_parameters(self) -> int:
        """Parameters of the host and of every awake seed, by its blueprint."""
        blueprints = BLUEPRINTS.values()
        return sum(p.numel() for p in self.host_parameters()) + sum(
            number * layer.seed_parameters(blueprints[kind])
            for layer in self.layers()
            for kind, number in Counter(layer.state[layer.awake(), BLUEPRINT].tolist()).items()
        )

    def count_awake(self) -> int:
        """Seeds that are awake, over all sites."""
        return sum(int(layer.awake().sum()) for layer in self.layers())

    @property
    def steps(self) -> int:
        """Optimizer steps that moved the lattice."""
        return max((layer.steps for layer in self.layers()), default=0)

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
        self._prospects = Prospects(
            None if measure is None else measure_rows(self.model, self.attached, measure)
        )
        self.interval += 1
        for layer in self.layers():
            layer.state[:, EPOCHS] += layer.state[:, STAGE] != Stage.DORMANT
        room = self._room(affordable_parameters)
        sites = tuple(
            self._site_report(name, a.layer, evaluate, held_out, scored=room)
            for name, a in self.attached.items()
        )
        norm = grad_norm(self.host_parameters())
        if norm is not None:
            self.grad_norms = [*self.grad_norms[-30:], norm]
        self.signals = GraftSignals(
            loss=loss,
            previous_loss=self.signals.loss,
            host_drift_frac=self._drift.measure(self.host_parameters()),
            grad_norm=norm,
            median_grad_norm=median(self.grad_norms) if self.grad_norms else None,
        )
        for layer in self.layers():
            layer.reset_telemetry()
        return Report(
            interval=self.interval,
            step=self.steps,
            loss=loss,
            held_out_loss=None if held_out is None else float(held_out.mean()),
            grad_norm=norm,
            host_drift_frac=self.signals.host_drift_frac,
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
        for layer in self.layers():
            if layer.ramping.any():
                layer.set_paces(self.signals, self.growth)
        self.log += transitions
        return transitions

    def check(self, actions: Sequence[Action]) -> list[Transition]:
        """The transitions that `apply` would make; raises what it would raise."""
        states = {name: a.layer.states() for name, a in self.attached.items()}
        transitions = []
        # read from the device once, not once an action
        steps = self.steps
        for action in actions:
            layer = self._layer_with(action.site, action.seed)
            before = states[action.site][action.seed]
            after = advance(before, action)
            if isinstance(action, Germinate):
                BLUEPRINTS[action.blueprint].require(layer.geometry, layer.hidden)
                self._require_measured(action)
            states[action.site][action.seed] = after
            transitions.append(Transition(self.interval, steps, action, before, after))
        grafts = GRAFTS.values()
        for table in states.values():
            for kind in {table[seed].graft_id for seed in table.seeds_in({Stage.GRAFTING})}:
                grafts[kind].pace(self.signals, self.growth)
        return transitions

    def plant(self, site: str, seed: int, blueprint: str) -> None:
        """Put a finished seed in place before training, with ordinary random weights.

        For topologies that are trained from scratch, such as the static-final arm of an
        experiment; a growing network germinates its seeds instead.

        Raises:
            ValueError: If the slot is not dormant or the blueprint does not fit.
        """
        layer = self._layer_with(site, seed)
        states = layer.states()
        if states[seed].stage is not Stage.DORMANT:
            raise ValueError(
                f"seed {seed} of '{site}' must be DORMANT to be planted, "
                f"but is {states[seed].stage.name}."
            )
        BLUEPRINTS[blueprint].require(layer.geometry, layer.hidden)
        states[seed] = SeedState(Stage.FINE_TUNING, blueprint_id(blueprint))
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
        ours = {id(layer) for layer in self.layers()}
        for module in list(self.model.modules()):
            for name in [n for n, child in module.named_children() if id(child) in ours]:
                delattr(module, name)
        self.attached.clear()
        if HANDLE in self.model.__dict__:
            delattr(self.model, HANDLE)
        return self.model

    def restart_drift(self) -> None:
        """Measure the host's drift from its present weights on, after they were replaced."""
        self._drift.forget()
        # it is measured from report to report, so before the first there is none
        if self.interval:
            self._drift.measure(self.host_parameters())

    def configure_layers(self) -> None:
        """Tell every layer what the settings mean for it."""
        for layer in self.layers():
            layer.ramp_steps = self.growth.ramp_steps
            layer.young_rate, layer.young_steps = self.growth.young_rate, self.growth.young_steps
            layer.objective = self.growth.objective

    def _layer_with(self, site: str, seed: int) -> KasminaLayer:
        """The layer of a site that has such a seed."""
        layer = self.layer(site)
        if not 0 <= seed < layer.num_seeds:
            raise ValueError(
                f"seed of site '{site}' must be in 0..{layer.num_seeds - 1}, but got {seed}."
            )
        return layer

    def _enter(
        self,
        transitions: Sequence[Transition],
        matched: Mapping[tuple[str, int], Unit],
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
            layer.on_enter(seeds, stage, self.signals.loss)
            if stage is Stage.GERMINATED:
                units = {seed: matched[site, seed] for seed in seeds if (site, seed) in matched}
                layer.initialise({s: self._generator(site, s) for s in seeds}, units=units)

    def _require_measured(self, action: Germinate) -> None:
        wanted = self.growth.initialisation not in ("random", "net2net")
        if (
            wanted
            and BLUEPRINTS[action.blueprint].elementwise
            and action.site not in self._prospects
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

    def _match_waves(self, transitions: Sequence[Transition]) -> dict[tuple[str, int], Unit]:
        """Units for the new seeds that are not drawn, by site and seed; a whole wave at once."""
        blueprints = BLUEPRINTS.values()
        waves: dict[tuple[str, int], list[int]] = {}
        for t in transitions:
            kind = t.after.blueprint_id
            new = t.after.stage is Stage.GERMINATED and self.growth.initialisation != "random"
            # units of blueprints that mix them cannot be told apart, and are drawn
            if new and blueprints[kind].elementwise:
                waves.setdefault((t.action.site, kind), []).append(t.action.seed)
        return {
            (site, seed): unit
            for (site, kind), seeds in waves.items()
            for seed, unit in self._match(site, seeds, blueprints[kind])
        }

    def _match(
        self, site: str, seeds: list[int], blueprint: Blueprint
    ) -> Iterator[tuple[int, Unit]]:
        """Each seed with the incoming weights and biases of its units."""
        how, draw = self.growth.initialisation, partial(self._generator, site)
        if how == "net2net":
            if host := self._host_units(site):
                yield from ((seed, copied_unit(host, draw(seed))) for seed in seeds)
        elif how != "random":
            yield from self._prospects.units(site, self.layer(site), seeds, blueprint, how, draw)

    def _room(self, affordable_parameters: int | None) -> bool:
        """Whether the limits leave room for a seed; places are not scored for nothing."""
        growth = self.growth
        if growth.max_active_seeds is not None and self.count_awake() >= growth.max_active_seeds:
            return False
        limits = [n for n in (growth.max_parameters, affordable_parameters) if n is not None]
        if not limits:
            return True
        costs = [
            layer.seed_parameters(blueprint)
            for layer in self.layers()
            for blueprint in layer.fitting()
            if blueprint.phi
        ]
        left = min(limits) - self.count_parameters()
        return any(cost <= left for cost in costs)

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
        costs = {b.name: layer.seed_parameters(b) for b in layer.fitting()}
        dormant = [int(s) for s in (ints["stage"] == Stage.DORMANT).nonzero()[0]] if scored else []
        bottleneck, scored_blueprint = self._prospects.bottleneck(
            name, layer, dormant, [BLUEPRINTS[n] for n in self.growth.scored_at(name)],
            partial(self._generator, name, -1),
        )  # fmt: skip
        silent = silent_frac(layer, self._prospects.source(name))
        ratio = seeds_grad_rms(layer) / grad_rms(self._host_parameters_at(name))
        return SiteReport(
            name=name, geometry=layer.geometry, **ints, **columns, bottleneck=bottleneck.numpy(),
            silent_frac=silent.numpy(), grad_ratio=ratio.numpy(), gain=gain[0].numpy(),
            gain_se=gain[1].numpy(), seed_parameters=costs,
            unexplained=self._prospects.unexplained(name), scored_blueprint=scored_blueprint,
        )  # fmt: skip

    def _host_parameters_at(self, name: str) -> Iterator[nn.Parameter]:
        """The host's own parameters at the ends of a site."""
        site = self.attached[name].site
        for path in dict.fromkeys((site.first, site.last)):
            yield from self.model.get_submodule(path).parameters(recurse=False)

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
        with evaluating(self.model), torch.no_grad():
            losses = torch.as_tensor(evaluate(), dtype=torch.float64)
        return losses.detach().cpu().reshape(-1)


def lattice_of(model: nn.Module) -> Lattice | None:
    """The lattice of a model, also of a deep copy; None if it has none."""
    handle = model.__dict__.get(HANDLE)
    return handle if isinstance(handle, Lattice) else None
