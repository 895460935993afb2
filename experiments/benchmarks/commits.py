"""Two commits of this repository side by side: a checkout of each, and processes that run in it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("platform", "kernels", "experiments", "serve_apps")


def git(*arguments: str) -> str:
    """What git prints, in the repository of this file."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@dataclass(frozen=True)
class Checkout:
    """A commit's files.

    Attributes:
        commit: Its full hash.
        folder: Where they are.
    """

    commit: str
    folder: Path

    def environment(self) -> dict[str, str]:
        """Of a process in which `import esper` is this commit's."""
        path = os.pathsep.join(str(self.folder / name) for name in PACKAGES)
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def python(self, *arguments: str, timeout_s: float = 900) -> None:
        """Run Python on this commit's code and wait.

        Raises:
            RuntimeError: With the end of what the process said, if it failed.
        """
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(
                f"commit {self.commit[:12]} must run {' '.join(arguments[:4])} ..., but it ended "
                f"with {done.returncode}:\n{done.stdout.strip()[-2000:]}"
            )

    def code_hash(self) -> str:
        """sha256 of its packages' sources, as its own `esper.environment` gives it."""
        script = "import esper.environment as e; print(e.__file__); print(e.code_hash())"
        said = subprocess.run(
            [sys.executable, "-c", script], env=self.environment(), check=True, text=True,
            capture_output=True, cwd=self.folder,
        ).stdout.split()  # fmt: skip
        if not Path(said[0]).is_relative_to(self.folder):
            raise RuntimeError(
                f"commit {self.commit[:12]} must run its own code, but imports {said[0]}."
            )
        return said[1]


@contextmanager
def checkouts(*revisions: str) -> Iterator[list[Checkout]]:
    """Temporary work trees of some commits; they are removed at the end."""
    commits = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in revisions]
    with tempfile.TemporaryDirectory(prefix="esper-commits-") as folder:
        # git's work trees have no symbolic links in their path
        root = Path(folder).resolve()
        found = [Checkout(commit, root / f"{i}") for i, commit in enumerate(commits)]
        try:
            for one in found:
                git("worktree", "add", "--quiet", "--detach", str(one.folder), one.commit)
            yield found
        finally:
            for one in found:
                if one.folder.exists():
                    git("worktree", "remove", "--force", str(one.folder))
