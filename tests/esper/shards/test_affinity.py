"""What is near a GPU, as the system tells it; the process really stays there."""

import os
import threading

import pytest

from esper.shards.affinity import near, stay_near, stay_on

GPU = "0000:18:00.0"


@pytest.mark.parametrize(("node", "cpus", "found"), [
    ("1\n", "4-7,20-21,30\n", {4, 5, 6, 7, 20, 21, 30}),
    ("0\n", "0\n", {0}),
    # a machine without NUMA, or a virtual one
    ("-1\n", "0-63\n", set()),
    ("0\n", "\n", set()),
])  # fmt: skip
def test_cpus_near_a_gpu_are_those_the_system_tells(tmp_path, node, cpus, found):
    folder = tmp_path / GPU
    folder.mkdir()
    (folder / "numa_node").write_text(node)
    (folder / "local_cpulist").write_text(cpus)
    assert near(GPU, tmp_path) == found
    assert near("0000:19:00.0", tmp_path) == set()


def test_a_thread_and_those_it_starts_stay_on_the_cpus_that_it_may_use():
    mine = os.sched_getaffinity(0)
    seen = []

    def child():
        seen.append(os.sched_getaffinity(0))

    def pinned():
        # one that this machine has, and one that it has not
        seen.append(stay_on(frozenset({max(mine), 10_000})))
        inner = threading.Thread(target=child)
        inner.start()
        inner.join()

    outer = threading.Thread(target=pinned)
    outer.start()
    outer.join()
    assert seen == [{max(mine)}, {max(mine)}]
    assert stay_on(frozenset({10_000})) == set()
    assert stay_near("cpu") == set()
    assert os.sched_getaffinity(0) == mine
