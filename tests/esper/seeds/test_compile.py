"""Compiled, checkpointed, copied and distributed models: a stage change stays a change of data."""

import copy
import itertools
import os
import socket

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing import spawn
from torch.utils.checkpoint import checkpoint

from esper import attach
from esper.config.run import GrowthConfig
from esper.seeds.actions import Advance, Cull, Germinate, Promote
from esper.seeds.blueprints import BLUEPRINTS, blueprint
from esper.seeds.kasmina import KasminaLayer
from esper.seeds.state import Stage

# seed 0 goes all the way; seed 1 is culled and its slot used again
STORY = [
    [],
    [Germinate("", 0, "mlp_gelu"), Germinate("", 1, "low_rank")],
    [Promote("", 0), Promote("", 1)],
    [Advance("", 0), Cull("", 1)],
    [Advance("", 0), Advance("", 1)],
    [Advance("", 0), Germinate("", 1, "mlp_silu", "cosine")],
    [Advance("", 0), Promote("", 1)],
    [Advance("", 0), Advance("", 1)],
    [Advance("", 1)],
]
SOME = (Stage.TRAINING, Stage.FINE_TUNING, Stage.FOSSILIZED)


class Host(nn.Module):
    """A chunk lattice, a span lattice and a convolution's, in one graph."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.fc1, self.act, self.fc2 = nn.Linear(24, 12), nn.ReLU(inplace=True), nn.Linear(12, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        h = self.conv(x.unsqueeze(1)).flatten(1)
        return self.out(self.fc2(self.act(self.fc1(h))))


class Grown:
    """The host with its lattices, a batch, and an optimizer whose steps do not round wildly."""

    SITES = ("conv", "fc1", "fc1->fc2")

    def __init__(self, stages=()):
        torch.manual_seed(0)
        self.model = Host()
        growth = GrowthConfig(ramp_steps=4)
        for site in ("conv", "fc1"):
            attach(self.model, site, 4, growth=growth, hidden=4)
        self.lattice = attach(self.model, "fc1->fc2", 4, geometry="span")
        self.x, self.target = torch.randn(16, 6), torch.randn(16, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        for seed, stage in enumerate(stages):
            self.lead(seed, stage)
        if stages:
            with torch.no_grad():
                for weights in self.lattice.parameters():
                    weights.normal_()

    def lead(self, seed, stage):
        path = [Promote, *[Advance] * 5]
        for site in self.SITES:
            self.lattice.apply([Germinate(site, seed, "mlp_gelu")])
            for action in path[: stage - 1]:
                self.lattice.apply([action(site, seed)])

    def tell(self, actions):
        everywhere = itertools.product(self.SITES, actions)
        self.lattice.apply([type(a)(**{**vars(a), "site": site}) for site, a in everywhere])

    def loss(self, run):
        # a compiled model has no truth value
        run = self.model if run is None else run
        return (run(self.x) - self.target).square().mean()

    def step(self, run=None):
        self.optimizer.zero_grad()
        loss = self.loss(run)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def gradients(self, run=None):
        self.loss(run).backward()
        # what no seed of the site needs is None in one way of running, and 0 in another
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.model.named_parameters()
        }


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def assert_same(ours, theirs, **tolerance):
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}",
                                   **tolerance)  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_whole_life_is_one_graph_and_equals_the_eager_run(backend):
    eager, grown = Grown(), Grown()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(grown.model, backend=counter, fullgraph=True)
    seen = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for actions in STORY:
            for side in (eager, grown):
                side.tell(actions)
            for _ in range(5):
                assert grown.step(compiled) == pytest.approx(eager.step(), rel=1e-5)
            seen |= set(grown.lattice.layer("fc1").state[:, 0].tolist())
            for side in (eager, grown):
                side.lattice.report(1.0)
    assert counter.frame_count == 1
    assert {Stage.TRAINING, Stage.GRAFTING, Stage.FINE_TUNING, Stage.FOSSILIZED} <= seen
    for mine, theirs in zip(grown.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_evaluation_is_compiled_once_too():
    grown = Grown()
    grown.model.eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(grown.model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for actions in STORY:
            grown.tell(actions)
            torch.testing.assert_close(compiled(grown.x), grown.model(grown.x))
    assert counter.frame_count == 1


def test_a_compiled_model_measures_what_the_eager_one_does():
    """In every pass, where the eager one observes one in four: here the first."""
    eager, grown = Grown(SOME), Grown(SOME)
    compiled = torch.compile(grown.model, backend="aot_eager", fullgraph=True)
    grown.gradients(compiled)
    eager.gradients()
    for site in Grown.SITES:
        mine, theirs = (side.lattice.layer(site).telemetry() for side in (grown, eager))
        assert not mine["grad_energy"].isnan().any()
        assert_same(mine, theirs, equal_nan=True)


def test_seeds_that_no_optimizer_moves_are_noticed_in_a_compiled_model():
    grown = Grown([Stage.TRAINING])
    compiled = torch.compile(grown.model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        grown.gradients(compiled)
    assert not grown.lattice.layer("fc1")._seen
    with pytest.raises(ValueError, match=r"seeds of 'conv' must be moved by an optimizer"):
        grown.lattice.report(1.0)


def test_a_blueprint_of_ones_own_compiles(request):
    if "cube_of_test_compile" not in BLUEPRINTS:
        blueprint("cube_of_test_compile")(lambda z: z**3 + z)
    eager, grown = Grown(SOME), Grown(SOME)
    compiled = torch.compile(grown.model, backend="aot_eager", fullgraph=True)
    for side in (eager, grown):
        side.tell([Germinate("", 3, "cube_of_test_compile")])
        side.tell([Promote("", 3)])
        side.tell([Advance("", 3)])
        for site in Grown.SITES:
            side.lattice.layer(site).alpha[3] = 0.5
    assert_same(grown.gradients(compiled), eager.gradients())


@pytest.mark.parametrize("stages", [(), SOME], ids=["dormant", "busy"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_pass_has_the_same_gradients_and_counts_once(reentrant, compiled, stages):
    if compiled and reentrant:
        pytest.skip("torch.compile refuses reentrant checkpoints")
    plain, grown = Grown(stages), Grown(stages)

    # a reentrant checkpoint asks for an input with a gradient
    grown.x.requires_grad_()

    def run(x):
        return checkpoint(grown.model, x, use_reentrant=reentrant)

    run = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    # a span remembers its input from one module to the other, which the compiler asks about
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        for _ in range(2):
            ours, theirs = grown.gradients(run), plain.gradients()
    assert_same(ours, theirs)
    for site in Grown.SITES:
        mine, other = (side.lattice.layer(site).telemetry() for side in (grown, plain))
        assert_same(mine, other, equal_nan=True)
        if stages:
            assert grown.lattice.layer(site)._told().passes == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_functional_call_takes_other_weights(compiled):
    ours, theirs = Grown(SOME), Grown(SOME)
    weights = {name: (p * 0.9).detach().requires_grad_() for name, p in
               ours.model.named_parameters()}  # fmt: skip
    theirs.model.load_state_dict({**theirs.model.state_dict(), **weights})

    def run(x):
        return torch.func.functional_call(ours.model, weights, (x,))

    run = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    (run(ours.x) - ours.target).square().mean().backward()
    assert_same({name: w.grad for name, w in weights.items()}, theirs.gradients())


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_gives_the_pool_exact_gradients(compiled):
    exact, grown = Grown(SOME), Grown(SOME)
    compiled_model = torch.compile(grown.model, backend="aot_eager", fullgraph=True)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return (compiled_model if compiled else grown.model)(x)

    grown.step(run)
    ours, theirs = grown.gradients(run), exact.gradients()
    for name in theirs:
        assert ours[name].dtype == torch.float32
        assert ours[name].isfinite().all()


@pytest.mark.parametrize("reuse", ["deepcopy", "state dict"])
def test_a_copy_of_a_compiled_model_goes_its_own_way(reuse):
    grown, other = Grown(SOME), Grown()
    compiled = torch.compile(grown.model, backend="aot_eager", fullgraph=True)
    before = compiled(grown.x)
    if reuse == "deepcopy":
        twin = copy.deepcopy(grown.model)
    else:
        twin = other.model
        twin.load_state_dict(grown.model.state_dict())
    twin_compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(twin_compiled(grown.x), before)
    twin_compiled(grown.x).square().sum().backward()
    assert all(p.grad is None for p in grown.model.parameters())
    assert twin.fc1.kasmina.probe.grad.count_nonzero() > 0
    assert grown.lattice.layer("fc1").probe.grad.count_nonzero() == 0


@pytest.mark.slow
@pytest.mark.parametrize("work", ["ddp", "fsdp"])
def test_two_processes_get_the_gradients_of_one(work, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_distributed, args=(port, work), nprocs=2)


def _distributed(rank, port, work):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        {"ddp": _ddp, "fsdp": _fsdp}[work](rank)
    finally:
        torch.distributed.destroy_process_group()


def _mean_gradients(stages, halves):
    """The mean over processes, each with its half of the batch."""
    sides = []
    for rank in range(2):
        alone = Grown(stages)
        alone.x, alone.target = (t.chunk(2)[rank] for t in (alone.x, alone.target))
        for _ in range(halves):
            found = alone.gradients()
        sides.append(found)
    return {name: (sides[0][name] + sides[1][name]) / 2 for name in sides[0]}


def _ddp(rank):
    for stages, unused in (((), True), (SOME, False)):
        grown = Grown(stages)
        grown.x, grown.target = (t.chunk(2)[rank] for t in (grown.x, grown.target))
        # eager, a dormant pool takes no part in a pass
        model = nn.parallel.DistributedDataParallel(grown.model, find_unused_parameters=unused)
        for _ in range(2):
            ours = grown.gradients(model)
        assert_same(ours, _mean_gradients(stages, 2))


def _fsdp(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for stages in ((), SOME):
        grown = Grown(stages)
        grown.x, grown.target = (t.chunk(2)[rank] for t in (grown.x, grown.target))
        for module in (grown.model.conv, grown.model.fc1, grown.model.fc2, grown.model):
            fully_shard(module)
        assert all(isinstance(w, DTensor) for w in grown.lattice.parameters())
        ours = grown.gradients()
        wanted = _mean_gradients(stages, 1)
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in ours.items()}
        assert_same(whole, wanted)

        # a seed woken in a sharded pool has the weights it would have in a whole one
        alone = Grown(stages)
        for side in (grown, alone):
            side.tell([Germinate("", 3, "mlp_silu")])
        for site in Grown.SITES:
            pools = grown.lattice.layer(site).pool(), alone.lattice.layer(site).pool()
            for mine, theirs in zip(*pools, strict=True):
                assert torch.equal(mine.full_tensor()[3], theirs[3])
        torch.optim.SGD(grown.model.parameters(), lr=0.0).step()
        report = grown.lattice.report(1.0)
        assert all((site.grad_energy > 0).all() for site in report.sites)
        assert report.grad_norm > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestCudaGraphs:
    @pytest.mark.parametrize("geometry", ["chunk", "span"])
    def test_a_stage_change_between_replays_changes_the_output(self, geometry):
        torch.manual_seed(0)
        source = 16 if geometry == "span" else None
        layer = KasminaLayer(64, 8, geometry=geometry, in_features=source, device="cuda")
        lattice_like = [torch.randn_like(w) for w in layer.pool()]
        x = torch.randn(256, 64, device="cuda", requires_grad=True)
        read = torch.randn(256, 16, device="cuda") if geometry == "span" else None
        dy = torch.randn(256, 64, device="cuda")

        def run():
            y = layer(x, read)
            y.backward(dy)
            return y

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # as the capture will: dormant seeds take part, their gradients exist
            _wake(layer, 0, Stage.FINE_TUNING)
            for _ in range(3):
                run()
            _wake(layer, 0, Stage.DORMANT)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        with torch.no_grad():
            for weights, values in zip(layer.pool(), lattice_like, strict=True):
                weights.copy_(values)
        for stage in (Stage.DORMANT, Stage.TRAINING, Stage.FINE_TUNING, Stage.FOSSILIZED):
            _wake(layer, 3, stage)
            for t in (x, *layer.pool()):
                t.grad.zero_()
            layer.reset_telemetry()
            graph.replay()
            eager = _eager(layer, x, read, dy)
            torch.testing.assert_close(y, eager["y"])
            torch.testing.assert_close(x.grad, eager["dx"], rtol=1e-3, atol=1e-4)
            for weights, grad in zip(layer.pool(), eager["grads"], strict=True):
                torch.testing.assert_close(weights.grad, grad, rtol=1e-3, atol=1e-4)
            assert torch.equal(y, x) == (stage in (Stage.DORMANT, Stage.TRAINING))
            assert not layer.telemetry()["grad_energy"].isnan().any()


def _wake(layer, seed, stage):
    states = layer.states()
    kind = 0 if stage is Stage.DORMANT else list(BLUEPRINTS).index("mlp_gelu")
    states[seed] = type(states[seed])(stage, kind)
    layer.write_states(states)
    layer.alpha[seed] = float(stage >= Stage.GRAFTING and stage <= Stage.FOSSILIZED)


def _eager(layer, x, read, dy):
    twin = copy.deepcopy(layer)
    for p in twin.parameters():
        p.grad = None
    leaf = x.detach().requires_grad_()
    y = twin(leaf, read)
    y.backward(dy)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.pool()]
    return {"y": y.detach(), "dx": leaf.grad, "grads": grads}
