"""The tasks of EVIDENCE section 5: sizes, settings, splits, and that each can be learnt."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from esper.registry import UnknownNameError
from esper.training.tasks import TASKS, Digits, Mnist1d, Spirals, Task, TaskData, TeacherStudent

SIZES = {
    "spirals": ((2000, 1000, 2000), 2, 2),
    # a tenth of the training data, rounded up, is held out
    "digits": ((1212, 135, 450), 64, 10),
    "mnist1d": ((3600, 400, 1000), 40, 10),
    "moons": ((1000, 1000, 2000), 2, 2),
    "teacher_student": ((1000, 1000, 1000), 10, 10),
}


@pytest.fixture(scope="module")
def loaded():
    cache = {}

    def get(name, seed=0, **options):
        key = (name, seed, *sorted(options.items()))
        if key not in cache:
            cache[key] = TASKS[name](**options).load(seed)
        return cache[key]

    return get


def splits(data):
    return data.train, data.held_out, data.test


def rows(split):
    return {r.tobytes() for r in split[0].numpy()}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_types(loaded, name):
    data = loaded(name)
    sizes, inputs, outputs = SIZES[name]
    assert tuple(len(x) for x, _ in splits(data)) == sizes
    assert tuple(len(y) for _, y in splits(data)) == sizes
    assert (data.inputs, data.outputs) == (inputs, outputs)
    assert data.kind == TASKS[name].kind
    for x, y in splits(data):
        assert (x.shape[1:], x.dtype) == ((inputs,), torch.float32)
        assert x.isfinite().all()
        if data.kind == "classification":
            assert (y.ndim, y.dtype) == (1, torch.int64)
            assert y.unique().tolist() == list(range(outputs))
        else:
            assert (y.shape[1:], y.dtype) == ((outputs,), torch.float32)


@pytest.mark.parametrize("name", SIZES)
def test_splits_share_no_sample(loaded, name):
    train, held_out, test = (rows(s) for s in splits(loaded(name)))
    assert not train & held_out
    assert not train & test
    assert not held_out & test


@pytest.mark.parametrize("name", SIZES)
def test_data_depend_on_the_seed_alone(name):
    first, again, other = (TASKS[name]().load(s) for s in (0, 0, 1))
    for a, b, c in zip(splits(first), splits(again), splits(other), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert a[0].shape == c[0].shape
        assert not torch.equal(a[0], c[0])


@pytest.mark.parametrize("name", SIZES)
def test_a_fixed_data_seed_overrides_the_pairs(name):
    fixed = TASKS[name](data_seed=3)
    for a, b in zip(splits(fixed.load(0)), splits(fixed.load(1)), strict=True):
        assert torch.equal(a[0], b[0])
    assert torch.equal(fixed.load(0).train[0], TASKS[name]().load(3).train[0])


@pytest.mark.parametrize("name", SIZES)
def test_loading_leaves_torchs_generator_alone(name):
    """Else the hosts of all pairs would be equal when the data are."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    TASKS[name]().load(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_spirals_have_the_settings_of_the_evidence():
    task = Spirals()
    assert (task.turns, task.noise) == (1.75, 0.02)
    x, y = task.model_copy(update={"noise": 0.0}).load(0).train
    radius = x.norm(dim=1)
    # an even density on the disc: the squared radius is uniform
    assert np.histogram(radius.square(), bins=4, range=(0, 1))[0] == pytest.approx(500, abs=90)
    angle = 2 * math.pi * 1.75 * radius + math.pi * y
    torch.testing.assert_close(
        x, radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), rtol=0, atol=1e-5
    )
    assert int(y.sum()) == pytest.approx(1000, abs=100)
    noisy = task.load(0).train[0] - x
    assert float(noisy.std()) == pytest.approx(0.02, rel=0.05)


def test_digits_are_split_evenly_over_the_classes_and_scaled(loaded):
    from sklearn.datasets import load_digits

    data = loaded("digits")
    images, labels = load_digits(return_X_y=True)
    assert (float(data.train[0].min()), float(data.train[0].max())) == (0.0, 1.0)
    together = torch.cat([x for x, _ in splits(data)])
    assert sorted(r.tobytes() for r in together.numpy()) == sorted(
        r.tobytes() for r in torch.tensor(images / 16).float().numpy()
    )
    share = 450 / len(labels)
    counts = torch.bincount(data.test[1])
    assert ((counts - torch.bincount(torch.tensor(labels)) * share).abs() <= 1).all()


def test_digits_with_seed_0_have_the_test_set_of_the_evidence(loaded):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    *_, y_test = train_test_split(x / 16, y, test_size=450, stratify=y, random_state=0)
    assert loaded("digits").test[1].tolist() == y_test.tolist()


def test_mnist1d_is_the_packages_own(loaded):
    from mnist1d.data import get_dataset_args, make_dataset

    theirs = make_dataset(get_dataset_args())
    data = loaded("mnist1d", data_seed=get_dataset_args().seed)
    assert torch.equal(data.test[0], torch.tensor(theirs["x_test"]).float())
    assert torch.equal(data.test[1], torch.tensor(theirs["y_test"]))
    fit = torch.cat([data.train[0], data.held_out[0]])
    assert sorted(r.tobytes() for r in fit.numpy()) == sorted(
        r.tobytes() for r in torch.tensor(theirs["x"]).float().numpy()
    )


def test_a_teacher_is_a_relu_network_without_bias():
    task = TeacherStudent()
    data = task.load(0)
    rng = task.rng(0, 3)
    w1, w2 = rng.uniform(-1, 1, (10, 10)), rng.uniform(-1, 1, (10, 10))
    assert w1.min() < -0.9 < 0.9 < w1.max()
    for x, y in splits(data):
        np.testing.assert_allclose(np.maximum(x.numpy() @ w1, 0) @ w2, y, atol=1e-4)
        assert float(x.mean()) == pytest.approx(0, abs=0.05)
        assert float(x.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("name", "steps", "better"),
    [("spirals", 300, 0.6), ("digits", 100, 0.8), ("mnist1d", 150, 0.25)],
)
def test_a_plain_network_learns_it(loaded, name, steps, better):
    data = loaded(name)
    model, _ = fit(data, steps)
    accuracy = data.metrics("test", model(data.test[0]), data.test[1])["test_accuracy"]
    assert better < accuracy <= 1


def test_a_plain_network_learns_from_a_teacher(loaded):
    data = loaded("teacher_student")
    model, first = fit(data, 200)
    final = data.metrics("test", model(data.test[0]), data.test[1])
    assert set(final) == {"test_loss"}
    assert final["test_loss"] < 0.3 * first


def fit(data: TaskData, steps: int) -> tuple[nn.Module, float]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(data.inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
        nn.Linear(32, data.outputs),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = data.train
    first = data.losses(model(x), y).mean().item()
    for i in range(steps):
        batch = torch.arange(i * 128, i * 128 + 128) % len(x)
        optimizer.zero_grad()
        data.losses(model(x[batch]), y[batch]).mean().backward()
        optimizer.step()
    return model.eval().requires_grad_(False), first


def test_losses_of_classes_are_nats_a_sample():
    data = Spirals(train_samples=4, held_out_samples=4, test_samples=4).load(0)
    outputs, targets = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    losses = data.losses(outputs, targets)
    assert losses.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-2)) + 2])
    assert data.metrics("test", outputs, targets) == {
        "test_loss": pytest.approx(float(losses.mean())),
        "test_accuracy": 0.5,
    }


def test_losses_of_numbers_are_mean_squares_a_sample():
    data = TeacherStudent(outputs=2).load(0)
    outputs, targets = (
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [0.0, 2.0]]),
    )
    assert data.losses(outputs, targets).tolist() == [2.5, 2.0]
    with pytest.raises(ValueError, match=r"the targets' shape \(2, 2\), but have \(2, 1\)"):
        data.losses(outputs[:, :1], targets)


def test_sizes_can_be_chosen():
    data = Spirals(train_samples=30, held_out_samples=20, test_samples=10).load(0)
    assert [len(x) for x, _ in splits(data)] == [30, 20, 10]
    assert [len(x) for x, _ in splits(Digits(held_out_frac=0.3).load(0))] == [942, 405, 450]
    assert len(Mnist1d(held_out_frac=0.25).load(0).held_out[0]) == 1000


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("spirals", {"train_samples": 0}),
        ("spirals", {"noise": -1}),
        ("spirals", {"turn": 1}),
        ("digits", {"held_out_frac": 0}),
        ("mnist1d", {"held_out_frac": 0.5}),
        ("teacher_student", {"data_seed": -1}),
    ],
)
def test_wrong_options_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TASKS[name](**options)


def test_an_unknown_task_is_refused():
    with pytest.raises(UnknownNameError, match=r"task must be one of .* Did you mean 'spirals'"):
        TASKS["spiral"]


def test_a_task_must_say_how_it_is_loaded():
    with pytest.raises(NotImplementedError, match="Task must define load"):
        Task().load(0)
