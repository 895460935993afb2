"""What commands say besides their result, the files of `--json`, and a reader that went away."""

import io
import json
import os
import select
import sys
from pathlib import Path
from typing import TextIO


def begin(text: str) -> None:
    """Say what happens while libraries load, which takes seconds; results alone go to stdout."""
    print(f"{text} ...", file=sys.stderr, flush=True)


def write_result(path: Path, content: object) -> None:
    """Write what `--json` asks for.

    Args:
        path: The file; its folder is made if need be.
        content: Plain data.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def say(line: str) -> None:
    """Print a line; what runs goes on when nobody reads any more, as in `esper ab ... | head`."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        is_unread()


def is_unread() -> bool:
    """Whether the reader of this process's output went away; what follows then goes nowhere.

    Raises:
        OSError: If the output cannot be written for another reason, such as a full disk.
    """
    # a stream is None if the process was started without it
    unread = [_is_unread(stream) for stream in (sys.stdout, sys.stderr) if stream is not None]
    return any(unread)


def _is_unread(stream: TextIO) -> bool:
    try:
        stream.flush()
        if not _is_broken(stream):
            return False
    except BrokenPipeError:
        pass
    except OSError:
        _hush(stream)
        raise
    _hush(stream)
    return True


def _is_broken(stream: TextIO) -> bool:
    """Whether the other end is gone; a stream without a buffer does not learn it by its flush."""
    try:
        number = stream.fileno()
    except io.UnsupportedOperation:  # a buffer in memory
        return False
    asked = select.poll()
    asked.register(number, 0)  # for errors alone, which are always told
    return bool(asked.poll(0))


def _hush(stream: TextIO) -> None:
    """Let a stream write nowhere: what its buffer holds would fail again at the process's end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
