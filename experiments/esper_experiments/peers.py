"""Peers: other packages that grow networks, run on the same data, batches, steps and budget.

A peer brings its own network and its own way to grow it; the rest of the trial is ours. An arm is
run by one through the name of its controller.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper.config.base import ConfigError
from esper.config.run import RunConfig
from esper.controller.base import CONTROLLERS, Controller, ControllerOptions, GrowthEvent
from esper.controller.static import StaticController
from esper.earlier_trials import kept_events
from esper.evidence.records import TrialRecord
from esper.seeds.report import Report
from esper.shards.shard import KasminaShard
from esper.surgery.lattice import Lattice
from esper.training.hosts import Mlp
from esper.training.trainer import CollapseError, Trainer
from esper.trial import Trial, TrialSpec

# 0 is not among them: new units with zero weights on both sides of a ReLU never learn
SCALES = (0.03, 0.1, 0.3, 1.0, 3.0)


@CONTROLLERS.register("gromo")
class GromoOptions(ControllerOptions):
    """`gromo` grows what the followed arm grew: TINY as its authors implement it. No options.

    Source: Verbockhaven et al., "Growing Tiny Networks", TMLR 2024; package `gromo`.
    """

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """The network has no seeds, so there is nothing to control."""
        return StaticController()


def trial_of(config: RunConfig) -> type[Trial]:
    """What runs an arm: a peer if the arm's controller names one, else Esper."""
    return GromoTrial if config.controller.name == "gromo" else Trial


class GromoTrial(Trial):
    """A trial whose network is a `GrowingMLP` that `gromo` widens.

    It starts from the weights that the host of the other arms of its pair starts from, and grows
    as many units in the same layers at the same times as the arm that it follows kept, within the
    same parameter budget. Its units are connected to all of their neighbours, while a span's do
    not read the new ones below them, so that they can be fewer.

    The statistics are gathered over the whole training set, TINY's neurons computed, and their
    scale found by a line search on the training loss. There are at most as many neurons as the
    statistics' rank; what is missing is asked for again at the end of the next interval. Like in
    the package's examples the optimizer then starts anew, since its parameters are other ones.
    What growing takes is counted: forward and backward passes and the matrix products of the
    statistics; not the decompositions, which torch does not count.

    Args:
        config: The arm's configuration; host `mlp` with layers of one width, no lattice.
        spec: Which trial it is.
        followed: Record of the arm whose growth it repeats; None only to check the configuration.

    Raises:
        ConfigError: If the host is another one, there is a lattice, or no arm is followed.
    """

    def __init__(
        self, config: RunConfig, spec: TrialSpec, followed: TrialRecord | None = None
    ) -> None:
        super().__init__(config, spec, followed)
        host = Mlp.model_validate(config.host.options) if config.host.name == "mlp" else None
        if host is None or len(set(host.hidden)) > 1 or config.lattice or config.follow is None:
            raise ConfigError("controller", (
                "controller 'gromo' must have a host 'mlp' with hidden layers of one width, no "
                f"lattice, and an arm to follow, but got '{config.host.name}' "
                f"{config.host.options}, {len(config.lattice)} lattice entries and follow "
                f"{config.follow}; change the arm.",
            ))  # fmt: skip
        names = [n for n, m in self.trainer.model.named_modules() if isinstance(m, nn.Linear)]
        # units by interval and hidden layer, and those that are still missing
        self._wanted: dict[int, Counter[int]] = {}
        self._missing: Counter[int] = Counter()
        for event in () if followed is None else kept_events(followed):
            source, _, target = event.site.partition("->")
            if source not in names or not target:
                raise ConfigError("controller", (
                    "controller 'gromo' must follow an arm that widens hidden layers, but "
                    f"'{config.follow}' grew at '{event.site}'; follow another one.",
                ))  # fmt: skip
            layer = names.index(source)
            self._wanted.setdefault(event.interval, Counter())[layer] += 1
        model = growing_mlp(self.trainer.model, host).to(config.device)
        assert isinstance(self.shard, KasminaShard)
        self.shard.trainer = self._trainer(model)

    def _train_losses(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Losses `[N]` of the whole training set."""
        data, device = self.trainer.data, self.config.device
        x, y = (tensor.to(device) for tensor in data.train)
        return data.losses(forward(x), y)

    def _trainer(self, model: nn.Module) -> Trainer:
        lattice = Lattice(model, self._seed)
        lattice.growth = self.config.growth
        return Trainer(
            self.trainer.data, model, lattice, self.config.train,
            seed=self._seed, device=self.config.device,
        )  # fmt: skip

    def _affordable(self, layer: int) -> int:
        """Units that the parameter budget has room for in a hidden layer."""
        budget = self.config.growth.max_parameters
        if budget is None:
            return sys.maxsize
        layers: Any = self.trainer.model.layers
        before, after = layers[layer].layer, layers[layer + 1].layer
        each = before.in_features + (before.bias is not None) + after.out_features
        return max(0, budget - self.trainer.lattice.count_parameters()) // int(each)

    def _grow(self, report: Report) -> None:
        # adding drops what is no longer missing
        self._missing += self._wanted.get(report.interval, Counter())
        if not self._missing:
            return
        trainer, cost = self.trainer, self.trainer.cost
        started, before = time.perf_counter(), trainer.lattice.count_parameters()
        try:
            with FlopCounterMode(display=False) as counter:
                for layer, units in sorted(self._missing.items()):
                    wanted = min(units, self._affordable(layer))
                    # what the budget does not allow now, it never will
                    self._missing[layer] = wanted
                    if wanted:
                        found = widen(trainer.model, layer, wanted, self._train_losses)
                        self._missing[layer] -= found
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            self._collapse = CollapseError(trainer.step, f"gromo: {error}")
            return
        if trainer.lattice.count_parameters() > before:
            trainer.optimizer = self._trainer(trainer.model).optimizer
            trainer.lattice.restart_drift()
            cost.flops_per_step = None
        cost.growth_flops += float(counter.get_total_flops())
        cost.growth_seconds += time.perf_counter() - started


def growing_mlp(host: nn.Module, options: Mlp) -> nn.Module:
    """A `GrowingMLP` with the host's layers and weights.

    Raises:
        ConfigError: If the package is not installed.
    """
    try:
        package = import_module("gromo.containers.growing_mlp")
    except ImportError as error:
        raise ConfigError("controller", (
            f"controller 'gromo' must have its package, but {error}; `pip install gromo`.",
        )) from None  # fmt: skip
    linear = [m for m in host.modules() if isinstance(m, nn.Linear)]
    activation = next(m for n, m in host.named_children() if n.startswith("act"))
    model: Any = package.GrowingMLP(
        linear[0].in_features, linear[-1].out_features, linear[0].out_features, len(linear) - 1,
        activation=activation, use_bias=options.bias, device=torch.device("cpu"),
    )  # fmt: skip
    for source, target in zip(linear, model.layers, strict=True):
        target.layer.load_state_dict(source.state_dict())
    assert isinstance(model, nn.Module)
    return model


def widen(
    model: Any, layer: int, units: int, losses: Callable[[Callable[[Tensor], Tensor]], Tensor]
) -> int:
    """Add TINY's neurons to one hidden layer.

    Args:
        model: A `GrowingMLP`.
        layer: Index of the hidden layer.
        units: Most neurons to add.
        losses: From a forward function to the losses `[N]` of the training set.

    Returns:
        The number of neurons added: at most the rank of the statistics.
    """
    before: int = model.layers[layer].out_features
    model.eval()
    model.set_growing_layers(index=layer)
    model.init_computation()
    model.zero_grad()
    # gromo takes the mean itself
    losses(model).sum().backward()
    model.update_computation()
    model.compute_optimal_updates(maximum_added_neurons=units, compute_delta=False)
    model.reset_computation()
    model.dummy_select_update()
    found = []
    with torch.no_grad():
        for scale in SCALES:
            model.set_scaling_factor(scale)
            found.append((float(losses(model.extended_forward).mean()), scale))
    model.set_scaling_factor(min(found)[1])
    model.apply_change()
    after: int = model.layers[layer].out_features
    return after - before
