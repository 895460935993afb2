"""A run whose shards are on several Ray nodes, of which one dies or is cut off."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

import psutil
import pytest
import yaml
from tests.esper.cli.conftest import CLI
from tests.esper.conftest import untimed
from tests.esper.shards.conftest import run_config
from tests.esper.shards.test_faults import decisions
from tests.esper_experiments.conftest import cluster_of

from esper.cli.log import read_trial
from esper.surgery.checkpoint_folder import read_manifest


class ShardedRun:
    """`esper run` with two shards on the cluster that RAY_ADDRESS names."""

    def __init__(self, folder, name, *options):
        train = {"steps": 600, "batch_size": 40, "interval_steps": 10, "learning_rate": 0.01}
        config = run_config(train=train).model_dump(mode="json", exclude_defaults=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        self._folder, self._name, self._lines = folder, name, []
        self._driver = subprocess.Popen(
            [*CLI, "run", "run.yaml", "--shards", "2", "--checkpoint", f"{name}-state", "--every",
             "3", "--save", f"{name}-model", "--json", f"{name}.json", *options],
            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait_for(self, step):
        """Until this step is done; the run goes on meanwhile."""
        for line in self._driver.stdout:
            self._lines.append(line)
            if line.startswith(f"step {step} "):
                return
        pytest.fail("".join(self._lines))

    def end(self):
        """Its record; the hash of the weights; and the steps after the last loss of a shard."""
        output, _ = self._driver.communicate(timeout=200)
        lines = [*self._lines, *output.splitlines(keepends=True)]
        self.said = "".join(lines)
        assert self._driver.returncode == 0, self.said
        record = read_trial(self._folder / f"{self._name}.json")
        weights = read_manifest(self._folder / f"{self._name}-model")["tensors_sha256"]
        since = [*takewhile(lambda line: "going on from the last" not in line, reversed(lines))]
        steps = [int(line.split()[1]) for line in reversed(since) if line.startswith("step ")]
        return record, weights, steps


def with_a_shard(cluster):
    """A node of which a process is an actor that trains."""
    for node in cluster.list_all_nodes():
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children(recursive=True):
            # one may end while it is looked at
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ShardActor" in " ".join(process.cmdline()):
                    return node
    return pytest.fail("no node has a shard")


class Link:
    """The network of this machine, and one of its own at the other end of a link."""

    def __init__(self):
        number = os.getpid()
        self.name, self.near, self.far = f"esper-{number}", f"near{number}", f"far{number}"
        self._node = None
        self.here, self.there = (f"10.231.{number % 256}.{host}" for host in (1, 2))

    def make(self):
        """Whether this machine has such networks, and we the right to make them."""
        inside = ["-n", self.name]
        return all(self._ip(*command) for command in (
            ["netns", "add", self.name],
            ["link", "add", self.near, "type", "veth", "peer", "name", self.far,
             "netns", self.name],
            ["addr", "add", f"{self.here}/30", "dev", self.near],
            ["link", "set", self.near, "up"],
            [*inside, "addr", "add", f"{self.there}/30", "dev", self.far],
            [*inside, "link", "set", "lo", "up"],
            [*inside, "link", "set", self.far, "up"],
        ))  # fmt: skip

    def start_node(self, cluster):
        """A node with room for one shard at the far end, which sees no file of Ray's at this."""
        ray = Path(sys.executable).with_name("ray")
        before = len(cluster.global_state._live_node_ids())
        self._node = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "sh", "-c", 'mount -t tmpfs far "$0" && exec "$@"',
             cluster.head_node.get_temp_dir_path(), ray, "start", "--block", "--num-cpus", "1",
             "--address", cluster.address, "--node-ip-address", self.there],
            env={**os.environ, "GLOO_SOCKET_IFNAME": self.far},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        end = time.monotonic() + 60
        while len(cluster.global_state._live_node_ids()) == before:
            if time.monotonic() > end or self._node.poll() is not None:
                pytest.fail(self.remove())
            time.sleep(0.2)

    def cut(self):
        """From now on nothing arrives at either end, and nobody is told."""
        assert self._ip("-n", self.name, "link", "set", self.far, "down")

    def remove(self):
        """End what runs at the far end, and the link; what the node there said."""
        pids = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        for pid in pids.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._ip("link", "del", self.near)
        self._ip("netns", "del", self.name)
        node, self._node = self._node, None
        return "" if node is None else node.communicate()[0]

    def _ip(self, *arguments):
        done = subprocess.run(["ip", *arguments], capture_output=True, check=False)
        return not done.returncode


@pytest.fixture
def link():
    """A link to another network on this machine."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    link = Link()
    try:
        if not link.make():
            pytest.skip("needs the right to make networks")
        yield link
    finally:
        link.remove()


@pytest.mark.slow
def test_a_run_whose_node_dies_goes_on_in_the_room_that_is_left(cluster, tmp_path, monkeypatch):
    """On a spare node bit for bit; with none left, on one shard with the same decisions."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    whole, weights, steps = ShardedRun(tmp_path, "whole").end()
    assert steps == [*range(10, 601, 10)]
    assert len(whole.transitions) > 10

    run = ShardedRun(tmp_path, "moved")
    run.wait_for(90)
    cluster.remove_node(with_a_shard(cluster), allow_graceful=False)
    record, found, steps = run.end()
    assert 60 < steps[0] < 600
    assert untimed(record) == untimed(whole)
    assert found == weights

    run = ShardedRun(tmp_path, "shrunken", "--on-loss", "shrink", "--wait-s", "2")
    run.wait_for(90)
    cluster.remove_node(with_a_shard(cluster), allow_graceful=False)
    record, _, steps = run.end()
    assert steps[0] > 60
    alone = record.curves["shards"].count(1.0)
    assert record.curves["shards"] == [2.0] * (60 - alone) + [1.0] * alone
    assert alone == len(steps)
    assert [d[:5] for d in decisions(record)] == [d[:5] for d in decisions(whole)]
    assert record.curves["train_loss"] == pytest.approx(whole.curves["train_loss"], rel=0.05)


@pytest.mark.slow
def test_a_run_whose_node_is_cut_off_goes_on_elsewhere(link, tmp_path, monkeypatch):
    """No process ends: one shard waits for what never comes, and a node has to be given up."""
    # where this machine's own name leads is not known at the other end
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", link.near)
    cluster = cluster_of(1, node_ip_address=link.here)
    try:
        link.start_node(cluster)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        whole, weights, _ = ShardedRun(tmp_path, "whole").end()
        run = ShardedRun(tmp_path, "moved")
        run.wait_for(90)
        link.cut()
        cluster.add_node(num_cpus=1, node_ip_address=link.here)
        record, found, steps = run.end()
    finally:
        cluster.shutdown()
    assert f"was lost with its node {link.there}, which died or cannot be reached: " in run.said
    assert 60 < steps[0] < 600
    assert untimed(record) == untimed(whole)
    assert found == weights
