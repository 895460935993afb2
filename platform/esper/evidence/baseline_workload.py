"""What a baseline times: the same layers and seeds in the legacy and in the parallel form.

Both get the same weights from one generator, so that they compute the same: T rows of width D pass
L linear layers, each followed by S seeds on chunks of C = D / S channels with H hidden units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.config.baseline import BaselineConfig, Implementation, Workload
from esper.seeds import legacy
from esper.seeds.blueprints import blueprint_id
from esper.seeds.optimizer import SeedOptimizer
from esper.seeds.state import SeedState, Stage
from esper.surgery.attach import attach
from esper.surgery.lattice import Lattice
from esper_kernels.timing import num_sets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEARNING_RATE = 1e-4
# input sets that a CPU rotates over; a GPU needs as many as its L2 cache is large
CPU_SETS = 8


@dataclass
class Built:
    """One implementation, ready to run.

    Attributes:
        model: From `[batch, positions, width]` to the same shape.
        optimizers: Move everything in it.
        lattice: The parallel form's handle; the legacy form has none.
        seeds: Of each layer, counted on the built model.
        active: Of each layer, likewise.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    lattice: Lattice | None
    seeds: int
    active: int

    def step(self, x: Tensor) -> None:
        """One training step on a loss that needs no targets."""
        self.model(x).float().square().mean().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def build(config: BaselineConfig, implementation: Implementation) -> Built:
    """The workload in one of its forms, with the seed's weights of the configuration."""
    builders: dict[Implementation, Callable[[Workload, int, torch.device], Built]] = {
        "legacy": _legacy, "kasmina": _kasmina,
    }  # fmt: skip
    return builders[implementation](config.workload, config.seed, torch.device(config.device))


def inputs(config: BaselineConfig, batch: int) -> list[Tensor]:
    """Random inputs to rotate over; on a GPU together larger than three times its L2 cache."""
    w, device = config.workload, torch.device(config.device)
    generator = torch.Generator(device).manual_seed(config.seed + batch)
    shape = (batch, w.positions, w.width)
    dtype = DTYPES[w.dtype]
    one = batch * w.positions * w.width * dtype.itemsize
    number = num_sets(one) if device.type == "cuda" else CPU_SETS
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(number)]


def host(workload: Workload, seed: int) -> nn.Sequential:
    """The linear layers alone, on the CPU in fp32."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(workload.width, workload.width) for _ in range(workload.layers))
    )


def seed_weights(
    workload: Workload, layer: int, seed: int, hidden: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of all seeds of a layer: `[S, C, H]`, `[S, H]`, `[S, H, C]`, on the CPU."""
    s = workload.seeds_per_layer
    c = workload.width // s
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + layer)
    return (
        torch.randn(s, c, hidden, generator=generator) * c**-0.5,
        torch.randn(s, hidden, generator=generator) * 0.1,
        torch.randn(s, hidden, c, generator=generator) * 0.5 * hidden**-0.5,
    )


@torch.no_grad()
def wake(lattice: Lattice, workload: Workload, seed: int) -> None:
    """Give the first `active_seeds` of every layer their weights, and alpha 1."""
    active = workload.active_seeds
    awake = SeedState(Stage.FINE_TUNING, blueprint_id(workload.blueprint))
    for i, attached in enumerate(lattice.attached.values()):
        layer = attached.layer
        layer.write_states([awake] * active + [SeedState()] * (layer.num_seeds - active))
        weights = seed_weights(workload, i, seed, layer.hidden)
        for mine, drawn in zip(layer.pool(), weights, strict=True):
            mine[:active] = drawn[:active].to(mine)
        layer.alpha[:active] = 1.0
        layer.progress[:active] = 1.0


def _kasmina(workload: Workload, seed: int, device: torch.device) -> Built:
    model = host(workload, seed).to(device, DTYPES[workload.dtype])
    lattice = attach(model, "*", workload.seeds_per_layer)
    wake(lattice, workload, seed)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(lattice.host_parameters(), lr=LEARNING_RATE, fused=True),
        SeedOptimizer(lattice, lr=LEARNING_RATE),
    ]
    layers = [a.layer for a in lattice.attached.values()]
    active = {int((layer.alpha != 0).sum()) for layer in layers}
    return Built(model, optimizers, lattice, min(x.num_seeds for x in layers), min(active))


@torch.no_grad()
def _legacy(workload: Workload, seed: int, device: torch.device) -> Built:
    layers = []
    for i, linear in enumerate(host(workload, seed)):
        layer = legacy.SequentialLayer(workload.width, workload.width, workload.seeds_per_layer)
        layer.default_transform.load_state_dict(linear.state_dict())
        parameters = [list(one.parameters()) for one in layer.seeds]
        weights = seed_weights(workload, i, seed, parameters[0][1].shape[0])
        for k in range(workload.active_seeds):
            layer.load_kernel(k, workload.blueprint)
            # incoming weights, biases, outgoing weights
            for mine, drawn in zip(parameters[k], weights, strict=True):
                mine.copy_(drawn[k])
            layer.set_seed_alpha(k, 1.0)
        layers.append(layer.to(device, DTYPES[workload.dtype]))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    active = min(sum(alpha != 0 for alpha in layer.alpha_blend) for layer in layers)
    return Built(model, [optimizer], None, min(x.num_seeds for x in layers), active)
