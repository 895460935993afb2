"""Did a branch change what training gives? A paired A/B of two commits on a tiny task.

    python experiments/benchmarks/ab_commits.py origin/main HEAD --out build/ab

Each pair is one random seed, run once with each commit's code in a fresh process, in random order.
The question is registered before the first run; the records are judged by the rule of `esper ab`.
Evidence, `verdict.json` and `verdict.md` are written to the folder. Exit code 0: WIN, EQUIVALENT or
INCONCLUSIVE; 1: LOSE; 5: UNHEALTHY.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from commits import ROOT, Checkout, checkouts

from esper.config.base import content_hash
from esper.config.sweep import Guardrail, Question
from esper.environment import fingerprint
from esper.evidence.records import (
    REGISTRATION,
    Fingerprint,
    Registration,
    TrialRecord,
    write_json,
    write_text,
)
from esper.evidence.reference import TRIAL_REQUESTS, median_ms, reference_s
from esper.evidence.verdict import Verdict, judge_all

RUN = "configs/runs/branch_ab.yaml"
QUESTION = Question(
    treatment="branch", control="base", metric="test_loss", higher_is_better=False, margin=0.03,
    guardrails=(
        Guardrail(metric="train_seconds", margin=0.10, relative=True),
        Guardrail(metric="train_flops", margin=0.02, relative=True),
        Guardrail(metric="parameters", margin=0.02, relative=True),
    ),
)  # fmt: skip
SCRIPT = "from esper_experiments.entry import main; main()"
EXIT_CODES = {"WIN": 0, "EQUIVALENT": 0, "INCONCLUSIVE": 0, "LOSE": 1, "UNHEALTHY": 5}


def main() -> None:
    """Run the pairs, judge, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("branch", nargs="?", default="HEAD")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out must be a new folder, but {options.out} is there")
    with checkouts(options.base, options.branch) as (base, branch):
        verdict = run(base, branch, options.pairs, options.out)
        text = markdown(verdict, base, branch)
    write_text(options.out / "verdict.md", text)
    print(text)
    sys.exit(EXIT_CODES[verdict.verdict])


def run(base: Checkout, branch: Checkout, pairs: int, out: Path) -> Verdict:
    """Register, run every pair, and judge."""
    # as the trials have, beside which the machine's speed is measured
    torch.set_num_threads(1)
    arms = {"branch": branch, "base": base}
    codes = {name: arm.code_hash() for name, arm in arms.items()}
    configs = {name: run_of(arm) for name, arm in arms.items()}
    registration = register(codes, configs, branch.commit, pairs)
    write_json(out / REGISTRATION, registration)
    print(f"registered {registration.registration_hash[:16]}; {pairs} pairs", flush=True)
    records = []
    for pair in range(pairs):
        rng = np.random.default_rng([int(registration.registration_hash[:8], 16), pair])
        for order, name in enumerate(rng.permutation(list(arms)).tolist()):
            before = reference_s("cpu", TRIAL_REQUESTS)
            raw = trial(arms[name], name, configs[name], pair, out)
            speed = median_ms([*before, *reference_s("cpu", TRIAL_REQUESTS)])
            record = adopted(raw, registration, name, pair, order, codes[name])
            records.append(record.model_copy(update={"reference_ms": speed}))
            write_json(out / "trials" / f"{name}-{pair:03d}.json", records[-1])
        values = {r.arm: r.metrics[QUESTION.metric] for r in records[-2:]}
        print(f"pair {pair}: {values}", flush=True)
    (verdict,) = judge_all(records, registration)
    write_json(out / "verdict.json", verdict)
    return verdict


def run_of(arm: Checkout) -> Path:
    """The run's configuration: the commit's own, or this one's where it has none yet."""
    own = arm.folder / RUN
    return own if own.exists() else ROOT / RUN


def register(
    codes: dict[str, str], configs: dict[str, Path], commit: str, pairs: int
) -> Registration:
    """The question; the two states of the code and of the configuration are part of its hash."""
    content = {name: [codes[name], configs[name].read_text("utf-8")] for name in codes}
    # the code that the sweep runs is that of both arms together
    mark = Fingerprint(**fingerprint("cpu")).model_copy(
        update={"code_hash": "+".join(codes.values()), "commit": commit}
    )
    draft = Registration(
        sweep="branch-ab",
        config_hash=content_hash(content),
        question=QUESTION, pairs=pairs, arms=list(codes), fingerprint=mark,
        registered_at=datetime.now(UTC), registration_hash="",
    )  # fmt: skip
    return draft.model_copy(update={"registration_hash": draft.digest()})


def trial(arm: Checkout, name: str, config: Path, pair: int, out: Path) -> dict[str, object]:
    """One run in a fresh process: its record as that commit writes it."""
    file = (out / "raw" / f"{name}-{pair:03d}.json").resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    arm.python(
        "-c", SCRIPT, "run", str(config), "--seed", str(pair), "--json", str(file),
        "--tracking-uri", f"sqlite:///{file.parent}/mlflow.db",
    )  # fmt: skip
    return json.loads(file.read_text("utf-8"))


def adopted(
    raw: dict[str, object],
    registration: Registration,
    arm: str,
    pair: int,
    order: int,
    code_hash: str,
) -> TrialRecord:
    """What a commit recorded, as a record of this question.

    Raises:
        RuntimeError: If the process ran other code than its commit's.
    """
    mark = Fingerprint.model_validate(raw["fingerprint"])
    if mark.code_hash != code_hash:
        raise RuntimeError(
            f"{arm}-{pair:03d} must run the code {code_hash[:12]}, but ran {mark.code_hash[:12]}."
        )
    kept = ("started_at", "ended_at", "status", "collapse_reason", "metrics", "curves", "seed")
    return TrialRecord.model_validate(
        {name: raw[name] for name in kept}
        | {
            "trial_id": f"{arm}-{pair:03d}", "arm": arm, "pair": pair, "order": order,
            "registration_hash": registration.registration_hash,
            "fingerprint": mark.model_copy(
                update={"code_hash": registration.fingerprint.code_hash}
            ),
            "transitions": [], "sites": {},
        }
    )  # fmt: skip


def markdown(verdict: Verdict, base: Checkout, branch: Checkout) -> str:
    """The verdict for a reader of the pull request."""
    lines = [
        f"### {verdict.verdict}: `{branch.commit[:12]}` against `{base.commit[:12]}`",
        "",
        verdict.rule,
        "",
        f"{verdict.pairs} pairs of `{RUN}`, {verdict.missing} runs missing; `{verdict.metric}`, "
        f"margin {verdict.margin:g}.",
        "",
        *(f"- {reason}" for reason in verdict.reasons),
    ]
    if verdict.guardrails:
        lines += ["", "| guardrail | mean difference (positive: better) | margin | |",
                  "|---|---|---|---|"]  # fmt: skip
        for g in verdict.guardrails:
            state = "passed" if g.passed else "FAILED" if g.failed else "undecided"
            lines.append(f"| `{g.metric}` | {g.mean_difference:+.4g} | {g.margin:.4g} | {state} |")
    lines += ["", f"Registered as `{verdict.registration_hash[:16]}` before the first run."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
