"""The README's example runs as it stands, grows, and folds into plain modules."""

import re
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import esper
from esper.training.tasks import Spirals

README = Path(__file__).parents[1] / "README.md"


def test_the_example_grows_a_plain_model():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = next(b for b in blocks if "esper.attach" in b)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    data = Spirals().load(0)
    x, y = data.train
    batches = [(x[i], y[i]) for i in (torch.randint(len(x), (256,)) for _ in range(2000))]
    scope = {"batches": batches, "x_val": data.held_out[0], "y_val": data.held_out[1]}
    exec(compile(code, "README.md", "exec"), scope)
    kept = [t for t in scope["lattice"].log if t.after.stage.name == "FINE_TUNING"]
    assert kept
    assert not any(type(m).__module__.startswith("esper") for m in scope["plain"].modules())
    hits = scope["plain"](data.test[0]).argmax(-1) == data.test[1]
    assert hits.double().mean() > 0.95


def test_the_example_of_matched_units_measures_and_grows():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = next(b for b in blocks if 'initialisation="matched"' in b)
    made, reported = code.split("report = ")
    torch.manual_seed(0)
    data = Spirals().load(0)
    x, y = data.train[0][:256], data.train[1][:256]
    model = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    scope = {"esper": esper, "model": model, "x": x, "y": y, "cross_entropy": cross_entropy}
    scope["evaluate"] = lambda: cross_entropy(model(data.held_out[0]), data.held_out[1])
    exec(compile(made, "README.md", "exec"), scope)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        scope["loss"] = cross_entropy(model(x), y)
        scope["loss"].backward()
        optimizer.step()
        report = "report = " + reported + "actions = tamiyo.decide(report)\nlattice.apply(actions)"
        exec(compile(report, "README.md", "exec"), scope)
    assert (scope["report"].sites[0].bottleneck > 0).any()
    assert scope["lattice"].count_awake() == 2
