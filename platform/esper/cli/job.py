"""What a cluster runs for `esper submit`: look at the place first, then run the esper command.

    python -m esper.cli.job --results FOLDER [--tracking-uri URI] KIND CONFIG ...

KIND is ab, arena, tune, run or baseline. Also the entry point of `configs/kuberay/rayjob.yaml`.
Exit codes are those of the command.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from socket import gethostname

from esper.config.defaults import TRACKING_URI
from esper.environment import code_hash, versions

SERVER_ADVICE = """\
A server that the cluster reaches (docs/cluster.md says where it keeps what):
  mlflow server --host ADDRESS --port 5000 --backend-store-uri sqlite:////DATA/mlflow.db \\
    --artifacts-destination DATA/artifacts --allowed-hosts ADDRESS:5000
and then: esper submit CONFIG --tracking-uri http://ADDRESS:5000
Or without a server, in the results folder: esper submit CONFIG --tracking-uri sqlite:///mlflow.db"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then run.

    Returns:
        3 if something is missing here; else the command's exit code.
    """
    given = parse(arguments)
    try:
        results = Path(given.results).expanduser()
        _require_code(given.expect)
        _require_writable(results)
        return _run(given, results)
    except ModuleNotFoundError as error:
        print(
            f"error: Python on the cluster ({sys.executable}) has no module '{error.name}'.\n"
            "Esper's libraries: on every node, make install in the checkout (ray up cluster.yaml "
            "does it), or take an image that has them.\n"
            "A library of yours: install it on every node; a folder of yours: esper submit CONFIG "
            "--with FOLDER",
            file=sys.stderr,
        )
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 3


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a job."""
    parser = argparse.ArgumentParser(prog="python -m esper.cli.job")
    parser.add_argument("--results", required=True, help="folder that all nodes see")
    parser.add_argument("--tracking-uri", help="MLflow's; none: mlflow.db in the results")
    parser.add_argument("--expect", help="sha256 of the code that must run here")
    parser.add_argument("--name", default="job", help="of this job")
    parser.add_argument("--commit", help="of the code, where there is no checkout to ask")
    parser.add_argument("kind", choices=("ab", "arena", "tune", "run", "baseline"))
    parser.add_argument("config", type=Path)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="further options of the command")
    return parser.parse_args(arguments)


def _require_code(expected: str | None) -> None:
    here = code_hash()
    if expected is not None and here != expected:
        raise RuntimeError(
            f"the cluster must run the code that was submitted (sha256 {expected[:12]}), but "
            f"imports {here[:12]} from {Path(__file__).parents[1]}; take Esper off the PYTHONPATH "
            "of the cluster's nodes and submit again."
        )


def _require_writable(results: Path) -> None:
    if not results.is_absolute():
        raise RuntimeError(f"--results must be an absolute path on the cluster, but got {results}.")
    try:
        results.mkdir(parents=True, exist_ok=True)
        (results / "submitted").mkdir(exist_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"the results folder must be writable on the cluster, but: {error}; name another: "
            "esper submit CONFIG --results FOLDER"
        ) from error


def _run(given: argparse.Namespace, results: Path) -> int:
    from esper.tracking.reach import require_reachable
    from esper_experiments.jobs import require_nodes

    uri = _settled(given.tracking_uri, results)
    if given.kind != "baseline":
        try:
            require_reachable(uri)
        except ConnectionError as error:
            raise RuntimeError(f"from {gethostname()}, {error}\n{SERVER_ADVICE}") from error
    found = versions()
    print(", ".join(f"{name} {found[name]}" for name in ("python", "torch", "ray", "mlflow")))
    print(f"code {code_hash()[:12]}, results in {results}", flush=True)
    for node in require_nodes(results):
        print(f"node {node}", flush=True)
    command = _command(given, results, uri)
    from esper.cli.main import app

    try:
        app(command)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _settled(uri: str | None, results: Path) -> str:
    """The tracking URI; a database file without an absolute path lies in the results."""
    from esper.tracking.reach import database_path

    if uri is None:
        uri = TRACKING_URI
    database = database_path(uri)
    if database is None or uri.startswith("sqlite:////"):
        return uri
    return f"sqlite:///{results / database.relative_to(Path.cwd())}"


def _command(given: argparse.Namespace, results: Path, uri: str) -> list[str]:
    """The command line, with everything it writes below `results`."""
    record = results / "submitted" / f"{given.name}.yaml"
    origin = f"# {given.name}: commit {given.commit}, code {code_hash()}\n"
    content = given.config.read_text(encoding="utf-8")
    if given.kind in ("ab", "arena", "tune"):
        content = _placed(content, str(results / "runs"), uri)
    record.write_text(origin + content, encoding="utf-8")
    if given.kind in ("ab", "tune"):
        return [given.kind, str(record), *given.rest]
    if given.kind == "arena":
        # an arena names its sweeps by paths relative to its own
        config = given.config.with_name(f"{given.config.stem}.{given.name}.yaml")
        config.write_text(origin + content, encoding="utf-8")
        return ["arena", str(config), *given.rest]
    if given.kind == "baseline":
        out = results / "baselines" / given.config.stem
        commit = ["--commit", given.commit] if given.commit else []
        return ["baseline", "run", str(given.config), "--out", str(out), *commit, *given.rest]
    question = "\0".join([content, *given.rest])
    mark = hashlib.sha256(question.encode()).hexdigest()[:12]
    return _run_command(given, results / "checkpoints" / f"{given.config.stem}-{mark}", uri)


def _run_command(given: argparse.Namespace, folder: Path, uri: str) -> list[str]:
    """`esper run`; from the checkpoint that the same command left, if there is one."""
    common = ["--tracking-uri", uri]
    named = argparse.ArgumentParser(allow_abbrev=False)
    named.add_argument("--checkpoint", default=str(folder))
    found, rest = named.parse_known_args(given.rest)
    where = found.checkpoint
    # a cluster without the libraries is told so before this is imported
    from esper.surgery.checkpoint_place import place_of

    if not place_of(where).names():
        print(f"checkpoints in {where}", flush=True)
        return ["run", str(given.config), "--checkpoint", where, *common, *rest]
    print(f"going on from the checkpoint in {where}", flush=True)
    beginning = argparse.ArgumentParser()
    beginning.add_argument("--seed")
    beginning.add_argument("--replay")
    _, rest = beginning.parse_known_args(rest)
    return ["run", "--resume", where, *common, *rest]


def _placed(text: str, output_dir: str, tracking_uri: str) -> str:
    """A sweep's, arena's or search's YAML with other places for results; the rest word for word."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096
    content = yaml.load(text)
    content["output_dir"] = output_dir
    content.setdefault("mlflow", {})["tracking_uri"] = tracking_uri
    written = StringIO()
    yaml.dump(content, written)
    return written.getvalue()


if __name__ == "__main__":
    # the shell that Ray starts passes no terminal on
    os.environ.setdefault("COLUMNS", "120")
    sys.exit(main())
