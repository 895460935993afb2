"""The folder of a checkpoint: safetensors and JSON, checked, atomic.

It holds `manifest.json` and one `tensors-<sha256>.safetensors`. The tensors are written first,
under a name that is their own hash; replacing the manifest is the one step that makes the new
checkpoint valid. A crash at any moment, or a disk that is full, leaves the old or the new one.
While it is written there must be room for both. Nothing is ever unpickled.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from esper.atomic import write_atomically

FORMAT = "esper-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """The folder is no checkpoint, is damaged, or does not fit the model; nothing was changed."""


class CheckpointNotWrittenError(OSError):
    """A checkpoint could not be written; a former one in the same folder is what it was."""

    def __init__(self, folder: str, what: str) -> None:
        # all arguments go to the base class so that the error survives pickling between actors
        super().__init__(folder, what)
        self.folder, self.what = folder, what

    def __str__(self) -> str:
        return (
            f"a checkpoint must be written to {self.folder}, but: {self.what}; a former one there "
            "is as it was: make room for two at once, or choose another folder."
        )


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, which share no memory: what goes on changes none of them."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write a checkpoint; a former one in the same folder is replaced.

    Args:
        folder: Made if it does not exist.
        tensors: By name; they may share memory.
        content: Whatever else is to be kept, as JSON.

    Raises:
        CheckpointError: If the folder exists and holds something else.
        CheckpointNotWrittenError: If the disk is full or fails.
    """
    # safetensors refuses tensors that share memory, such as tied weights
    write_copies(folder, copies(tensors), content)


def write_copies(folder: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write a checkpoint of what `copies` returned; see `write_checkpoint`."""
    _require_ours(folder)
    payload = to_bytes(tensors)
    digest = hashlib.sha256(payload).hexdigest()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": f"tensors-{digest}.safetensors",
        "tensors_sha256": digest,
        **content,
    }
    manifest["manifest_sha256"] = _hash_json(manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # what a crash left would take the room of what is to come
        _clean(folder)
        try:
            write_atomically(folder / str(manifest["tensors"]), payload)
            write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        finally:
            # either the former checkpoint's tensors or those of the one that failed
            _clean(folder)
    except OSError as error:
        raise CheckpointNotWrittenError(str(folder), error.strerror or str(error)) from error


def _clean(folder: Path) -> None:
    """Remove what does not belong to the checkpoint that is valid now."""
    kept = {MANIFEST}
    if (folder / MANIFEST).exists():
        kept.add(read_manifest(folder)["tensors"])
    for path in folder.iterdir():
        if path.name not in kept and _is_leftover(path):
            path.unlink()


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content and the tensors of a checkpoint, after every check.

    Raises:
        CheckpointError: If the folder is no checkpoint or is damaged.
    """
    manifest = read_manifest(folder)
    file = folder / Path(manifest["tensors"]).name
    try:
        payload = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file} must be readable, but: {error.strerror}; restore the checkpoint's folder."
        ) from None
    digest = hashlib.sha256(payload).hexdigest()
    if digest != manifest["tensors_sha256"]:
        raise CheckpointError(
            f"{file} must have sha256 {manifest['tensors_sha256']}, but has {digest}; "
            "the file is damaged or truncated: take another copy."
        )
    try:
        return manifest, from_bytes(payload)
    except SafetensorError as error:
        raise CheckpointError(f"{file} must be a safetensors file, but: {error}.") from None


def _require_ours(folder: Path) -> None:
    """Refuse a folder that holds anything but a checkpoint or what a crash left of its first."""
    if not folder.exists():
        return
    if folder.is_dir() and not (folder / MANIFEST).exists():
        foreign = [p.name for p in folder.iterdir() if not _is_leftover(p)]
        if not foreign:
            return
        raise CheckpointError(
            f"{folder} must be a checkpoint or an empty folder to be saved to, but holds "
            f"{', '.join(sorted(foreign)[:3])}; choose another folder."
        )
    read_manifest(folder)


def _is_leftover(path: Path) -> bool:
    return path.name.startswith("tensors-") or (
        path.name.startswith(MANIFEST) and path.name.endswith(".tmp")
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint without its tensors.

    Raises:
        CheckpointError: If the folder is no checkpoint, or its manifest is damaged.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} must be a checkpoint folder with a readable {MANIFEST}, but: {error}."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} must be written by esper.save, but is something else; nothing was touched."
        )
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{file} must have version {VERSION}, but has {manifest.get('version')}; "
            "load it with the Esper version that wrote it."
        )
    digest = manifest.pop("manifest_sha256", None)
    if digest != _hash_json(manifest):
        raise CheckpointError(
            f"{file} must match its own sha256, but was changed or damaged; take another copy."
        )
    return manifest


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
