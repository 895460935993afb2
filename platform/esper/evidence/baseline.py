"""A performance baseline on disk: which processes to start, what they measured, one checked file.

    <folder>/plan.json       the question: configuration, machine and code, before the first process
    <folder>/arms/*.json     one file a process, with every sample; what is there is not run again
    <folder>/facts.json      what is counted rather than timed
    <folder>/lifecycle.json  the growing runs
    <folder>/baseline.json   everything but the samples, with a hash over its content

The unit is a block: fresh processes of every implementation, in random order. In some blocks an
implementation runs twice (copies a and b): those pairs show what no difference looks like.
"""

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from queue import Queue
from typing import Literal, NamedTuple, TypeVar

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from esper import environment
from esper.config.baseline import BaselineConfig, Implementation
from esper.evidence.measure import ArmRecord, FactsRecord, Machine, Measured, Request
from esper.evidence.records import Record, write_json, write_text

R = TypeVar("R", bound=BaseModel)
SCHEMA = "esper-baseline-1"
FILE = "baseline.json"
# beyond this something hangs
PROCESS_LIMIT_S = 1800


class BaselineError(ValueError):
    """A baseline cannot be run, read or compared; the message says what to do."""


class BaselinePlan(Record):
    """The question, written down before the first process starts."""

    config: BaselineConfig
    config_hash: str
    machine: Machine
    commit: str | None = Field(description="Of the code; None outside a checkout if not given.")
    dirty_hash: str | None = Field(description="Of what differs from the commit.")
    registered_at: AwareDatetime


class LifecycleRecord(Record):
    """What the growing runs showed."""

    measured: dict[str, Measured]


class Baseline(Record):
    """A finished baseline."""

    schema_name: Literal["esper-baseline-1"] = "esper-baseline-1"
    plan: BaselinePlan
    arms: tuple[ArmRecord, ...] = Field(description="Without their samples.")
    facts: dict[str, Measured]
    lifecycle: dict[str, Measured]
    ended_at: AwareDatetime
    content_hash: str = Field(description="sha256 over all of the above.")

    def digest(self) -> str:
        """What `content_hash` must be."""
        return hashlib.sha256(self.model_dump_json(exclude={"content_hash"}).encode()).hexdigest()

    def of(self, implementation: str) -> list[ArmRecord]:
        """The processes of one implementation, by block and copy."""
        arms = [a for a in self.arms if a.implementation == implementation]
        return sorted(arms, key=lambda a: (a.block, a.copy_name))


class Place(NamedTuple):
    """One process of the plan."""

    block: int
    implementation: Implementation
    copy_name: Literal["a", "b"]
    order: int

    @property
    def name(self) -> str:
        """`<block>-<implementation>-<copy>`."""
        return f"{self.block:03d}-{self.implementation}-{self.copy_name}"


def places(config: BaselineConfig) -> list[Place]:
    """Every process in the order in which they run; the order within a block is random."""
    found = []
    for block in range(config.blocks):
        members: list[tuple[Implementation, Literal["a", "b"]]] = []
        for name in config.implementations:
            n = config.control_blocks[name]
            members.append((name, "a"))
            # spread evenly over the blocks
            if (block + 1) * n // config.blocks > block * n // config.blocks:
                members.append((name, "b"))
        random.Random(f"{config.hash}-{block}").shuffle(members)
        found += [Place(block, name, copy, i) for i, (name, copy) in enumerate(members)]
    return found


def run(
    config: BaselineConfig,
    folder: Path,
    *,
    grow: Callable[[BaselineConfig], dict[str, Measured]],
    commit: str | None = None,
    say: Callable[[str], None] = print,
) -> Baseline:
    """Measure a baseline, or go on with one that was interrupted.

    Args:
        config: What to measure.
        folder: Where; a folder that holds another question is refused and left alone.
        grow: Runs the growing runs and says what they showed.
        commit: Of the code, where there is no checkout to ask.
        say: Told one line for each block.

    Raises:
        BaselineError: If the folder holds something else, or a process failed.
    """
    plan = _planned(config, folder, commit)
    blocks = [list(b) for _, b in groupby(places(config), key=lambda p: p.block)]
    # a pair is only one if both sides ran one after the other: half a block is run again
    missing = [b for b in blocks if not all(_file(folder, p).exists() for p in b)]
    if len(missing) < len(blocks):
        say(f"{len(blocks) - len(missing)} of {len(blocks)} blocks are there already")
    started = time.monotonic()
    idle = _gpus(config)

    def measure(block: list[Place]) -> tuple[list[Place], float]:
        asked = {
            _file(folder, p): Request(
                config=config, implementation=p.implementation, block=p.block,
                copy_name=p.copy_name, order=p.order,
            )
            for p in block
        }  # fmt: skip
        began, gpu = time.monotonic(), idle.get()
        try:
            _processes(asked, config.threads, gpu)
        finally:
            idle.put(gpu)
        return block, time.monotonic() - began

    with ThreadPoolExecutor(config.gpus) as lanes:
        waiting = [lanes.submit(measure, block) for block in missing]
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                block, took_s = future.result()
                left_s = int((time.monotonic() - started) / done * (len(missing) - done))
                say(f"block {block[0].block + 1}: {', '.join(p.name for p in block)}; "
                    f"{took_s:.1f} s; {len(blocks) - len(missing) + done} of {len(blocks)} done, "
                    f"about {left_s // 60}:{left_s % 60:02d} min left")  # fmt: skip
        finally:
            # what has not begun is not begun after a failure
            lanes.shutdown(cancel_futures=True)
    if not (folder / "facts.json").exists():
        _processes({folder / "facts.json": Request(config=config, kind="facts")}, config.threads)
    if not (folder / "lifecycle.json").exists():
        write_json(folder / "lifecycle.json", LifecycleRecord(measured=grow(config)))
    return _finished(plan, folder)


def _planned(config: BaselineConfig, folder: Path, commit: str | None) -> BaselinePlan:
    """The plan in the folder if it asks the same here and now, else a new one."""
    path, machine = folder / "plan.json", Machine.here(config)
    if path.exists():
        plan = _parsed(BaselinePlan, path)
        other = [
            what
            for what, same in (
                ("configuration", plan.config_hash == config.hash),
                ("code", plan.machine.code_hash == machine.code_hash),
                ("machine or its libraries", _setting(plan.machine) == _setting(machine)),
            )
            if not same
        ]
        if other:
            raise BaselineError(
                f"{folder} must hold the same question, but holds one of another "
                f"{' and another '.join(other)}; give a new folder."
            )
        return plan
    if folder.exists() and any(folder.iterdir()):
        raise BaselineError(
            f"{folder} must be empty or hold a baseline's plan, but holds other files; "
            "give a new folder."
        )
    plan = BaselinePlan(
        config=config, config_hash=config.hash, machine=machine,
        commit=environment.commit() or commit, dirty_hash=environment.dirty_hash(),
        registered_at=datetime.now(UTC),
    )  # fmt: skip
    (folder / "arms").mkdir(parents=True, exist_ok=True)
    write_json(path, plan)
    return plan


def _setting(machine: Machine) -> dict[str, object]:
    """Everything of a machine but the code."""
    return machine.model_dump(exclude={"code_hash"})


def _file(folder: Path, place: Place) -> Path:
    return folder / "arms" / f"{place.name}.json"


def _gpus(config: BaselineConfig) -> Queue[str | None]:
    """The GPUs that blocks take turns on, as CUDA_VISIBLE_DEVICES names them; None: any device.

    Raises:
        BaselineError: If fewer are visible than the configuration asks for.
    """
    names: list[str | None] = [None]
    if config.gpus > 1:
        import torch

        listed = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
        names = [*(listed or map(str, range(torch.cuda.device_count())))][: config.gpus]
        if len(names) < config.gpus:
            raise BaselineError(
                f"gpus must be visible, but {config.gpus} are asked for and {len(names)} are; "
                "change `gpus` or CUDA_VISIBLE_DEVICES."
            )
    idle: Queue[str | None] = Queue()
    for name in names:
        idle.put(name)
    return idle


def _processes(asked: Mapping[Path, Request], threads: int, gpu: str | None = None) -> None:
    """Answer requests in fresh processes, one after the other.

    They load their libraries side by side and then wait for their turn. Each result file appears
    whole or not at all.
    """
    # kernels in their interpreter would be measured as if they were the real ones
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if gpu is not None:
        inherited |= {"CUDA_VISIBLE_DEVICES": gpu}
    running: dict[Path, subprocess.Popen[str]] = {}
    try:
        for result, request in asked.items():
            result.unlink(missing_ok=True)
            question = result.with_suffix(".request")
            write_json(question, request)
            running[result] = subprocess.Popen(
                [sys.executable, "-m", "esper.evidence.measure", str(question), str(result)],
                env=inherited | {"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        for process in running.values():
            assert process.stdout is not None
            process.stdout.readline()
        for result, process in running.items():
            _, errors = process.communicate("go\n", timeout=PROCESS_LIMIT_S)
            if process.returncode or not result.exists():
                raise BaselineError(
                    f"process {result.stem} must end well, but gave {process.returncode}; the same "
                    f"command continues once this is repaired:\n{errors.strip()[-2000:]}"
                )
    finally:
        for result, process in running.items():
            if process.poll() is None:
                process.kill()
                process.communicate()
            result.with_suffix(".request").unlink(missing_ok=True)


def _finished(plan: BaselinePlan, folder: Path) -> Baseline:
    arms = [
        _parsed(ArmRecord, folder / "arms" / f"{place.name}.json") for place in places(plan.config)
    ]
    short = [
        a.model_copy(
            update={"loops": tuple(x.model_copy(update={"samples_us": ()}) for x in a.loops)}
        )
        for a in arms
    ]
    baseline = Baseline(
        plan=plan, arms=tuple(short), facts=_parsed(FactsRecord, folder / "facts.json").facts,
        lifecycle=_parsed(LifecycleRecord, folder / "lifecycle.json").measured,
        ended_at=max(a.ended_at for a in arms), content_hash="",
    )  # fmt: skip
    baseline = baseline.model_copy(update={"content_hash": baseline.digest()})
    write_text(folder / FILE, baseline.model_dump_json() + "\n")
    return baseline


def read(path: Path) -> Baseline:
    """A finished baseline, checked.

    Args:
        path: The file, or the folder that holds it as `baseline.json`.

    Raises:
        BaselineError: If it is damaged, altered, of another kind, or its pairs are not complete.
        FileNotFoundError: If it is not there.
    """
    path = path / FILE if path.is_dir() else path
    baseline = _parsed(Baseline, path)
    if baseline.digest() != baseline.content_hash:
        raise BaselineError(
            f"{path} must be as it was written, but its content does not match its hash; "
            "measure again."
        )
    wanted, got = (
        sorted((p.block, p.implementation, p.copy_name) for p in ps)
        for ps in (places(baseline.plan.config), baseline.arms)
    )
    if wanted != got:
        lacking = len(set(wanted) - set(got))
        raise BaselineError(
            f"{path} must hold both sides of every pair, but the pairs are unequal: of "
            f"{len(wanted)} processes {lacking} are missing, {len(got)} are there; measure again."
        )
    return baseline


def _parsed(model: type[R], path: Path) -> R:
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"msg": str(error)}
        at = ".".join(map(str, first.get("loc", ())))
        raise BaselineError(
            f"{path} must be a {model.__name__} that `esper baseline` wrote, but is damaged or "
            f"something else ({at + ': ' if at else ''}{first['msg']}); measure again, or name "
            "the right file."
        ) from None
