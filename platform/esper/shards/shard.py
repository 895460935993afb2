"""The shard: one device with the model, its lattice and its trainer. It knows nothing of Ray.

It decides nothing: a trial, its driver, hands every report to the controller and the controller's
actions to `apply`. Whether the shard lives in the trial's process (`KasminaShard`) or in actors
(`esper.shards.group.ShardGroup`) makes no difference to the driver.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from esper.config.base import ConfigError
from esper.config.run import Execution, RunConfig, build_options
from esper.controller.base import GrowthEvent
from esper.environment import device_name, versions
from esper.seeds.actions import Action, Rollback
from esper.seeds.lifecycle import Transition
from esper.seeds.report import Report
from esper.seeds.state import Stage
from esper.surgery import files
from esper.surgery.attach import attach
from esper.surgery.checkpoint_folder import (
    copies,
    read_checkpoint,
    write_checkpoint,
    write_copies,
)
from esper.surgery.lattice import Lattice
from esper.training import checkpoint
from esper.training.hosts import HOSTS
from esper.training.metrics import Trained, compute
from esper.training.snapshot import Place
from esper.training.tasks import TASKS, TaskData
from esper.training.trainer import Cost, Trainer


@dataclass(frozen=True)
class ShardSpec:
    """What a shard is made of; travels to the process that builds it.

    Attributes:
        config: The run.
        seed: Seed of the host's weights, the data and its order.
        planted: Seeds that are in place from the start.
    """

    config: RunConfig
    seed: int
    planted: tuple[GrowthEvent, ...] = ()


@dataclass(frozen=True)
class Health:
    """Where a shard stands between two intervals.

    Attributes:
        step: Optimizer steps done.
        interval: Intervals done.
        parameters: Parameters of the host and of all awake seeds.
        host_parameters: Of the host alone.
        active_seeds: Seeds that are awake.
        stages: How many seeds are in each stage, by name; dormant ones are left out.
        seeds: Seeds of each site.
        shards: How many train the model.
        cost: What training has cost so far.
    """

    step: int
    interval: int
    parameters: int
    host_parameters: int
    active_seeds: int
    stages: Mapping[str, int]
    seeds: Mapping[str, int]
    shards: int
    cost: Cost = field(compare=False)


class Shard(Protocol):
    """What a trial's driver asks of its shard; `KasminaShard` says what each method does."""

    def run_interval(
        self,
        steps: int | None = None,
        *,
        measures: bool = True,
        execution: Execution | None = None,
    ) -> Report:
        """Train for some steps and report."""
        ...

    def apply(self, actions: Sequence[Action], note: Any = None) -> list[Transition]:
        """Apply actions at the end of an interval."""
        ...

    def suspects(self) -> list[Place]:
        """Seeds that a rollback may free the run of."""
        ...

    def diverged(self) -> list[Place]:
        """Seeds whose own weights are no numbers."""
        ...

    def roll_back(self, rollbacks: Sequence[Rollback]) -> Any:
        """Go back to before some seeds were grafted."""
        ...

    def evaluate(self, *splits: str) -> dict[str, float]:
        """Metrics of some splits."""
        ...

    def own_metrics(self, names: Sequence[str], seed: int) -> dict[str, float]:
        """Metrics of the user's own."""
        ...

    def health(self) -> Health:
        """Where the shard stands."""
        ...

    def log(self) -> list[Transition]:
        """Every transition so far."""
        ...

    def checkpoint(self, folder: str | Path, content: Mapping[str, Any], wait: bool = True) -> None:
        """Write everything that `restore` needs."""
        ...

    def settle(self) -> None:
        """Wait until the last checkpoint is written."""
        ...

    def restore(self, folder: str | Path, execution: Execution | None = None) -> None:
        """Go on from a checkpoint."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the model with its lattice."""
        ...

    def where(self) -> tuple[str, dict[str, str]]:
        """Name of the device that it computes on, and the versions of the libraries there."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


# makes the shard of a trial
Shards = Callable[[ShardSpec], Shard]


class KasminaShard:
    """A shard in this process.

    Args:
        spec: What it is made of.
        make_trainer: Called as `Trainer` is.

    Attributes:
        trainer: What trains; whoever shares the process may look at it.

    Raises:
        ConfigError: If a plug-in is unknown, its options are wrong, or the device is missing.
        ValueError: If parts do not fit one another.
    """

    def __init__(self, spec: ShardSpec, make_trainer: Callable[..., Trainer] = Trainer) -> None:
        config = spec.config
        for module in config.plugins:
            import_plugin(module)
        require_device(config.device)
        # every arm of a pair draws the same host and the same data
        torch.manual_seed(spec.seed)
        task = build_options(TASKS, config.task, "task")
        host = build_options(HOSTS, config.host, "host")
        data = task.load(spec.seed)
        model = host.build(data).to(config.device)
        lattice = self._attach(model, data, spec)
        for event in spec.planted:
            lattice.plant(event.site, event.seed, event.blueprint)
        self.trainer = make_trainer(
            data, model, lattice, config.train, seed=spec.seed, device=config.device
        )
        self.trainer.execute(config.execution)
        self._device = config.device
        # whether files are written here, and not by another shard of the same model
        self._writes = True
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def _attach(self, model: torch.nn.Module, data: TaskData, spec: ShardSpec) -> Lattice:
        """Give the host its lattice; `data` is for those that look how the host computes."""
        lattice = Lattice(model, spec.seed)
        lattice.growth = spec.config.growth
        for site in spec.config.lattice:
            options = site.model_dump()
            pattern = options.pop("sites")
            lattice = attach(model, pattern, **options, growth=spec.config.growth, seed=spec.seed)
        return lattice

    def run_interval(
        self,
        steps: int | None = None,
        *,
        measures: bool = True,
        execution: Execution | None = None,
    ) -> Report:
        """Train for some steps and report.

        Args:
            steps: Optimizer steps; None: the configured interval.
            measures: Whether places for new seeds are measured, if the configuration says how.
            execution: How the seeds are computed from now on; None: as before.

        Raises:
            CollapseError: If the loss is not finite.
        """
        if execution is not None:
            self.trainer.execute(execution)
        self.trainer.measures = measures
        return self.trainer.run_interval(steps)

    def apply(self, actions: Sequence[Action], note: Any = None) -> list[Transition]:
        """Apply a controller's actions; see `Trainer.apply`."""
        return self.trainer.apply(actions, note)

    def suspects(self) -> list[Place]:
        """Seeds that a rollback may free the run of; see `Trainer.suspects`."""
        return self.trainer.suspects()

    def diverged(self) -> list[Place]:
        """Seeds whose own weights are no numbers; see `Trainer.diverged`."""
        return self.trainer.diverged()

    def roll_back(self, rollbacks: Sequence[Rollback]) -> Any:
        """Go back to before some seeds were grafted; see `Trainer.roll_back`."""
        return self.trainer.roll_back(rollbacks)

    def evaluate(self, *splits: str) -> dict[str, float]:
        """Metrics of some splits; see `Trainer.evaluate`."""
        return {k: v for split in splits for k, v in self.trainer.evaluate(split).items()}

    def own_metrics(self, names: Sequence[str], seed: int) -> dict[str, float]:
        """Metrics of the user's own; see `esper.training.metrics.compute`."""
        trained = Trained(self.trainer.model, self.trainer.data, self._device)
        return compute(names, trained, seed)

    def health(self) -> Health:
        """Where the shard stands."""
        trainer, lattice = self.trainer, self.trainer.lattice
        layers = {name: a.layer for name, a in lattice.attached.items()}
        stages: Counter[Stage] = Counter()
        for layer in layers.values():
            stages.update(layer.states().stages())
        return Health(
            step=trainer.step,
            interval=lattice.interval,
            parameters=lattice.count_parameters(),
            host_parameters=sum(p.numel() for p in lattice.host_parameters()),
            active_seeds=lattice.count_awake(),
            stages={s.name: n for s, n in stages.items() if s is not Stage.DORMANT},
            seeds={name: layer.num_seeds for name, layer in layers.items()},
            shards=1,
            cost=dataclasses.replace(trainer.cost),
        )

    def digest(self) -> dict[str, str]:
        """What tells replicas apart that should be equal, cheaply: a short text for each tensor.

        Buffers, such as stages and alphas, and random generators by their hash; parameters by the
        sum of their bits, which is computed where they are.
        """
        trainer = self.trainer
        found = {n: _hash(b) for n, b in trainer.model.named_buffers()}
        found |= {n: str(_sum_of_bits(p)) for n, p in trainer.model.named_parameters()}
        return found | {f"random {i}": _hash(t) for i, t in enumerate(trainer.random_state())}

    def log(self) -> list[Transition]:
        """Every transition so far."""
        return list(self.trainer.lattice.log)

    def checkpoint(self, folder: str | Path, content: Mapping[str, Any], wait: bool = True) -> None:
        """Write everything that `restore` needs; a former checkpoint is replaced.

        One is written after the other.

        Args:
            folder: Where: a folder, or a URI (`s3://bucket/name`).
            content: What else is to be kept with it, as JSON; must not change until it is written.
            wait: Until it is written; otherwise only until the tensors are copied, and what goes
                wrong after that is raised by the next call of this method or of `settle`.

        Raises:
            CheckpointError: If the folder holds something else.
            CheckpointNotWrittenError: If the disk is full or fails.
        """
        # first, since others may take part
        tensors, own = checkpoint.pack(self.trainer)
        self.settle()
        if not self._writes:
            return
        taken, whole = copies(tensors), {**own, **content}
        self._writing = self._writer.submit(write_copies, folder, taken, whole)
        if wait:
            self.settle()

    def settle(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            CheckpointError: As `checkpoint` says; once.
            CheckpointNotWrittenError: Likewise.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(self, folder: str | Path, execution: Execution | None = None) -> None:
        """Go on, bit for bit on the same device, from where a checkpoint was written.

        Args:
            folder: The checkpoint.
            execution: How the seeds were computed then, if not as the configuration says: the
                costs that are restored are those of this way.

        Raises:
            CheckpointError: If it is damaged, or of another model, optimizer or data.
        """
        self.settle()
        if execution is not None:
            self.trainer.execute(execution)
        checkpoint.unpack(folder, *read_checkpoint(folder), self.trainer)

    def save(self, folder: str | Path) -> None:
        """Write the model with its lattice and optimizer, for `esper.load`."""
        trainer = self.trainer
        packed = files.pack(trainer.model, trainer.lattice, trainer.optimizer)
        if self._writes:
            write_checkpoint(Path(folder), *packed)

    def where(self) -> tuple[str, dict[str, str]]:
        """Name of the device that it computes on, and the versions of the libraries there."""
        return device_name(self._device), versions()

    def close(self) -> None:
        """End the thread that writes checkpoints, when it has written."""
        self._writer.shutdown()


def require_device(device: str) -> None:
    """Refuse a device that this process has not.

    Raises:
        ConfigError: With what torch says.
    """
    try:
        torch.empty(0, device=device)
    # torch without CUDA asserts
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", (
            f"device must be usable on this machine, but '{device}' is not: {error}.",
        )) from error  # fmt: skip


def import_plugin(module: str) -> None:
    """Import a module that registers plug-ins.

    Raises:
        ConfigError: If it cannot be imported.
    """
    try:
        import_module(module)
    except ImportError as error:
        raise ConfigError("plugins", (
            f"plugins must be importable modules, but '{module}' is not: {error}; "
            "install it or set PYTHONPATH.",
        )) from error  # fmt: skip


def _hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def _sum_of_bits(tensor: Tensor) -> int:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().view(kinds[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))
