"""`esper tune`: searches, shows the best candidates, and tests the best one in fresh pairs."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from esper.cli.ab import SweepProgress, show, to_json
from esper.cli.codes import UNHEALTHY
from esper.cli.output import write_result
from esper.config.tune import TUNED, TuneConfig, load_tune, shown

if TYPE_CHECKING:
    from esper_experiments.tuning import Found

SHOWN = 3


def run_tune(config: Path, search_only: bool, json_file: Path | None) -> int:
    """Search, and test what was found.

    Returns:
        The exit code.
    """
    console = Console()
    search = load_tune(config)
    console.print(
        f"{search.search} search over {len(search.space)} settings, budget "
        f"{search.budget_runs} runs; checking the ends of every range ..."
    )
    from esper_experiments.sweep import run_sweep
    from esper_experiments.tuning import log_candidates, run_search

    found = run_search(search)
    sweep = search.confirmation(found.candidates[found.best].values)
    run_yaml, sweep_yaml = (found.folder / name for name in ("best.yaml", "confirm.yaml"))
    # what `esper run` and `esper ab` take
    best_run = search.candidate(found.candidates[found.best].values)
    _write_yaml(run_yaml, best_run.model_dump(mode="json", exclude_unset=True))
    _write_yaml(sweep_yaml, sweep.model_dump(mode="json", exclude_unset=True))
    _show_best(console, search, found)
    log_candidates(search, found)
    console.print(f"its run: {run_yaml}", soft_wrap=True)
    console.print(f"its test: {sweep_yaml}", soft_wrap=True)
    result: dict[str, Any] = {
        "search": search.name,
        "config_hash": search.config_hash,
        "metric": search.metric,
        "used_steps": found.used_steps,
        "best": found.best,
        "candidates": {name: asdict(c) for name, c in found.candidates.items()},
        "confirmation": None,
    }
    code = 0
    if search_only:
        console.print(f"no evidence yet; esper ab {sweep_yaml} tests it", soft_wrap=True)
    else:
        console.print(
            f"testing it against the run as it is: {sweep.pairs} pairs on seeds from "
            f"{sweep.first_seed}, none of which the search saw"
        )
        watcher = SweepProgress(console, sweep)
        with watcher:
            tested = run_sweep(sweep, watcher, command=f"esper ab {sweep_yaml}")
        show(console, sweep, tested)
        result["confirmation"] = to_json(tested)
        code = UNHEALTHY if tested.verdicts[0].verdict == "UNHEALTHY" else 0
    if json_file is not None:
        write_result(json_file, result)
        console.print(f"JSON: {json_file}")
    return code


def _show_best(console: Console, search: TuneConfig, found: "Found") -> None:
    ended = [(name, c) for name, c in found.candidates.items() if c.ended]
    whole = [(name, c.value) for name, c in ended if c.value is not None]
    whole.sort(key=lambda item: item[1], reverse=search.higher_is_better)
    console.print(
        f"{len(found.candidates)} candidates, {len(ended)} ran to their end, "
        f"{len(ended) - len(whole)} of them collapsed; {found.used_steps:,} of "
        f"{search.budget_steps:,} steps"
    )
    table = Table(box=SIMPLE_HEAD)
    for head in (TUNED, search.metric, "settings"):
        table.add_column(head, no_wrap=True)
    for name, value in whole[:SHOWN]:
        settings = found.candidates[name].values.items()
        table.add_row(name, f"{value:.4g}", "\n".join(shown({k: v}) for k, v in settings))
    console.print(table)
    if len(changes := found.candidates[found.best].changes) > 1:
        console.print("the best one changed on its way; its run has its last settings alone:")
        for step, values in changes:
            console.print(f"    from step {step}: {shown(values)}")


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
