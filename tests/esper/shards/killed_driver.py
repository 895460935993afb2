"""A script: a trial whose driver is killed with SIGKILL, again and again; prints what became of it.

Its argument is JSON: `config`, `folder`, and `kills`, how many random moments, or None: before
every single thing that the writing of one checkpoint does with files. Every driver is a fork of
this process, which has no thread but its own, so that one takes no time to start.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from esper.config.run import RunConfig
from esper.evidence.records import Fingerprint
from esper.supervision import run_through
from esper.trial import Trial, TrialSpec

MARK = Fingerprint(code_hash="c", commit=None, versions={"torch": "2"}, device="cpu")


def drive(config, folder, on_interval=lambda trial: None):
    """Start or go on, to the end; the outcome is put beside the folder."""
    if (folder / "manifest.json").exists():
        trial = Trial.resume(folder)
    else:
        trial = Trial(config, TrialSpec("arm", 0, 3, 1, "registered", MARK))
    trial, record = run_through(trial, folder, every=1, on_interval=on_interval)
    outcome = {"record": json.loads(record.model_dump_json()), "digest": trial.shard.digest()}
    folder.with_suffix(".json").write_text(json.dumps(outcome))


def forked(*args):
    """The process id of a new driver."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        drive(*args)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """How a driver ended: whether it was killed."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, status
    return False


def at_random(config, folder, kills):
    """Kill so many drivers at random moments; the last one is let alone."""
    draw, killed = random.Random(0), 0
    started = time.monotonic()
    forked_first = forked(config, folder.with_name("whole"))
    assert not ended(forked_first)
    whole_s = time.monotonic() - started
    for _ in range(kills):
        pid = forked(config, folder)
        time.sleep(draw.uniform(0, whole_s / 3))
        os.kill(pid, signal.SIGKILL)
        killed += ended(pid)
    assert not ended(forked(config, folder))
    return killed


def before_everything(config, folder):
    """Kill one driver before the first thing that one checkpoint does with files, and so on."""
    assert not ended(forked(config, folder.with_name("whole")))
    places = []
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        seen = folder.with_suffix(".seen")
        seen.write_text("none")
        if not ended(forked(config, folder, plant(folder, len(places), seen))):
            return places
        places.append(seen.read_text())
        assert not ended(forked(config, folder))
        same(folder)


def plant(folder, number, seen):
    """Ends this process at an event of the interpreter that names the folder."""
    count = [-1]

    def hook(event, args):
        if count[0] < 0 or event in ("import", "os.listdir", "os.scandir"):
            return
        if args and isinstance(args[0], str | Path) and str(args[0]).startswith(f"{folder}"):
            if count[0] == number:
                count[0] = -1
                seen.write_text(f"{event} {Path(args[0]).name[:9]}")
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1

    sys.addaudithook(hook)

    def on_interval(trial):
        intervals = len(trial.curves["step"])
        # the checkpoints of the intervals before are written, and this one is under way or over
        trial.shard.settle()
        count[0] = {3: 0, 4: -1}.get(intervals, count[0])

    return on_interval


def same(folder):
    """The outcome is that of the driver that was let alone."""
    ours, theirs = (json.loads(f.with_suffix(".json").read_text())
                    for f in (folder, folder.with_name("whole")))  # fmt: skip
    for outcome in (ours, theirs):
        record = outcome["record"]
        for timed in ("started_at", "ended_at"):
            del record[timed]
        for timed in ("train_seconds", "growth_seconds"):
            del record["metrics"][timed]
        del record["curves"]["train_seconds"]
    assert json.dumps(ours) == json.dumps(theirs)
    assert len(ours["record"]["transitions"]) > 3


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    run, place = RunConfig.model_validate(asked["config"]), Path(asked["folder"])
    if asked["kills"] is None:
        print(json.dumps(before_everything(run, place)))
    else:
        print(at_random(run, place, asked["kills"]))
        same(place)
