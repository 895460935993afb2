"""Checkpoints in a store that speaks S3: a real server on this machine, and real HTTP."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from torch import nn

from esper.config.base import ConfigError
from esper.surgery.attach import attach
from esper.surgery.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    CheckpointNotWrittenError,
    read_checkpoint,
    write_checkpoint,
)
from esper.surgery.checkpoint_place import place_of
from esper.surgery.files import load

ESPER = "from esper_experiments.entry import main; main()"
RUN = """
task: {name: spirals, options: {train_samples: 200, held_out_samples: 100, test_samples: 100}}
host: {name: mlp, options: {hidden: [8]}}
train: {steps: 200, batch_size: 40, interval_steps: 10, learning_rate: 0.01}
lattice: [{sites: fc1, seeds_per_layer: 4, hidden: 4}]
growth: {ramp_steps: 8, min_gain: -1e9, min_explained_frac: -1e9}
controller: {name: random, options: {at_intervals: [2, 5], count: 2}}
"""


@pytest.fixture
def store(monkeypatch):
    """A server with one bucket; its stop function, and the URI of a checkpoint there."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    files = fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
    )
    files.create_dir("esper")
    yield server.stop, f"s3://esper/runs/one?endpoint_override={host}:{port}&scheme=http"
    server.stop()


def tensors(value):
    return {"w": torch.full((3,), float(value))}


def test_a_checkpoint_in_a_store_is_replaced_whole_or_not_at_all(store, monkeypatch):
    _, uri = store
    with pytest.raises(CheckpointError, match="must be a checkpoint folder with a readable"):
        read_checkpoint(uri)
    for value in (1, 2):
        write_checkpoint(uri, tensors(value), {"mine": value})
        manifest, found = read_checkpoint(uri)
        assert (manifest["mine"], found["w"].tolist()) == (value, [value] * 3)
    place = place_of(uri)
    assert sorted(place.names()) == [MANIFEST, manifest["tensors"]]

    # killed between the tensors and the manifest
    place.write("tensors-of-a-crash", b"half")
    assert read_checkpoint(uri)[0]["mine"] == 2
    write_checkpoint(uri, tensors(3), {"mine": 3})
    assert len(place.names()) == 2

    place.write(read_checkpoint(uri)[0]["tensors"], b"damaged")
    with pytest.raises(CheckpointError, match=r"runs/one.*must have sha256"):
        read_checkpoint(uri)
    other = place_of(uri.replace("one", "other"))
    other.write("notes.txt", b"of somebody else")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt; choose another"):
        write_checkpoint(uri.replace("one", "other"), tensors(4), {})


def test_a_file_uri_is_a_folder(tmp_path):
    write_checkpoint(f"file://{tmp_path}/my%20state", tensors(1), {})
    assert read_checkpoint(tmp_path / "my state")[1]["w"].tolist() == [1] * 3


@pytest.mark.parametrize(("uri", "what"), [
    ("http://host/bucket/name", r"a folder \(a path or file://\) or a store that speaks S3"),
    ("s3://bucket", "must have a bucket and a name"),
    (Path("s3://bucket/name"), "must be named by text, not by a path"),
    ("s3://bucket/name?shape=round", "must be one that pyarrow reads.*shape"),
])  # fmt: skip
def test_what_is_no_place_for_a_checkpoint_is_refused(uri, what):
    with pytest.raises(ConfigError, match=what):
        write_checkpoint(uri, tensors(1), {})


@pytest.mark.slow
def test_a_run_whose_shard_is_killed_goes_on_from_the_store(store, tmp_path):
    """In actors, by command; and again from the store alone when it has ended."""
    stop, uri = store
    (tmp_path / "run.yaml").write_text(RUN)

    def esper(*arguments):
        return subprocess.Popen(
            [sys.executable, "-c", ESPER, "run", *arguments], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    whole = esper("run.yaml").communicate()[0]
    cut = esper("run.yaml", "--shards", "1", "--checkpoint", uri, "--every", "2")
    assert any(line.startswith("step 100 ") for line in iter(cut.stdout.readline, ""))
    cut.kill()
    cut.communicate()
    again = esper("--resume", uri, "--shards", "1")
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert final(output) == final(whole)
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(2, 8))
    model.add_module("act1", nn.ReLU())
    model.add_module("out", nn.Linear(8, 2))
    attach(model, "fc1", 4, hidden=4)
    assert load(uri, model).steps == 200
    stop()
    with pytest.raises(CheckpointNotWrittenError, match="NETWORK_CONNECTION"):
        write_checkpoint(uri, tensors(4), {})


def final(output):
    """The metrics that a run prints at its end, without times."""
    lines = [line.split() for line in output.splitlines()]
    return [line for line in lines if len(line) == 2 and "seconds" not in line[0]]
