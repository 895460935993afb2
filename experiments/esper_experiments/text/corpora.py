"""Two corpora in one alphabet: Shakespeare's plays, and the sources of Python's own library."""

import hashlib
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

# printable ASCII and the line break; other characters are left out
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# modules of one file each that every supported Python has, so that equal versions give equal text
PYTHON_MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser", "contextlib", "copy",
    "csv", "dataclasses", "difflib", "dis", "doctest", "enum", "fileinput", "fractions", "ftplib",
    "functools", "gettext", "gzip", "heapq", "imaplib", "inspect", "ipaddress", "locale",
    "mailbox", "mimetypes", "optparse", "os", "pdb", "pickle", "pickletools", "platform",
    "plistlib", "poplib", "posixpath", "pprint", "pstats", "pyclbr", "random", "sched",
    "selectors", "shelve", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics",
    "string", "subprocess", "symtable", "tarfile", "tempfile", "textwrap", "threading", "timeit",
    "tokenize", "trace", "traceback", "types", "typing", "uuid", "warnings", "wave", "weakref",
)  # fmt: skip


def read_python() -> str:
    """The sources of `PYTHON_MODULES`, in that order.

    Raises:
        ValueError: If this Python comes without the source of one.
    """
    folder = Path(json.__file__).parents[1]
    files = [folder / f"{module}.py" for module in PYTHON_MODULES]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"corpus 'python' must find the standard library's sources in {folder}, but "
            f"{', '.join(missing)} is not there; use a Python that ships them."
        )
    return "".join(file.read_text(encoding="utf-8") for file in files)


def read_shakespeare(path: Path | None) -> str:
    """The file known as tinyshakespeare, 1.1 MB.

    Args:
        path: Where it lies; None: in the user's cache folder, into which it is downloaded once.

    Raises:
        ValueError: If it is not there and cannot be downloaded, or is another file.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    file = path or cache / "esper" / "tinyshakespeare.txt"
    if path is None and not file.is_file():
        _download(file)
    if not file.is_file():
        raise ValueError(f"path must name a file, but {file} is none.")
    text = file.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{file} must be tinyshakespeare (sha256 {SHAKESPEARE_SHA256[:16]}), but has "
            f"{digest[:16]}; remove it, or name the right file as `path`."
        )
    return text.decode("ascii")


def _download(file: Path) -> None:
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as reply:
            text = reply.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise ValueError(
            f"tinyshakespeare must be downloadable from {SHAKESPEARE_URL}, but: {error}; put the "
            f"file at {file}, or name it as task.options.path."
        ) from error
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(text)
    part.replace(file)
