"""The step of a pool: the kernel against the plain definition, and that against torch.optim."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch

from esper_kernels.ops.dispatch import INTERPRET, force_triton
from esper_kernels.ops.pool_step import launch, pool_step
from esper_kernels.reference import pool_step as reference
from esper_kernels.reference.pool_step import PoolTensor, Ramp, Rule, SeedFlags

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernel = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRET, reason="needs a GPU or TRITON_INTERPRET=1"
)
RULES = {
    "adamw": Rule(adam=True, lr=0.1, decay=0.3),
    "adam": Rule(adam=True, lr=0.1, decay=0.3, decoupled=False, betas=(0.0, 0.95), eps=1e-6),
    "sgd": Rule(adam=False, lr=0.1, decay=0.3, decoupled=False),
    "momentum": Rule(adam=False, lr=0.1, decay=0.3, momentum=0.9),
}
# S seeds and the shapes of one seed's three tensors
SHAPES = {
    "chunk of 4": (150, (4, 4), (4,), (4, 4)),
    "odd chunk": (37, (3, 5), (5,), (5, 3)),
    "wide chunk": (3, (40, 33), (33,), (33, 40)),
    "span": (5, (63,), (), (1000,)),
    "one seed": (1, (2, 2), (2,), (2, 2)),
}


def make(shapes, rule, dtype=torch.float32, device=DEVICE, generator=None):
    """Tensors in mid-training: every third seed trains, some are fresh, some ramp."""
    S, *of_a_seed = shapes
    generator = generator or torch.Generator().manual_seed(S)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def tensor(shape):
        has_first = rule.adam or rule.momentum
        return PoolTensor(
            weights=draw(S, *shape),
            grad=draw(S, *shape),
            first=draw(S, *shape) if has_first else None,
            second=draw(S, *shape).square() if rule.adam else None,
            age=draw(S, dtype=torch.float32).mul(9).abs().floor() if rule.adam else None,
        )

    number = torch.arange(S, device=device)
    flags = SeedFlags(
        trainable=number % 3 == 0,
        fresh=torch.stack([number % 4 == 0, number % 5 == 0, number % 2 == 0]),
        lr_scale=draw(S, dtype=torch.float32).abs(),
        steps=torch.full((1,), 7, dtype=torch.int32, device=device),
        arrivals=torch.zeros(S, dtype=torch.int32, device=device),
    )
    ramp = Ramp(
        ramping=(number % 6 == 0).float(),
        pace=(number % 12 < 6) * 0.5 + 0.5,
        cosine=number % 4 == 0,
        ramped_steps=(number % 10).float(),
        progress=draw(S, dtype=torch.float32),
        alpha=draw(S, dtype=torch.float32),
        ramp_steps=8,
    )
    return tuple(map(tensor, of_a_seed)), flags, ramp


def named(pool, flags, ramp):
    parts = {"w_in": pool[0], "bias": pool[1], "w_out": pool[2], "flags": flags, "ramp": ramp}
    for name, part in parts.items():
        for field, value in part._asdict().items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{field}", value


def assert_close(mine, wanted, **tolerance):
    for (name, a), (_, b) in zip(named(*mine), named(*wanted), strict=True):
        torch.testing.assert_close(
            a, b, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}", **tolerance
        )


@needs_kernel
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_kernel_is_the_reference(shapes, rule):
    mine = make(shapes, rule)
    wanted = copy.deepcopy(mine)
    for _ in range(3):
        launch(*mine, rule)
        reference.pool_step(*wanted, rule)
    assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    assert not mine[1].fresh.any()
    assert not mine[1].arrivals.any()
    assert mine[1].steps.tolist() == [10]


def step_on(implementation):
    if implementation == "kernel":
        return launch
    return reference.pool_step


implementations = pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("kernel", marks=needs_kernel)]
)


@implementations
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("name", ["odd chunk", "wide chunk"])
def test_seeds_that_do_not_train_keep_every_bit(implementation, rule, name):
    """Also where their weights, gradients and moments hold NaN, and beside seeds that train."""
    mine = make(SHAPES[name], rule)
    still = ~mine[1].trainable
    mine[1].fresh[:, still] = False
    for tensor in mine[0]:
        for value in (tensor.weights, tensor.grad, tensor.first, tensor.second):
            if value is not None:
                value[still.nonzero()[0]] = float("nan")
    before = copy.deepcopy(mine)
    step_on(implementation)(*mine, rule)
    for now, was in zip(mine[0], before[0], strict=True):
        for a, b in zip(now, was, strict=True):
            if a is not None and a is not now.grad:
                torch.testing.assert_close(a[still], b[still], rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(now.weights[~still], was.weights[~still])
        assert now.weights[~still].isfinite().all()


@implementations
@pytest.mark.parametrize("name", ["odd chunk", "wide chunk"])
def test_moments_of_a_fresh_seed_begin_at_0_whatever_they_hold(implementation, name):
    mine = make(SHAPES[name], RULES["adamw"])
    mine[1].fresh.fill_(True)
    for tensor in mine[0]:
        tensor.first.fill_(float("nan"))
        tensor.second.fill_(float("inf"))
    step_on(implementation)(*mine, RULES["adamw"])
    trains = mine[1].trainable
    for tensor in mine[0]:
        torch.testing.assert_close(tensor.first[trains], 0.1 * tensor.grad[trains])
        assert not tensor.first[~trains].any()
        assert not tensor.second[~trains].any()
        assert torch.equal(tensor.age, trains.float())


@implementations
@pytest.mark.parametrize("without", list(itertools.product([True, False], repeat=3)), ids=str)
def test_a_tensor_without_a_gradient_stays(implementation, without):
    """Its fresh moments begin again all the same, and the grafts move."""
    pool, flags, ramp = make(SHAPES["odd chunk"], RULES["adamw"])
    pool = tuple(
        t._replace(grad=None) if none else t for t, none in zip(pool, without, strict=True)
    )
    before = copy.deepcopy((pool, flags, ramp))
    wanted = copy.deepcopy(before)
    step_on(implementation)(pool, flags, ramp, RULES["adamw"])
    reference.pool_step(*wanted, RULES["adamw"])
    assert_close((pool, flags, ramp), wanted, rtol=1e-5, atol=1e-6)
    for index, none in enumerate(without):
        assert torch.equal(pool[index].weights, before[0][index].weights) == none
        restarted = before[1].fresh[index] & ~flags.trainable
        assert not pool[index].first[restarted].any()
    assert not torch.equal(ramp.alpha, before[2].alpha)


@implementations
def test_ramps_end_at_exactly_1_and_other_seeds_are_left_alone(implementation):
    mine = make(SHAPES["chunk of 4"], RULES["sgd"])
    ramp = mine[2]
    ramp.ramped_steps.zero_()
    others = ramp.ramping == 0
    before = copy.deepcopy(ramp)
    # 49 times the fp32 reciprocal of 49 is below 1
    steps = 49
    ramp = ramp._replace(ramp_steps=steps, pace=torch.full_like(ramp.pace, 1.0))
    for done in range(1, steps + 2):
        step_on(implementation)(mine[0], mine[1], ramp, RULES["sgd"])
        linear = ~others & ~ramp.cosine
        assert torch.equal(
            ramp.alpha[linear], torch.full_like(ramp.alpha[linear], min(done / steps, 1.0))
        )
    assert torch.equal(ramp.alpha[~others], torch.ones_like(ramp.alpha[~others]))
    for field in ("alpha", "progress", "ramped_steps"):
        assert torch.equal(getattr(ramp, field)[others], getattr(before, field)[others])


@implementations
@pytest.mark.parametrize("name", ["odd chunk", "wide chunk"])
def test_shards_together_are_the_whole(implementation, name):
    """Of any size, and empty; each keeps the books of all seeds."""
    rule = RULES["adamw"]
    whole = make(SHAPES[name], rule)
    S = SHAPES[name][0]
    cuts = [0, 1, S - 1, S, S]
    shards = []
    for start, end in itertools.pairwise(cuts):
        pool, flags, ramp = copy.deepcopy(whole)
        rows = [
            t._replace(**{f: getattr(t, f)[start:end].clone()
                          for f in ("weights", "grad", "first", "second")})
            for t in pool
        ]  # fmt: skip
        step_on(implementation)(tuple(rows), flags, ramp, rule, start)
        shards.append((rows, flags, ramp))
    step_on(implementation)(*whole, rule)
    for rows, flags, ramp in shards:
        # all hold the same books
        assert_close(
            (tuple(r._replace(weights=None, grad=None, first=None, second=None) for r in rows),
             flags, ramp),
            (tuple(r._replace(weights=None, grad=None, first=None, second=None)
                   for r in whole[0]), *whole[1:]),
            rtol=0, atol=0,
        )  # fmt: skip
    for index, tensor in enumerate(whole[0]):
        for field in ("weights", "first", "second"):
            joined = torch.cat([getattr(rows[index], field) for rows, _, _ in shards])
            torch.testing.assert_close(joined, getattr(tensor, field))


@needs_kernel
def test_two_runs_agree_bit_for_bit():
    runs = []
    for _ in range(2):
        mine = make(SHAPES["wide chunk"], RULES["adamw"])
        launch(*mine, RULES["adamw"])
        runs.append(mine)
    assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("forced", [nullcontext, pytest.param(force_triton, marks=needs_kernel)])
def test_the_rate_may_be_a_tensor_on_the_device_or_the_cpu(forced):
    runs = []
    for lr in (0.1, torch.tensor(0.1, device=DEVICE), torch.tensor([0.1])):
        mine = make(SHAPES["odd chunk"], RULES["adamw"])
        with forced():
            pool_step(*mine, RULES["adamw"]._replace(lr=lr))
        runs.append(mine)
    assert_close(runs[0], runs[1])
    assert_close(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rule", "make_optimizer"),
    [
        (RULES["adamw"], lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3)),
        (
            RULES["adam"],
            lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3, betas=(0.0, 0.95), eps=1e-6),
        ),
        (RULES["sgd"], lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3)),
        (
            Rule(adam=False, lr=0.1, decay=0.3, decoupled=False, momentum=0.9),
            lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, momentum=0.9),
        ),
    ],
    ids=["adamw", "adam", "sgd", "momentum"],
)
def test_seeds_that_train_from_the_start_are_stepped_as_by_torch(rule, make_optimizer, dtype):
    pool, flags, ramp = make(SHAPES["odd chunk"], rule, dtype)
    flags.trainable.fill_(True)
    flags.fresh.fill_(True)
    flags.lr_scale.fill_(1.0)
    twins = [torch.nn.Parameter(t.weights.clone()) for t in pool]
    optimizer = make_optimizer(twins)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for _ in range(30):
        for tensor, twin in zip(pool, twins, strict=True):
            tensor.grad.normal_(generator=generator)
            twin.grad = tensor.grad.clone()
        pool_step(pool, flags, ramp, rule)
        optimizer.step()
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {}
    for tensor, twin in zip(pool, twins, strict=True):
        # ages and scales are fp32 also in an fp64 pool, as alpha is
        torch.testing.assert_close(tensor.weights, twin.detach(), **tolerance)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_masked_form_of_the_reference_is_the_gathered_one(rule):
    """The first runs where data must not be read: fp64 pools on a GPU."""
    gathered = make(SHAPES["odd chunk"], rule, device="cpu")
    masked = copy.deepcopy(gathered)
    for _ in range(3):
        reference.pool_step(*gathered, rule)
        for index, tensor in enumerate(masked[0]):
            reference._step_under_mask(tensor, masked[1], masked[1].fresh[index], rule, 0)
        masked[1].fresh.fill_(False)
    for mine, wanted in zip(masked[0], gathered[0], strict=True):
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_fp64_pools_take_the_plain_implementation():
    rule = RULES["adamw"]
    mine = make(SHAPES["odd chunk"], rule, torch.float64)
    wanted = copy.deepcopy(mine)
    with force_triton():
        pool_step(*mine, rule)
    reference.pool_step(*wanted, rule)
    assert_close(mine, wanted, rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["chunk of 4", "wide chunk"])
def test_a_captured_step_follows_the_flags_of_each_replay(name, dtype):
    rule = RULES["adamw"]._replace(lr=torch.tensor(0.1, device=DEVICE))
    captured = make(SHAPES[name], rule, dtype)
    wanted = copy.deepcopy(captured)
    # compiles the kernel, which must not happen while capturing
    pool_step(*copy.deepcopy(captured), rule)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pool_step(*captured, rule)
    number = torch.arange(SHAPES[name][0], device=DEVICE)
    for replay in range(6):
        for pool, flags, ramp in (captured, wanted):
            flags.trainable.copy_(number % 3 == replay % 3)
            flags.fresh[:, number % 5 == replay] = True
            ramp.ramping.copy_(number % 2 == replay % 2)
            rule.lr.fill_(0.1 / (replay + 1))
            for index, tensor in enumerate(pool):
                tensor.grad.copy_(torch.sin(tensor.weights * (replay + index)))
        graph.replay()
        pool_step(*wanted, rule)
    assert_close(captured, wanted, rtol=0, atol=0)
