"""A checkpoint continues bit for bit, is refused when damaged, and survives a crash."""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.config.run import GrowthConfig
from esper.registry import Registry
from esper.seeds import actions
from esper.seeds.blueprints import BLUEPRINTS, blueprint
from esper.seeds.grafting import GRAFTS, GraftStrategy
from esper.seeds.state import Stage
from esper.surgery.attach import attach
from esper.surgery.checkpoint_folder import CheckpointError
from esper.surgery.files import load, save
from esper.surgery.lattice import lattice_of

GROWTH = GrowthConfig(ramp_steps=9, objective="reconstruction", fine_tuning_intervals=3)


def host():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )


def attach_all(model):
    attach(model, "0", 4, growth=GROWTH, seed=5)
    attach(model, "0->2", 5, geometry="span")
    attach(model, "2", 2, hidden=4)
    attach(model, "2", 3, geometry="span")
    return lattice_of(model)


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1, **options)


# what a run does at the end of each interval, so that seeds are in all kinds of stages
G, P, A, C = actions.Germinate, actions.Promote, actions.Advance, actions.Cull
SCRIPT = {
    1: [G("0", 0, "mlp_gelu", "cosine"), G("0->2", 0, "mlp_relu"), G("2", 1, "glu")],
    2: [P("0", 0), P("0->2", 0), P("2", 1), G("0", 3, "low_rank", "performance_linked")],
    3: [A("0", 0), A("0->2", 0), C("2", 1), P("0", 3)],
    4: [A("0", 0), A("0", 3), G("2->2", 0, "low_rank")],
    # the moments of culled and re-awakened seeds are to be forgotten in the next step
    5: [A("0", 0), A("0->2", 0), A("2", 1), G("2", 1, "scale_shift"), P("2", 1)],
    6: [A("0", 0), A("2", 1), P("2->2", 0)],
    7: [A("0", 3), C("0", 0)],
}


def sample_losses(model, x):
    return (model(x) - x[:, :3].abs()).square().mean(1)


def run(model, lattice, optimizer, until):
    """Trains to the end of an interval; returns losses and reports as plain numbers."""
    seen = []
    while lattice.interval < until:
        generator = torch.Generator().manual_seed(lattice.interval)
        for _ in range(5):
            x = torch.randn(16, 6, generator=generator)
            optimizer.zero_grad()
            loss = sample_losses(model, x).mean()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        report = lattice.report(loss.item(), partial(sample_losses, model, x))
        seen += [report.grad_norm, report.host_drift_frac, report.parameters, report.step]
        seen += [str(s.__dict__) for s in report.sites]
        lattice.apply(SCRIPT.get(lattice.interval, []))
    return seen


def fingerprint(model, optimizer):
    digest = hashlib.sha256()
    moments = optimizer.state_dict()["state"]
    for state in (model.state_dict(), *(moments[index] for index in sorted(moments))):
        for name in sorted(state):
            digest.update(name.encode() + state[name].numpy().tobytes())
    return digest.hexdigest()


def saved_at(interval, folder):
    model = host()
    lattice = attach_all(model)
    optimizer = adam(model)
    run(model, lattice, optimizer, interval)
    save(folder, model, lattice, optimizer=optimizer)
    return model, lattice, optimizer


def resumed(folder):
    """From nothing: as a new process would."""
    model = host()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 9.0)
    lattice = load(folder, model)
    optimizer = adam(model, betas=(0.5, 0.5))
    assert load(folder, model, optimizer=optimizer) is lattice
    return model, lattice, optimizer


@pytest.mark.parametrize("interval", [0, 1, 3, 4, 5, 6, 7])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path, interval):
    unbroken = saved_at(interval, tmp_path)
    again = resumed(tmp_path)
    assert fingerprint(again[0], again[2]) == fingerprint(unbroken[0], unbroken[2])
    assert (again[1].growth, again[1].seed) == (GROWTH, 5)
    assert list(again[1].attached) == list(unbroken[1].attached)
    seen = run(*unbroken, 9)
    assert run(*again, 9) == seen
    assert fingerprint(again[0], again[2]) == fingerprint(unbroken[0], unbroken[2])
    # what the paces of grafts are decided on, running medians included
    assert again[1].signals == unbroken[1].signals


def test_a_run_resumed_in_a_new_process_is_the_unbroken_one(tmp_path):
    unbroken = saved_at(4, tmp_path)
    code = (
        "import sys, importlib.util\n"
        "import torch; torch.set_num_threads(1)\n"
        f"spec = importlib.util.spec_from_file_location('here', {__file__!r})\n"
        "here = importlib.util.module_from_spec(spec); spec.loader.exec_module(here)\n"
        f"again = here.resumed({str(tmp_path)!r}); here.run(*again, 8)\n"
        "print(here.fingerprint(again[0], again[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    run(*unbroken, 8)
    assert done.stdout.strip() == fingerprint(unbroken[0], unbroken[2]), done.stderr


def test_a_checkpoint_is_loaded_into_a_lattice_that_is_there(tmp_path):
    unbroken = saved_at(4, tmp_path)
    model = host()
    lattice = attach_all(model)
    optimizer = adam(model)
    run(model, lattice, optimizer, 6)
    assert load(tmp_path, model, optimizer=optimizer) is lattice
    assert run(model, lattice, optimizer, 8) == run(*unbroken, 8)


def test_a_site_whose_units_have_a_bias_of_their_own_is_rebuilt_as_it_was(tmp_path):
    def plain():
        return nn.Sequential(nn.Linear(6, 8, bias=False))

    model = plain()
    lattice = attach(model, "0", 3, geometry="span", biased=True)
    lattice.plant("0->0", 1, "low_rank")
    save(tmp_path, model, lattice)
    other = plain()
    again = load(tmp_path, other)
    assert again.layer("0->0").biased
    assert again.count_parameters() == lattice.count_parameters()
    x = torch.randn(4, 6)
    assert torch.equal(other(x), model(x))
    attach(usual := plain(), "0", 3, geometry="span")
    with pytest.raises(CheckpointError, match="or with other sizes"):
        load(tmp_path, usual)


def test_a_host_without_a_lattice_is_saved_too(tmp_path):
    from esper.surgery.lattice import Lattice

    model = host()
    save(tmp_path, model, Lattice(model, seed=3))
    other = host()
    nn.init.zeros_(other[0].weight)
    assert load(tmp_path, other).seed == 3
    assert torch.equal(other[0].weight, model[0].weight)
    assert not any("kasmina" in k for k in other.state_dict())


def test_tied_weights_stay_tied(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    lattice = attach(model, "0", 2)
    save(tmp_path, model, lattice, optimizer=adam(model))
    load(tmp_path, other)
    assert other[1].weight is other[0].weight
    assert torch.equal(other[1].weight, model[0].weight)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    lambda p: torch.optim.Adagrad(p, lr=0.1),
])  # fmt: skip
def test_optimizers_of_other_kinds(tmp_path, make):
    def begin():
        model = host()
        lattice = attach_all(model)
        groups = [
            {"params": lattice.host_parameters()},
            {"params": lattice.parameters(), "lr": 1e-3},
        ]
        return model, lattice, make(groups)

    first, second = begin(), begin()
    run(*first, 4)
    save(tmp_path, *first[:2], optimizer=first[2])
    load(tmp_path, second[0], optimizer=second[2])
    assert run(*first, 7) == run(*second, 7)


# damage and strangers


def flip(folder):
    file = next(folder.glob("tensors-*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(folder):
    file = next(folder.glob("tensors-*"))
    file.write_bytes(file.read_bytes()[:-100])


def remove(folder):
    next(folder.glob("tensors-*")).unlink()


def edit(folder, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def resign(folder, change):
    """An edit by someone who knows how: the hash is right, the content is not."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["manifest_sha256"]
    change(manifest)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(manifest | {"manifest_sha256": digest}))


def rename_blueprint(manifest):
    names = manifest["lattice"]["blueprints"]
    names[names.index("mlp_gelu")] = "mlp_gelo"


def rename_graft(manifest):
    names = manifest["lattice"]["grafts"]
    names[names.index("cosine")] = "cosinus"


def swap_for_garbage(folder):
    file = next(folder.glob("tensors-*"))
    file.write_bytes(b"x" * 50)
    digest = hashlib.sha256(b"x" * 50).hexdigest()
    resign(folder, lambda m: m.update(tensors_sha256=digest))


DAMAGE = {
    "flipped": (flip, "must have sha256 .* damaged or truncated"),
    "truncated": (truncate, "must have sha256 .* damaged or truncated"),
    "removed": (remove, "must be readable, but: No such file"),
    "garbage": (swap_for_garbage, "must be a safetensors file"),
    "edited": (lambda f: edit(f, tensors_sha256="0"), "must match its own sha256"),
    "unsigned": (lambda f: edit(f, manifest_sha256=None), "must match its own sha256"),
    "version": (lambda f: edit(f, version=2), "must have version 1, but has 2"),
    "foreign": (lambda f: edit(f, format="zip"), r"must be written by esper\.save"),
    "list": (lambda f: (f / "manifest.json").write_text("[]"), r"must be written by esper\.save"),
    "no_json": (lambda f: (f / "manifest.json").write_text("{"), "readable manifest.json"),
    "no_manifest": (lambda f: (f / "manifest.json").unlink(), "readable manifest.json"),
    "blueprint": (lambda f: resign(f, rename_blueprint), "blueprint must be one of .*'mlp_gelo'"),
    "graft": (lambda f: resign(f, rename_graft), "graft strategy must be one of .*'cosinus'"),
    "growth": (
        lambda f: resign(f, lambda m: m["lattice"]["growth"].update(ramp_steps=-1)),
        "must fit the model, but",
    ),
    "sites": (
        lambda f: resign(f, lambda m: m["lattice"]["sites"][0].update(name="9")),
        "must fit the model, but: sites must match .*'9' matches none",
    ),
}  # fmt: skip


def everything(model, optimizer):
    return (
        fingerprint(model, optimizer),
        json.dumps(optimizer.state_dict()["param_groups"]),
        list(model.state_dict()),
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_nothing_touched(tmp_path, damage, attached):
    harm, match = DAMAGE[damage]
    saved_at(4, tmp_path)
    harm(tmp_path)
    model = host()
    lattice = attach_all(model) if attached else None
    optimizer = adam(model)
    if attached:
        run(model, lattice, optimizer, 2)
    if attached and damage == "sites":
        match = "must hold the model's own sites"
    before, files = everything(model, optimizer), files_of(tmp_path)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path, model, optimizer=optimizer if attached else None)
    assert everything(model, optimizer) == before
    assert files_of(tmp_path) == files
    assert lattice_of(model) is lattice
    assert lattice is None or (lattice.interval, lattice.growth) == (2, GROWTH)


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(1))


def wider():
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
    )


MISFITS = {
    "shape": (wider, r"differs in \['4.weight: \(3, 8\) saved, \(4, 8\) in the model'"),
    "lacks": (lambda: nn.Sequential(*host(), Other()), r"lacks \['5.extra'\]"),
    "extra": (lambda: host()[:4], r"has \['4.bias', '4.weight'\] besides"),
    "no_site": (lambda: nn.Sequential(nn.Linear(6, 8)), "'0->2' matches none"),
    "no_linear": (lambda: nn.Sequential(nn.ReLU(), *host()[1:]), "must fit the model"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_another_architecture_is_refused_and_left_without_a_lattice(tmp_path, misfit):
    build, match = MISFITS[misfit]
    saved_at(4, tmp_path)
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path, model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert lattice_of(model) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_lattice_with_other_sites_is_refused(tmp_path):
    """Its tensors may have the same names and shapes and yet mean something else."""
    model, other = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
    lattice = attach(model, "0->2", 3, geometry="span")
    save(tmp_path, model, lattice)
    theirs = attach(other, "2", 3, geometry="span")
    assert list(model.state_dict()) == list(other.state_dict())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"own sites \['2->2'\], but has \['0->2'\]"):
        load(tmp_path, other)
    assert all(torch.equal(v, before[k]) or "graft_loss" in k
               for k, v in other.state_dict().items())  # fmt: skip
    assert list(theirs.attached) == ["2->2"]


def test_an_optimizer_that_was_not_saved_is_not_restored(tmp_path):
    model = host()
    save(tmp_path, model, attach_all(model))
    other = host()
    optimizer = adam(other)
    with pytest.raises(CheckpointError, match="must hold an optimizer to restore one"):
        load(tmp_path, other, optimizer=optimizer)
    assert lattice_of(other) is None


OPTIMIZERS = {
    "kind": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "that of a Adam, not SGD"),
    "before": (lambda m: adam(m[4]), "same parameters in the same order"),
    "order": (
        lambda m: torch.optim.Adam(list(m.parameters())[::-1]),
        "same parameters in the same order",
    ),
    "groups": (
        lambda m: torch.optim.Adam([{"params": m[0].parameters()}, {"params": m[2:].parameters()}]),
        "same parameters in the same order",
    ),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_another_optimizer_is_refused_and_nothing_touched(tmp_path, case):
    build, match = OPTIMIZERS[case]
    saved_at(4, tmp_path)
    model = host()
    attach_all(model)
    optimizer = build(model)
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path, model, optimizer=optimizer)
    assert everything(model, optimizer) == before


# saving


def test_saving_over_a_checkpoint_replaces_it(tmp_path):
    model, lattice, optimizer = saved_at(3, tmp_path)
    first = files_of(tmp_path)
    run(model, lattice, optimizer, 6)
    save(tmp_path, model, lattice, optimizer=optimizer)
    second = files_of(tmp_path)
    assert len(first) == len(second) == 2
    assert not set(first.values()) & set(second.values())
    save(tmp_path, model, lattice, optimizer=optimizer)
    assert files_of(tmp_path) == second


def test_nothing_is_pickled(tmp_path):
    saved_at(4, tmp_path)
    names = sorted(p.suffix for p in tmp_path.iterdir())
    assert names == [".json", ".safetensors"]
    header = next(tmp_path.glob("*.safetensors")).read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert {v["dtype"] for v in json.loads(header[8 : 8 + size]).values()} <= {
        "F32", "F64", "I32", "I64", "BOOL",
    }  # fmt: skip
    json.loads((tmp_path / "manifest.json").read_text())


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"manifest.json": "{}"}])
def test_a_foreign_folder_is_not_overwritten(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    before = files_of(tmp_path)
    model = host()
    with pytest.raises(CheckpointError, match=r"must be (a checkpoint or an empty|written by)"):
        save(tmp_path, model, attach(model, "0", 4))
    assert files_of(tmp_path) == before


def test_a_file_is_not_overwritten(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("mine")
    model = host()
    with pytest.raises(CheckpointError, match="must be a checkpoint folder"):
        save(path, model, attach(model, "0", 4))
    assert path.read_text() == "mine"


def test_another_models_lattice_is_refused(tmp_path):
    model, other = host(), host()
    with pytest.raises(ValueError, match="lattice must be the model's own"):
        save(tmp_path / "new", model, attach(other, "0", 4))
    assert not (tmp_path / "new").exists()


def test_folders_are_made_as_needed(tmp_path):
    model = host()
    folder = tmp_path / "a" / "b"
    assert save(str(folder), model, attach(model, "0", 4)) == folder
    assert load(folder, host()).layer("0").num_seeds == 4


@pytest.mark.parametrize("crash_at", [1, 2])
@pytest.mark.parametrize("former", [True, False])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, crash_at, former):
    model, lattice, optimizer = saved_at(3, tmp_path / "old")
    folder = tmp_path / ("old" if former else "new")
    expected = fingerprint(model, optimizer)
    run(model, lattice, optimizer, 6)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == crash_at:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        save(folder, model, lattice, optimizer=optimizer)
    monkeypatch.undo()
    if former:
        again = resumed(folder)
        assert fingerprint(again[0], again[2]) == expected
    assert not list(folder.glob("*.tmp"))
    save(folder, model, lattice, optimizer=optimizer)
    again = resumed(folder)
    assert fingerprint(again[0], again[2]) == fingerprint(model, optimizer)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("former", [True, False])
def test_a_killed_save_leaves_the_old_checkpoint(tmp_path, former):
    model, lattice, optimizer = saved_at(3, tmp_path / "old")
    folder = tmp_path / ("old" if former else "new")
    expected = fingerprint(model, optimizer)
    code = (
        "import os, signal, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('here', {__file__!r})\n"
        "here = importlib.util.module_from_spec(spec); spec.loader.exec_module(here)\n"
        f"again = here.resumed({str(tmp_path / 'old')!r}); here.run(*again, 6)\n"
        "replace = os.replace\n"
        "def killed(source, target):\n"
        "    if target.name == 'manifest.json': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(source, target)\n"
        "os.replace = killed\n"
        f"here.save({str(folder)!r}, again[0], again[1], optimizer=again[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(folder.glob("*.tmp")), "the test is to leave something behind"
    if former:
        again = resumed(folder)
        assert fingerprint(again[0], again[2]) == expected
    save(folder, model, lattice, optimizer=optimizer)
    assert len(list(folder.iterdir())) == 2
    assert fingerprint(*resumed(folder)[::2]) == expected


# registries of another process


def registry_of(kind, items):
    registry = Registry(kind)
    for name, item in items:
        registry.register(name)(item)
    return registry._items


def test_ids_are_renumbered_where_registries_differ(tmp_path, monkeypatch):
    unbroken = saved_at(4, tmp_path)
    y = unbroken[0].eval()(torch.ones(2, 6))
    with monkeypatch.context() as patch:
        items = list(BLUEPRINTS._items.items())
        patch.setattr(BLUEPRINTS, "_items", dict(items[:1] + items[:0:-1]))
        grafts = list(GRAFTS._items.items())
        extra = [("other", GraftStrategy("linear", lambda signals, growth: 1.0))]
        patch.setattr(GRAFTS, "_items", dict(extra + grafts[::-1]))
        model = host()
        lattice = load(tmp_path, model)
        assert torch.equal(model.eval()(torch.ones(2, 6)), y)
        names, strategies = list(BLUEPRINTS), list(GRAFTS)
        states = lattice.layer("0").states()
        assert [names[s.blueprint_id] for s in states] == ["mlp_gelu", "noop", "noop", "low_rank"]
        assert [strategies[states[i].graft_id] for i in (0, 3)] == ["cosine", "performance_linked"]
        assert states[3].stage is Stage.GRAFTING


def test_a_blueprint_that_no_seed_has_need_not_be_known(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(BLUEPRINTS, "_items", dict(BLUEPRINTS._items))
        blueprint("sine")(torch.sin)
        model = host()
        lattice = attach(model, "0", 4)
        save(tmp_path / "unused", model, lattice)
        lattice.plant("0", 0, "sine")
        save(tmp_path / "used", model, lattice)
    assert load(tmp_path / "unused", host()).count_awake() == 0
    with pytest.raises(CheckpointError, match=r"blueprint must be one of .*'sine'"):
        load(tmp_path / "used", host())


def test_paths_in_the_manifest_do_not_lead_out_of_the_folder(tmp_path):
    saved_at(1, tmp_path / "a")
    file = next((tmp_path / "a").glob("tensors-*"))
    file.rename(tmp_path / file.name)
    resign(tmp_path / "a", lambda m: m.update(tensors=f"../{file.name}"))
    with pytest.raises(CheckpointError, match="must be readable"):
        load(tmp_path / "a", host())
    assert Path(tmp_path / file.name).exists()
