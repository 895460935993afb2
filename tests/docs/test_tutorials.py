"""Every tutorial does what it says: a page is followed as a reader would, in an empty folder.

A block with a title is a file; a `sh` block is typed into one shell; a `text` block is what the
commands before it printed, line by line, but for numbers, and for what `...` stands in place of.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs/tutorials"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
NUMBER = r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?"
MARK = "--- end of block ---"
# what a reader has running, and another test may have, too
PORTS = ("8265", "8000", "6379")
# some seconds each; `make tutorials` follows all of them, in CI on every push
QUICK = {"custom_blueprint", "grow_your_model"}
NAMES = sorted(p.stem for p in TUTORIALS.glob("*.md") if p.stem != "index")


@dataclass(frozen=True)
class Block:
    kind: str
    file: str
    text: str


def blocks_of(markdown):
    return [Block(*found) for found in FENCE.findall(markdown)]


def expected(line):
    """A pattern for one line of printed text."""
    pieces = re.split(rf"(\.\.\.|\s+|{NUMBER})", line.strip())
    return "".join(
        ".*" if p == "..." else r"\s+" if p.isspace() else NUMBER if re.match(NUMBER, p)
        else re.escape(p)
        for p in pieces if p
    )  # fmt: skip


def assert_printed(text, output, page):
    rest = output
    for line in filter(None, map(str.strip, text.splitlines())):
        found = re.search(expected(line), rest)
        assert found, f"{page} promises\n  {line}\nbut the commands printed\n{output}"
        rest = rest[found.end() :]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def apart(markdown, folder):
    """The page, with a cluster and ports that meet no other on this machine."""
    agent, client, exported, *ports = free_ports(3 + len(PORTS))
    for usual, port in zip(PORTS, ports, strict=True):
        markdown = re.sub(rf"\b{usual}\b", port, markdown)
    head = "ray start --head"
    own = (
        f"{head} --temp-dir={folder} --dashboard-agent-listen-port={agent} "
        f"--ray-client-server-port={client} --metrics-export-port={exported}"
    )
    return markdown.replace("~/esper", str(ROOT)).replace(f"{head} ", f"{own} ")


def follow(page, folder, ray_folder):
    """The page's blocks, and the output of each `sh` block, in order."""
    script = ["set -e"]
    blocks = blocks_of(apart(page.read_text(encoding="utf-8"), ray_folder))
    for i, block in enumerate(blocks):
        if block.file:
            # written when its turn comes: a later block may replace an earlier file
            (folder / f".block{i}").write_text(block.text, encoding="utf-8")
            script.append(f"cp .block{i} {block.file}")
        elif block.kind == "sh":
            script += [block.text, f"echo '{MARK}'"]
    (folder / ".page.sh").write_text("\n".join(script), encoding="utf-8")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ESPER_"))}
    metrics, statistics = free_ports(2)
    env = keep | {
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics, "RAY_SERVE_HAPROXY_STATS_PORT": statistics,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HOME": str(folder),
        "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "120",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/", "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    if page.stem == "serve":
        # it must not join a cluster that happens to run
        env["RAY_ADDRESS"] = "local"
    with (folder / ".output").open("w") as output:
        shell = subprocess.Popen(
            ["bash", ".page.sh"], cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = shell.wait(270)
        finally:
            end(shell.pid)
    printed = (folder / ".output").read_text(encoding="utf-8")
    assert code == 0, f"{page.name} ended with exit code {code}:\n{printed}"
    return blocks, printed.split(MARK)


def end(group):
    """End what a page left running: its own session's processes and their children."""
    mine = [p for p in psutil.process_iter() if in_session(p.pid, group)]
    mine += [child for p in mine for child in p.children(recursive=True)]
    for process in mine:
        process.terminate()
    for process in psutil.wait_procs(mine, timeout=10)[1]:
        process.kill()


def in_session(pid, session):
    try:
        return os.getsid(pid) == session
    except ProcessLookupError:
        return False


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NAMES]
)
def test_a_tutorial_does_what_it_says(name, tmp_path):
    page = TUTORIALS / f"{name}.md"
    # Ray's sockets lie below it, and a socket's path must be short
    with tempfile.TemporaryDirectory(prefix="esper-", dir="/tmp", ignore_cleanup_errors=True) as r:
        blocks, outputs = follow(page, tmp_path, r)
    shown = [b for b in blocks if b.kind in ("sh", "text") and not b.file]
    assert any(b.kind == "text" for b in shown), f"{page} must show what its commands print"
    commands = -1
    for block in shown:
        if block.kind == "sh":
            commands += 1
        else:
            assert_printed(block.text, outputs[commands], page.name)


@pytest.mark.parametrize(("promise", "printed"), [("WIN", "LOSE"), ("a 1\nb 2", "b 2\na 1")])
def test_what_is_not_printed_is_noticed(promise, printed):
    with pytest.raises(AssertionError, match="promises"):
        assert_printed(promise, printed, "page")
