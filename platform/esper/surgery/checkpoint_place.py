"""Where a checkpoint's files lie: in a folder, or in a store of objects that a URI names.

`folder`, `file:///folder`, or `s3://bucket/prefix` for whatever speaks S3. Who does not mean AWS
itself adds where: `s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http`, or sets
AWS_ENDPOINT_URL. Keys come from the environment, as for any program that uses S3.

A file appears whole or not at all: a folder by renaming, S3 because an object is there when its
upload has ended. Other file systems that pyarrow knows do not promise that and are refused.
"""

from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from esper.atomic import write_atomically
from esper.config.base import ConfigError

Where = str | Path


class Place(Protocol):
    """Files by name, without folders in between."""

    def names(self) -> list[str]:
        """Of the files there; none if there is no such place yet.

        Raises:
            OSError: If it cannot be looked at, or is no folder.
        """
        ...

    def read(self, name: str) -> bytes:
        """A file.

        Raises:
            OSError: If it is not there or cannot be read.
        """
        ...

    def write(self, name: str, content: bytes) -> None:
        """Replace a file, whole or not at all.

        Raises:
            OSError: If that fails; a former one is there still.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file.

        Raises:
            OSError: If that fails.
        """
        ...


class Folder:
    """A folder that this machine sees; made when it is written to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        """See `Place.names`."""
        return [p.name for p in self._path.iterdir()] if self._path.exists() else []

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        return (self._path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See `Place.write`."""
        self._path.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path / name, content)

    def remove(self, name: str) -> None:
        """See `Place.remove`."""
        (self._path / name).unlink()


class Bucket:
    """Objects of one prefix of an S3-compatible store.

    Args:
        uri: `s3://bucket/prefix`.

    Raises:
        ConfigError: If the URI names no bucket or has options that pyarrow does not know.
    """

    def __init__(self, uri: str) -> None:
        # takes a fifth of a second
        from pyarrow import ArrowInvalid, fs

        if not urlsplit(uri).netloc or not urlsplit(uri).path.strip("/"):
            raise ConfigError(uri, (
                f"a checkpoint in a store must have a bucket and a name, but got '{uri}'; "
                "say s3://BUCKET/NAME.",
            ))  # fmt: skip
        try:
            self._files, path = fs.FileSystem.from_uri(uri)
        except ArrowInvalid as error:
            raise ConfigError(
                uri, (f"the URI must be one that pyarrow reads, but: {error}",)
            ) from None
        self._prefix, self._selector = path.rstrip("/"), fs.FileSelector

    def names(self) -> list[str]:
        """See `Place.names`."""
        found = self._files.get_file_info(self._selector(self._prefix, allow_not_found=True))
        return [info.base_name for info in found]

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        with self._files.open_input_stream(f"{self._prefix}/{name}") as stream:
            content: bytes = stream.read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """See `Place.write`."""
        with self._files.open_output_stream(f"{self._prefix}/{name}") as stream:
            stream.write(content)

    def remove(self, name: str) -> None:
        """See `Place.remove`."""
        self._files.delete_file(f"{self._prefix}/{name}")


def is_remote(where: Where) -> bool:
    """Whether it is a URI of what is no folder of this machine."""
    return isinstance(where, str) and "://" in where and not where.startswith("file://")


def local(where: Where) -> Path:
    """The folder that a path or a `file://` URI names.

    Raises:
        ConfigError: If it is an S3 URI that became a path.
    """
    text = str(where)
    if text.startswith("s3:/"):
        # a path swallows the second slash, and would make a folder of that name
        raise ConfigError(text, (
            f"a store must be named by text, not by a path, but got {text!r}; only a run's "
            "checkpoint may lie in one.",
        ))  # fmt: skip
    return Path(unquote(urlsplit(text).path)) if text.startswith("file://") else Path(where)


def absolute(where: Where) -> Where:
    """The same place for a process with another working directory."""
    return where if is_remote(where) else local(where).resolve()


def place_of(where: Where) -> Place:
    """The place that a path or a URI names.

    Raises:
        ConfigError: If it is a URI of another kind, or none that can be read.
    """
    if not is_remote(where):
        return Folder(local(where))
    if not str(where).startswith("s3://"):
        raise ConfigError(str(where), (
            "checkpoints must lie in a folder (a path or file://) or a store that speaks S3 "
            f"(s3://), but got '{where}'.",
        ))  # fmt: skip
    return Bucket(str(where))
