"""Pages that are made from the code each time the site is built, so that they cannot go stale."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from model_tables import models_inside, section, summary, table
from pydantic import BaseModel

import esper
from esper.cli import main as command_line
from esper.config.arena import ArenaConfig
from esper.config.baseline import BaselineConfig
from esper.config.run import RunConfig
from esper.config.shards import ShardsConfig
from esper.config.sweep import SweepConfig
from esper.config.tune import TuneConfig
from esper.controller import CONTROLLERS, wire
from esper.monitoring.metrics import MAX_SERIES, METRICS, most_series
from esper.registry import Registry
from esper.release.flags import FlagFile
from esper.release.phases import Migration, PhaseFile
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.grafting import GRAFTS
from esper.training.hosts import HOSTS
from esper.training.tasks import TASKS
from esper_serve import api
from esper_serve.settings import ServiceSettings

# modules whose import registers more plug-ins; a run names them under `plugins`
PLUGINS = ("esper_experiments.text", "esper_experiments.shifted", "esper_experiments.peers")
FILES: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("A run", "`esper run CONFIG`; `configs/runs/`", RunConfig),
    ("A sweep", "`esper ab CONFIG`; `configs/sweeps/`", SweepConfig),
    ("An arena", "`esper arena CONFIG`; `configs/arenas/`", ArenaConfig),
    ("A search for settings", "`esper tune CONFIG`; `configs/tune/`", TuneConfig),
    ("A baseline", "`esper baseline run CONFIG`; `configs/baselines/`", BaselineConfig),
    ("Actors of a run", "`esper run --shards`, `--on-loss`, `--retries`, `--wait-s`", ShardsConfig),
    ("Flags", "`esper flags`; `configs/flags.yaml`", FlagFile),
    ("The migration", "`esper rollout`, `esper gate`; `configs/morphogenetic_migration.yaml`",
     Migration),
    ("Phases", "`configs/phases.yaml`", PhaseFile),
    ("Tamiyo's service", "`args` in `configs/serve/tamiyo.yaml`", ServiceSettings),
)  # fmt: skip
REGISTRIES: tuple[tuple[str, str, Registry[Any]], ...] = (
    ("Controllers", "`controller: {name, options}` of a run", CONTROLLERS),
    ("Tasks", "`task: {name, options}` of a run", TASKS),
    ("Hosts", "`host: {name, options}` of a run", HOSTS),
)
WIRE: tuple[type[BaseModel], ...] = (
    wire.DecideRequest, wire.DecideResponse, wire.FeedbackRequest, wire.FeedbackResponse,
    api.PolicyInfo, api.ActivateRequest, api.Failure,
)  # fmt: skip
# public packages, one page of reference each; `.` stands for the modules beside packages
PACKAGES = (
    *("config", "seeds", "surgery", "training", "controller", "shards", "evidence", "regress"),
    *("release", "tracking", "monitoring", "."),
)
BESIDE = ("esper_kernels", "esper_experiments", "esper_serve")


def all_pages(root: Path) -> dict[str, str]:
    """Path below `docs/` and Markdown of every generated page."""
    for module in PLUGINS:
        import_module(module)
    return {
        "reference/index.md": public_names(),
        "reference/cli.md": commands(),
        "reference/exit_codes.md": exit_codes(),
        "reference/configuration.md": configuration(),
        "reference/wire.md": wire_models(),
        "reference/metrics.md": metrics(),
        "results/overview.md": results(root),
        **{f"reference/modules/{name}.md": text for name, text in module_pages(root)},
    }


def homes() -> dict[str, str]:
    """Where each name of `esper` is defined."""
    return {
        name: f"{getattr(esper, name).__module__}.{getattr(esper, name).__qualname__}"
        for name in esper.__all__
        if name != "__version__"
    }


def public_names() -> str:
    """What `import esper` offers, with links to where it is documented."""
    lines = [
        "# Python", "", "What `import esper` offers; the list is made from the code. Everything",
        "else is below *Modules*, by package.", "", "| name | what it is |", "|---|---|",
    ]  # fmt: skip
    for name, home in sorted(homes().items(), key=lambda item: item[0].lower()):
        lines.append(f"| [`esper.{name}`][{home}] | {summary(getattr(esper, name))} |")
    return "\n".join(lines) + "\n"


def module_pages(root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of a page for each package: every module, from its docstrings."""
    folder = root / "platform/esper"
    for package in PACKAGES:
        where = folder if package == "." else folder / package
        files = where.glob("*.py") if package == "." else where.rglob("*.py")
        name = "esper" if package == "." else f"esper.{package}"
        title = "`esper`: other modules" if package == "." else f"`{name}`"
        yield name, _modules(title, files, root / "platform")
    for name in BESIDE:
        source = next(p.parent for p in root.glob(f"*/{name}/__init__.py")).parent
        yield name, _modules(f"`{name}`", (source / name).rglob("*.py"), source)


def _modules(title: str, files: Any, source: Path) -> str:
    lines = [f"# {title}", ""]
    for file in sorted(files):
        parts = file.relative_to(source).with_suffix("").parts
        if parts == ("esper", "__init__") or (
            parts[-1].startswith("_") and parts[-1] != "__init__"
        ):
            continue
        package = parts[-1] == "__init__"
        lines.append(f"::: {'.'.join(parts[:-1] if package else parts)}")
        if package:  # what it only passes on is told where it is defined
            lines += ["    options:", f"      members: {json.dumps(_defined(file))}"]
        lines.append("")
    return "\n".join(lines)


def _defined(file: Path) -> list[str] | bool:
    """Public functions and classes of a module; False: none."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")] or False


def commands() -> str:
    """The command line, as typer documents it."""
    made = subprocess.run(
        [sys.executable, "-m", "typer", "esper.cli.main", "utils", "docs", "--name", "esper"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return made.replace("# `esper`", "# Command line", 1)


def exit_codes() -> str:
    """The exit codes, from the docstring of the command line."""
    text = " ".join(str(command_line.__doc__).split())
    general = text[text.index("Exit codes: ") + len("Exit codes: ") :]
    first, *others = re.split(r"(?<=[a-z0-9`A-Z])\. ", general)
    rows = re.findall(r"(\d+) (.*?)(?=, \d+ |$)", first)
    codes = {code for code, _ in rows}
    if not {"0", "1", "2", "3", "4", "5", "130"} <= codes:
        raise ValueError(f"esper.cli.main must list exit codes 0 to 5 and 130, but got {codes}.")
    lines = ["# Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in rows]
    return "\n".join([*lines, "", *(f"* {o.rstrip('.')}." for o in others if o)]) + "\n"


def configuration() -> str:
    """Every key of every file of settings, and the options of every plug-in."""
    lines = [
        "# Configuration", "",
        "Every key, from the models that read the files. Unknown keys are refused, with the",
        "nearest known one. `*` marks keys that must be given.", "",
        "[Files](#files) · [Plug-ins](#plug-ins) · [Blueprints and grafts](#blueprints-and-grafts)",
        "", "## Files", "",
    ]  # fmt: skip
    told: set[type[BaseModel]] = set()
    for title, where, model in FILES:
        lines += [f"### {title}", "", f"{where}. {summary(model)}", "", *table(model), ""]
        told.add(model)
    for inner in models_inside([model for _, _, model in FILES]):
        if inner not in told:
            lines += section(inner)
            told.add(inner)
    lines += ["## Plug-ins", ""]
    for title, where, registry in REGISTRIES:
        lines += [f"### {title}", "", f"{where}: one of the names below.", ""]
        for name in registry:
            lines += [f"#### {title[:-1]} `{name}`", "", summary(registry[name]), ""]
            if (home := registry[name].__module__).startswith("esper_experiments"):
                lines += [f"With `plugins: [{_plugin(home)}]`.", ""]
            lines += [*table(registry[name]), ""]
        for inner in models_inside([registry[name] for name in registry]):
            if inner not in told:
                lines += section(inner)
                told.add(inner)
    lines += ["## Blueprints and grafts", "", "Blueprints, and what they are for:", ""]
    lines += ["| blueprint | sites | share of a chunk seed's hidden units |", "|---|---|---|"]
    for name in BLUEPRINTS:
        one = BLUEPRINTS[name]
        lines.append(f"| `{name}` | {', '.join(sorted(one.geometries))} | {one.hidden_frac:g} |")
    lines += ["", "Graft strategies: " + ", ".join(f"`{name}`" for name in GRAFTS) + "."]
    return "\n".join(lines) + "\n"


def wire_models() -> str:
    """Bodies of Tamiyo's service."""
    lines = [
        "# Wire models", "", "Bodies of requests and answers of Tamiyo's service, as JSON or",
        "MessagePack; [the service](../serve.md) says which route takes which.", "",
    ]  # fmt: skip
    for model in [*WIRE, *(m for m in models_inside(WIRE) if m not in WIRE)]:
        lines += section(model, level=2)
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """Every metric."""
    lines = [
        "# Metrics", "",
        f"At most {most_series():,} series together, of {MAX_SERIES:,} allowed. Where to scrape",
        "them, dashboards and alerts: [Monitoring](../monitoring.md).", "",
        "| name | kind | labels | what it tells |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| `{m.name}` | {m.kind} | {', '.join(m.labels)} | {m.help} |" for m in METRICS.values()
    ]
    return "\n".join(lines) + "\n"


def results(root: Path) -> str:
    """Every stored result, with the command that made it and its date."""
    lines = [
        "---", "hide: [toc]", "---", "# All results", "",
        "Made from the files that the commands wrote. The date is the one in the file, else that",
        "of the commit that was measured, else of the file's last change; `?` where git does not",
        "tell. The commit is the code that ran.", "",
        "## Verdicts", "",
        "| result | verdict | question | command | date, commit |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    told = (root / "docs/results/README.md").read_text(encoding="utf-8")
    for path in sorted((root / "docs/results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        commit, name = result["commit"] or "", path.stem
        if "arena" in result:
            command = f"esper arena configs/arenas/{result['arena']}.yaml"
            verdict = "a verdict for each task and method"
            asked = f"{result['treatment']} against {', '.join(result['controls'])}"
            pairs = ", ".join(sorted({str(t["pairs"]) for t in result["tasks"].values()}))
        else:
            command = f"esper ab {_sweep_of(root, name)}"
            verdict = f"**{result['verdict']}** ({result['mean_difference']:+.4g})"
            asked = f"`{result['metric']}` of {result['treatment']} against {result['control']}"
            pairs = str(result["pairs"])
        shown = f"[{name}](README.md#{name})" if f"\n## {name}\n" in told else name
        date = str(result.get("registered_at") or _date(root, path, commit))[:10]
        lines.append(
            f"| {shown} | {verdict} | {asked}, {pairs} pairs | `{command}` "
            f"| {_when(date, commit)} |"
        )
    lines += ["", "## Measurements", "", "| what | command | date, commit |", "|---|---|---|"]
    lines += [_measured(root, path) for path in sorted((root / "docs").glob("b*/**/*.json"))
              if path.stem not in ("measured", "regress")]  # fmt: skip
    suite = json.loads((root / "docs/regression/cpu.json").read_text(encoding="utf-8"))
    failed = sum(1 for check in suite["checks"] if check["problems"])
    lines.append(
        f"| regression suite: {len(suite['checks'])} checks, {failed} failed | `esper regress` "
        f"| {suite['ended_at'][:10]}, {suite['commit'][:7]} |"
    )
    return "\n".join(lines) + "\n"


def _measured(root: Path, path: Path) -> str:
    stored = json.loads(path.read_text(encoding="utf-8"))
    where = path.relative_to(root / "docs").with_suffix("").as_posix()
    if path.name == "baseline.json":
        name = path.parent.name
        measured = json.loads((path.parent / "measured.json").read_text(encoding="utf-8"))
        commit = measured["commit"]
        command = f"esper baseline run configs/baselines/{name}.yaml --out OUT"
        return (f"| [{name}](../baselines/{name}/report.md) | `{command}` "
                f"| {stored['ended_at'][:10]}, {commit[:7]} |")  # fmt: skip
    command = stored.get("command") or COMMANDS.get(path.stem)
    if command is None:
        raise ValueError(f"{path} must say its command, but does not; add it to COMMANDS.")
    commit = str(stored.get("commit", ""))
    date = str(stored.get("date") or _date(root, path, commit))[:10]
    return f"| {where} | `{command}` | {_when(date, commit)} |"


COMMANDS = {
    "checkpoints_cpu": "python experiments/benchmarks/bench_checkpoints.py",
    "scale_cpu": "python experiments/benchmarks/scale.py --out docs/benchmarks/scale_cpu.json",
    "serve_cpu": "python serve_apps/benchmarks/load.py",
    "shards_cpu": "python experiments/benchmarks/bench_shards.py --only scaling",
    "shards_h200": "python experiments/benchmarks/bench_shards.py",
    "tune_cpu": "python experiments/benchmarks/bench_tune.py",
}


def _sweep_of(root: Path, name: str) -> str:
    for folder in ("sweeps", "policies"):
        if (root / f"configs/{folder}/{name}.yaml").is_file():
            return f"configs/{folder}/{name}.yaml"
    raise ValueError(f"docs/results/{name}.json must belong to a sweep, but there is none.")


def _when(date: str, commit: str) -> str:
    return f"{date}, {commit[:7]}" if commit else f"{date}, commit not stored"


def _date(root: Path, path: Path, commit: str) -> str:
    """Day of a commit, else of a file's last change; `?` where git knows neither."""
    git = ["git", "-C", str(root)]
    shallow = [*git, "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, capture_output=True, text=True).stdout.strip() != "false":
        return "?"
    for asked in ([commit] if commit else []), ["HEAD", "--", str(path)]:
        command = [*git, "log", "-1", "--format=%as", *asked]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if asked and found:
            return found
    return "?"


def _plugin(module: str) -> str:
    return next(p for p in PLUGINS if module.startswith(p))
