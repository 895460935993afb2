"""The benchmark scripts run from end to end, say what they need, and their files render."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "kernels/benchmarks/bench_seeds.py"
MODELS = ROOT / "experiments/benchmarks/bench_models.py"
REPORT = ROOT / "kernels/benchmarks/report.py"
HEAD = {"schema", "benchmark", "command", "date", "commit", "device", "versions", "rows", "smoke"}

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def run(script: Path, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, script, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def seeds_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("seeds") / "seeds.json"
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = run(SEEDS, "--smoke", "--skip-tests", "--json", path, ESPER_COMMIT="abc", **interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture(scope="module")
def models_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "models.json"
    done = run(MODELS, "--smoke", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture
def report():
    """The module of the script, which lies in no package."""
    sys.path.insert(0, str(REPORT.parent))
    try:
        spec = importlib.util.spec_from_file_location("report", REPORT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(REPORT.parent))
    return module


def test_the_seeds_file_says_where_it_comes_from(seeds_file):
    document = json.loads(seeds_file.read_text())
    assert HEAD | {"tests", "ceilings"} <= document.keys()
    assert (document["commit"], document["smoke"]) == ("abc", True)
    assert document["tests"] == "skipped on request"


def test_every_mode_is_checked_and_timed(seeds_file):
    rows = json.loads(seeds_file.read_text())["rows"]
    assert {row["mode"] for row in rows} == {
        "forward", "backward", "isolated", "dormant", "optimizer", "span forward", "span backward",
    }  # fmt: skip
    for row in rows:
        assert row["bytes"] > 0, row
        assert row["cold_us"]["p20"] <= row["cold_us"]["p50"] <= row["cold_us"]["p80"], row
        assert row["bound"] in ("bytes", "flops", "read"), row
        assert row["floor_cold_us"] >= 0, row
        assert row["error_norm"] < 1e-4, row


def test_the_models_file_has_all_parts(models_file):
    document = json.loads(models_file.read_text())
    assert document.keys() >= HEAD
    assert {row["part"] for row in document["rows"]} == {"layers", "gpt", "call"}
    assert [row["arm"] for row in document["rows"] if row["part"] == "gpt"] == [
        "bare", "dormant", "active",
    ]  # fmt: skip


@without_gpu
def test_utilisation_that_cannot_be_had_is_no_number(models_file):
    rows = json.loads(models_file.read_text())["rows"]
    busy = {row["sm_active_pct"] for row in rows if row["part"] == "gpt"}
    assert all(value.startswith("not available: ") for value in busy)


@without_gpu
@pytest.mark.parametrize("script", [SEEDS, MODELS])
def test_without_a_gpu_nothing_is_timed(script):
    done = run(script)
    assert done.returncode == 2
    assert "a CUDA device is needed" in done.stderr


def test_an_unknown_mode_is_refused():
    done = run(SEEDS, "--only", "sideways")
    assert done.returncode == 2
    assert "--only must name some of" in done.stderr


def test_the_report_renders_both_files_into_a_page(seeds_file, models_file, tmp_path, report):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    for _ in range(2):
        done = run(REPORT, seeds_file, models_file, "--into", page)
        assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    for part in ("the times mean nothing", "### span backward", "### A GPT", "commit abc"):
        assert text.count(part) == 1, part
    # a smoke test reaches no goal
    assert "yes" not in text


def test_the_report_needs_markers_and_its_own_schema(tmp_path, report):
    with pytest.raises(ValueError, match="must hold the markers"):
        report.replaced("a page", "text")
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"schema of .* must be 1, but got 0"):
        report.read(path)


def measured(**values: object) -> dict[str, object]:
    """A row of the main case as an H200 would give it."""
    return {
        "mode": "forward", "provider": "triton", "T": 16384, "S": 1024, "C": 4, "H": 4, "D": 4096,
        "phi": "relu", "active": "all", "dtype": "bf16", "observe": True, "isolated": 0,
        "cold_us": {"p20": 79.0, "p50": 80.0, "p80": 81.0}, "bound": "bytes", "share_cold": 0.8,
        "copies_cold": 1.1, **values,
    }  # fmt: skip


def goals(report, rows) -> dict[str, list[str]]:
    lines = report.goals_table([{"rows": rows}]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cell[0]: cell[3:] for cell in cells}


def test_goals_prefer_the_replayed_time_and_judge_it(report):
    of = "forward, 1,024 active seeds, H = C, ReLU, with statistics"
    replayed = {"graph_us": {"p50": 75.0}, "share_graph": 0.93, "copies_graph": 1.0}
    assert goals(report, [measured()])[of] == ["0.800 (80.0 us)", "**no**"]
    assert goals(report, [measured(**replayed)])[of] == ["0.930 (75.0 us)", "yes"]


def test_failed_rows_and_other_cases_reach_no_goal(report):
    rows = [measured(failed="wrong result"), measured(provider="torch"), measured(T=32)]
    assert {tuple(cells) for cells in goals(report, rows).values()} == {("not measured", "")}


def test_flatness_compares_equal_bytes_only(report):
    times = {64: 70.0, 1024: 75.0, 4096: 80.0}
    rows = [
        measured(S=S, C=4096 // S, H=4096 // S, graph_us={"p50": t}, share_graph=0.9)
        for S, t in times.items()
    ]
    rows.append(measured(S=16384, C=1, H=1, D=16384, T=4096, graph_us={"p50": 100.0}))
    rows.append(measured(S=1, C=4096, H=4096, bound="flops", graph_us={"p50": 1400.0}))
    rows.append(measured(T=65536, graph_us={"p50": 300.0}))
    text, met = goals(report, rows)[
        "1 to 16,384 seeds at fixed D and H/C, forward (where bytes bind)"
    ]
    assert text.startswith("43 % apart")
    assert met == "**no**"


WRONG = """
import sys, torch
sys.path.insert(0, "kernels/benchmarks")
import bench_seeds
from cases import Case
from chunk_modes import Forward

class Wrong(Forward):
    def call(self, case, provider, inputs):
        y, stats = super().call(case, provider, inputs)()
        y = y.clone()
        y[0, 0] = torch.nan
        return lambda: (y, stats)

bench_seeds.MODES["forward"] = Wrong()
bench = bench_seeds.Bench("cpu", quick=True)
case = Case("forward", 8, 4, 4, 4, dtype="fp32")
(row,) = bench.rows([(case, ("torch",))], None, float("inf"))
assert row["failed"].startswith("wrong result"), row
assert "cold_us" not in row, row
assert bench_seeds.poisoned(lambda: torch.empty(3)).isnan().all()
"""


@without_gpu
def test_a_wrong_result_is_not_timed():
    done = subprocess.run(
        [sys.executable, "-c", WRONG], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
