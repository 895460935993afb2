"""`esper run --shards` trains in actors what `esper run` trains in its own process."""

import json

import pytest
import yaml
from tests.esper.cli.conftest import esper_process

TIMED = ("train_seconds", "growth_seconds")


@pytest.mark.slow
def test_a_run_in_an_actor_gives_the_record_of_one_in_this_process(tmp_path, make_config):
    config = make_config().model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    found = []
    for name, more in {"here": [], "there": ["--shards", "1", "--save", "model"]}.items():
        done = esper_process(
            "run", "run.yaml", "--seed", 5, "--json", f"{name}.json", *more, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / f"{name}.json").read_text())
        found.append({key: record[key] for key in ("transitions", "sites", "status")})
        for part in ("metrics", "curves"):
            found[-1][part] = {k: v for k, v in record[part].items() if k not in TIMED}
    assert found[0] == found[1]
    assert len(found[0]["transitions"]) > 10
    assert (tmp_path / "model" / "manifest.json").exists()
    assert "saved: model" in done.stdout


@pytest.mark.slow
def test_shards_may_share_the_seeds(tmp_path, make_config):
    host = {"name": "mlp", "options": {"hidden": [8, 8]}}
    lattice = [{"sites": "fc1", "seeds_per_layer": 4, "hidden": 4}]
    config = make_config(host=host, lattice=lattice).model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    found = []
    for more in ([], ["--shards", "2", "--parallel", "seed"]):
        done = esper_process("run", "run.yaml", "--json", "record.json", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / "record.json").read_text()))
    one, two = found
    for record in found:
        for transition in record["transitions"]:
            # it tells of numbers, whose last digit may differ
            del transition["reason"]
    assert two["transitions"] == one["transitions"]
    assert len(one["transitions"]) > 10
    assert two["metrics"]["test_loss"] == pytest.approx(one["metrics"]["test_loss"], rel=1e-3)
    assert set(two["curves"]["shards"]) == {2.0}
    done = esper_process("run", "run.yaml", "--parallel", "seed", cwd=tmp_path)
    assert done.returncode == 2
    assert "give --shards N, too" in done.stderr


@pytest.mark.slow
def test_more_shards_than_the_machine_has_cpus_are_refused(tmp_path, make_config):
    config = make_config().model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = esper_process("run", "run.yaml", "--shards", 5000, cwd=tmp_path)
    assert done.returncode == 2
    assert "5000 shards ask for 1 each; ask for less" in done.stderr


@pytest.mark.slow
def test_a_shard_that_ray_ends_for_memory_says_what_to_do(tmp_path, make_config, monkeypatch):
    """Ray's own monitor, to which this machine is always too full."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    config = make_config().model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = esper_process("run", "run.yaml", "--shards", 1, "--on-loss", "fail", cwd=tmp_path)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "shard 0 ran out of memory" in said, said
    assert "lower train.batch_size" in said
