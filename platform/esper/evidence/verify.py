"""A finished sweep on disk, judged again: does every stored verdict follow from its records?

A sweep's folder holds `registration.json` and `config.json`, written before the first trial,
`trials/`, `verdicts/`, and `SHA256SUMS`, written last, which `sha256sum --check` reads too. Reading
them needs neither the code that ran the trials nor Ray or MLflow. A verdict shows an edit of every
number that it rests on; the checksums show an edit of all others.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from esper.config.base import ConfigError, content_hash
from esper.config.sweep import Comparison, Question, SweepConfig
from esper.evidence.records import REGISTRATION, Record, Registration, TrialRecord, write_text
from esper.evidence.search import search_records
from esper.evidence.verdict import Verdict, judge_all, looks_of

CONFIG, SEAL = "config.json", "SHA256SUMS"
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Verification:
    """What judging a stored sweep again found.

    Attributes:
        folder: Of the sweep.
        registration: As stored; None if it cannot be read.
        records: The trials that were read, and what searches made of them.
        verdicts: Judged again, the primary one first; empty if nothing could be judged.
        sealed: Whether the folder has checksums, so that an edit of any file is seen.
        findings: What differs, is missing or does not belong here, as sentences; none: verified.
    """

    folder: Path
    registration: Registration | None
    records: tuple[TrialRecord, ...]
    verdicts: tuple[Verdict, ...]
    sealed: bool
    findings: tuple[str, ...]


def store_config(sweep: SweepConfig, folder: Path) -> None:
    """Write down what the registration's `config_hash` is of."""
    write_text(folder / CONFIG, json.dumps(sweep.content, indent=1, sort_keys=True))


def seal(folder: Path) -> None:
    """Write the checksums of all evidence; the last step of a sweep."""
    lines = [f"{_digest(path)}  {path.relative_to(folder)}\n" for path in _evidence(folder)]
    write_text(folder / SEAL, "".join(lines))


def find_sweep(name: str, runs: Path) -> Path:
    """The folder of a sweep from its path, its name or the start of its registration's hash.

    Args:
        name: A path, the name of a folder in `runs`, or at least 8 digits of a hash.
        runs: Folder of the sweeps.

    Raises:
        FileNotFoundError: If there is none.
        ConfigError: If there are several.
    """
    for folder in (Path(name), runs / name):
        if folder.is_dir():
            return folder
    found = [
        path.parent
        for path in sorted(runs.glob(f"*/{REGISTRATION}"))
        if len(name) >= 8 and f'"registration_hash":"{name}' in "".join(path.read_text().split())
    ]
    if len(found) > 1:
        names = ", ".join(str(folder) for folder in found)
        raise ConfigError(name, (f"it must be of one sweep, but {names} have it; give a folder.",))
    if not found:
        raise FileNotFoundError(
            f"'{name}' must be a sweep's folder, its name in '{runs}', or 8 or more digits of its "
            "registration's hash, but there is none; set --runs."
        )
    return found[0]


def verify(folder: Path, sweep: SweepConfig | None = None) -> Verification:
    """Judge a stored sweep again and compare every verdict bit for bit.

    Args:
        folder: Of a finished sweep.
        sweep: The configuration of a sweep that was stored before configurations and checksums
            were; its hash must be the registered one.

    Raises:
        ConfigError: If the folder has no configuration and none is given, or one too many.
    """
    _require_one_config(folder, sweep)
    findings = list(_unsealed(folder)) if sweep is None else []
    config = _stored_config(folder, findings) if sweep is None else (sweep, sweep.config_hash)
    registration = _read(folder / REGISTRATION, Registration, findings)
    ran = []
    for path in sorted((folder / "trials").glob("*.json")):
        record = _read(path, TrialRecord, findings)
        if record is not None and record.trial_id != path.stem:
            findings.append(f"trials/{path.name} is the record of '{record.trial_id}'.")
        if record is not None:
            ran.append(record)
    ran.sort(key=lambda r: (r.arm, r.pair))
    records, verdicts = ran, list[Verdict]()
    if registration is not None and config is not None:
        sweep, config_hash = config
        differing: list[str] = []
        try:
            records = [*ran, *search_records(ran, sweep.searches)]
            verdicts = judge_all(
                records,
                registration,
                dependent_arms=sweep.dependent_arms,
                salted_arms=sweep.salted_arms,
            )
        except (KeyError, ValueError) as error:
            differing.append(f"the records cannot be judged: {_short(error)}.")
        else:
            differing += _unequal(folder, registration.question, verdicts)
        findings += _registered(
            registration, sweep, config_hash, ran, _pairs_run(registration, verdicts)
        )
        findings += differing
    return Verification(
        folder=folder,
        registration=registration,
        records=tuple(records),
        verdicts=tuple(verdicts),
        sealed=(folder / SEAL).exists(),
        findings=tuple(findings),
    )


def _require_one_config(folder: Path, given: SweepConfig | None) -> None:
    stored = (folder / CONFIG).exists() or (folder / SEAL).exists()
    if stored and given is not None:
        raise ConfigError(
            str(folder), ("it must be judged by its own configuration; leave out --config.",)
        )
    unfinished = not (folder / SEAL).exists() and not any((folder / "verdicts").glob("*.json"))
    if stored and unfinished:
        raise ConfigError(
            str(folder), ("it must be finished; the same esper ab CONFIG continues it.",)
        )
    if not stored and given is None:
        raise ConfigError(str(folder), (
            f"it must hold {CONFIG} and {SEAL}, as a finished sweep does, but holds neither; "
            "finish the sweep, or give --config for one that was stored before these files were.",
        ))  # fmt: skip


def _stored_config(folder: Path, findings: list[str]) -> tuple[SweepConfig, str] | None:
    """The sweep's configuration and the hash of its text; None with a finding."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return SweepConfig.model_validate(content), content_hash(content)
    except (OSError, ValueError) as error:
        findings.append(f"{CONFIG} cannot be read, so nothing can be judged: {_short(error)}.")
        return None


def _read(path: Path, kind: type[R], findings: list[str]) -> R | None:
    """A record, or None with a finding if it is damaged or missing."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        findings.append(f"{path.name} cannot be read: {_short(error)}.")
        return None


def _short(error: Exception) -> str:
    lines = str(error.strerror if isinstance(error, OSError) else error).splitlines()
    return "; ".join(line.strip() for line in lines[:3]).rstrip(".:")


def _evidence(folder: Path) -> list[Path]:
    """All files that a verdict rests on, and the verdicts."""
    parts = [folder / CONFIG, folder / REGISTRATION]
    return parts + [p for d in ("trials", "verdicts") for p in sorted((folder / d).glob("*.json"))]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unsealed(folder: Path) -> Iterator[str]:
    """Files that are not as they were when the sweep was finished."""
    try:
        lines = (folder / SEAL).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        yield f"{SEAL} cannot be read, so that edits go unseen: {_short(error)}."
        return
    for name, digest in sums.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing."
        elif _digest(path) != digest:
            yield f"{name} was edited: its sha256 is not the stored one."
    for path in _evidence(folder):
        name = str(path.relative_to(folder))
        if name not in sums:
            yield f"{name} was not there when the sweep was finished."


def _registered(
    registration: Registration,
    sweep: SweepConfig,
    config_hash: str,
    ran: list[TrialRecord],
    pairs: int,
) -> Iterator[str]:
    """Whether registration, configuration and the records of the first pairs belong together."""
    stated = registration.registration_hash
    expected = registration.digest()
    if stated != expected:
        yield f"{REGISTRATION} was altered: it states {stated[:16]}, but has {expected[:16]}."
    if config_hash != registration.config_hash:
        yield (
            f"the configuration's sha256 is {config_hash[:16]}, "
            f"but {registration.config_hash[:16]} was registered."
        )
    present = {(r.arm, r.pair) for r in ran}
    for arm in sweep.arms:
        for pair in range(pairs):
            if (arm, pair) not in present:
                yield f"trials/{arm}-{pair:03d}.json is missing: no record of a registered run."
    # a test that looks after every pair decides while later pairs run
    anytime = registration.question.test == "e_process"
    for record in ran:
        if pairs <= record.pair < registration.pairs and not anytime:
            yield f"trials/{record.trial_id}.json is of a pair after the look that decided."
        if record.registration_hash != stated:
            yield (
                f"trials/{record.trial_id}.json is of another registration: "
                f"{record.registration_hash[:16]}, not {stated[:16]}."
            )


def _pairs_run(registration: Registration, verdicts: Sequence[Verdict]) -> int:
    """Pairs until the look that decided; all where nothing could be judged."""
    look = verdicts[0].look if verdicts else None
    return registration.pairs if look is None else looks_of(registration)[look - 1].pairs


def _unequal(folder: Path, question: Question, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """How the stored verdicts differ from those that were judged again."""
    expected = {
        verdict_name(comparison, question): verdict
        for comparison, verdict in zip(question.comparisons, verdicts, strict=True)
    }
    for name, verdict in expected.items():
        yield from _differences(folder / "verdicts" / name, verdict)
    for path in sorted((folder / "verdicts").glob("*.json")):
        if path.name not in expected:
            yield f"verdicts/{path.name} is of no registered comparison."


def verdict_name(comparison: Comparison, question: Question) -> str:
    """Name of the file that holds a comparison's verdict."""
    metric = question.goal_of(comparison).metric
    own = "" if metric == question.metric else f"-on-{metric}"
    return f"{comparison.treatment}-vs-{comparison.control}{own}.json"


def _differences(path: Path, again: Verdict) -> Iterator[str]:
    name = f"verdicts/{path.name}"
    text = again.model_dump_json(indent=1)
    try:
        stored = path.read_text(encoding="utf-8")
        if stored == text:
            return
        old = json.loads(stored)
    except (OSError, ValueError) as error:
        yield f"{name} cannot be read: {_short(error)}."
        return
    pairs = list(_leaves(old, json.loads(text)))
    for where, before, after in pairs:
        yield f"{name}: {where} is stored as {before}, but the records give {after}."
    if not pairs:
        yield f"{name}: the values are those that the records give, but the text is not."


def _leaves(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, str, str]]:
    """Every place where two JSON values differ, also in the sign of a zero."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            at = f"{where}.{key}" if where else key
            yield from _leaves(old.get(key, _Absent), new.get(key, _Absent), at)
    elif isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(zip_longest(old, new, fillvalue=_Absent)):
            yield from _leaves(a, b, f"{where}[{i}]")
    elif _shown(old) != _shown(new):
        yield where, _shown(old), _shown(new)


class _Absent:
    """Marks a value that one side does not have; None is a value."""


def _shown(value: Any) -> str:
    return "nothing" if value is _Absent else json.dumps(value)
