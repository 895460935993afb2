"""Pools that FSDP2 shards by seeds: two processes step together as one would.

This file is also the program of each process.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from esper import SeedOptimizer, attach
from esper.config.run import GrowthConfig
from esper.seeds.actions import Advance, Germinate, Promote
from esper.seeds.local_rows import local_rows
from esper.seeds.state import SeedState, Stage

pytestmark = pytest.mark.slow

PROCESSES = 2
# 5 seeds: 3 and 2; 1 seed: 1 and none
SEEDS = (5, 1)
OPTIMIZERS = {
    "SeedOptimizer": lambda params: SeedOptimizer(params, lr=0.01, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, amsgrad=True),
    "foreach": lambda params: torch.optim.Adam(params, lr=0.01, foreach=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=0.1),
}


def make(num_seeds):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    lattice = attach(model, "0", num_seeds, growth=GrowthConfig(ramp_steps=10))
    lattice.apply([Germinate("0", 0, "mlp_gelu")])
    lattice.apply([Promote("0", 0)])
    lattice.apply([Advance("0", 0)])
    layer = lattice.layer("0")
    with torch.no_grad():
        for weights in layer.pool():
            weights.normal_(std=0.3)
    return model, layer


def set_stages(layer, stages):
    layer.write_states([SeedState(s, 2) for s in stages][: layer.num_seeds])
    with torch.no_grad():
        for seed, stage in enumerate(stages[: layer.num_seeds]):
            if stage in (Stage.FINE_TUNING, Stage.FOSSILIZED):
                layer.alpha[seed] = 1


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def everything(layer, optimizer):
    """All rows of the pool and its moments, gathered from all processes."""
    tensors = list(layer.pool())
    for p in layer.pool():
        tensors += [v for v in optimizer.state[p].values() if v.ndim == p.ndim]
    return [whole(t) for t in tensors]


STORY = (
    (Stage.GRAFTING, Stage.FINE_TUNING, Stage.DORMANT, Stage.FOSSILIZED, Stage.GRAFTING),
    (Stage.FOSSILIZED, Stage.FINE_TUNING, Stage.TRAINING, Stage.FOSSILIZED, Stage.GRAFTING),
    (Stage.FINE_TUNING, Stage.CULLED, Stage.TRAINING, Stage.FINE_TUNING, Stage.FOSSILIZED),
)


def check(name, num_seeds):
    from torch.distributed.fsdp import fully_shard

    x, y = torch.randn(2, 16, 6), torch.randn(2, 16, 3)
    (model, layer), (twin, twin_layer) = make(num_seeds), make(num_seeds)
    fully_shard(model)
    sizes = [len(local_rows(p)[0]) for p in layer.pool()]
    assert sizes == [sizes[0]] * 3
    assert sizes[0] < num_seeds or num_seeds == 1
    optimizers = [
        OPTIMIZERS[name](m.pool() if name == "SeedOptimizer" else host.parameters())
        for host, m in ((model, layer), (twin, twin_layer))
    ]
    both = list(zip((model, twin), (layer, twin_layer), optimizers, strict=True))
    for stages in STORY:
        for _, each, _ in both:
            set_stages(each, stages)
            # on every process, as the lattice would
            each.fresh[:, 0] = True
            each.any_fresh = True
        before = None
        for step in range(4):
            for host, _, optimizer in both:
                host.zero_grad()
                (host(x[step % 2]) - y[step % 2]).square().mean().backward()
                optimizer.step()
            rows = everything(layer, optimizers[0])
            still = ~layer.trainable
            # moments appear with the first gradient
            same = before if before and len(before) == len(rows) else rows
            for now, was in zip(rows, same, strict=True):
                assert torch.equal(now[still], was[still]), (name, stages)
            before = rows
        for mine, wanted in zip(rows, everything(twin_layer, optimizers[1]), strict=True):
            torch.testing.assert_close(
                mine, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, on=(name, stages): f"{on}: {m}"
            )
        for buffer in ("alpha", "progress", "ramped_steps", "fresh", "moment_age"):
            assert torch.equal(getattr(layer, buffer), getattr(twin_layer, buffer)), buffer
        if name == "SeedOptimizer":
            saved = {k: whole(v) for k, v in optimizers[0].state[layer.w_in].items()}
            optimizers[0].load_state_dict(optimizers[0].state_dict())
            for key, value in optimizers[0].state[layer.w_in].items():
                assert torch.equal(whole(value), saved[key]), key
    assert layer.steps == 4 * len(STORY)


def check_other_placements():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (PROCESSES,))
    tensor = torch.arange(12.0).view(3, 4)
    rows, here = local_rows(distribute_tensor(tensor, mesh, [Replicate()]))
    assert torch.equal(rows, tensor)
    assert here == slice(0, 3)
    with pytest.raises(ValueError, match=r"sharded by whole seeds.*Shard\(dim=1\)"):
        local_rows(distribute_tensor(tensor, mesh, [Shard(1)]))


def run_process(rank, store):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(1)
    check_other_placements()
    for num_seeds in SEEDS:
        for name in OPTIMIZERS:
            check(name, num_seeds)
    dist.destroy_process_group()


def test_two_processes_are_as_one(tmp_path):
    """Frozen rows stay bit for bit, trained ones and grafts go as without sharding."""
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(errors)


if __name__ == "__main__":
    run_process(int(sys.argv[1]), Path(sys.argv[2]))
