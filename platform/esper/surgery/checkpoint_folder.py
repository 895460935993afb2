"""The folder of a checkpoint: safetensors and JSON, checked, atomic; here or in a store.

It holds `manifest.json` and one `tensors-<sha256>.safetensors`. The tensors are written first,
under a name that is their own hash; replacing the manifest is the one step that makes the new
checkpoint valid. A crash at any moment, or a disk that is full, leaves the old or the new one.
While it is written there must be room for both. Nothing is ever unpickled.
"""

import hashlib
import json
from pathlib import PurePath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from esper.surgery.checkpoint_place import Place, Where, place_of

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


def write_checkpoint(folder: Where, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write a checkpoint; a former one in the same folder is replaced.

    Args:
        folder: A path or URI; made if it does not exist.
        tensors: By name; they may share memory.
        content: Whatever else is to be kept, as JSON.

    Raises:
        CheckpointError: If the folder exists and holds something else.
        CheckpointNotWrittenError: If the disk is full or fails.
    """
    # safetensors refuses tensors that share memory, such as tied weights
    write_copies(folder, copies(tensors), content)


def write_copies(folder: Where, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write a checkpoint of what `copies` returned; see `write_checkpoint`."""
    place = place_of(folder)
    _require_ours(folder, place)
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
        # what a crash left would take the room of what is to come
        _clean(folder, place)
        try:
            place.write(str(manifest["tensors"]), payload)
            place.write(MANIFEST, json.dumps(manifest, indent=1).encode())
        finally:
            # either the former checkpoint's tensors or those of the one that failed
            _clean(folder, place)
    except OSError as error:
        raise CheckpointNotWrittenError(str(folder), error.strerror or str(error)) from error


def _clean(folder: Where, place: Place) -> None:
    """Remove what does not belong to the checkpoint that is valid now."""
    names = place.names()
    kept = {MANIFEST}
    if MANIFEST in names:
        kept.add(read_manifest(folder)["tensors"])
    for name in names:
        if name not in kept and _is_leftover(name):
            place.remove(name)


def read_checkpoint(folder: Where) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content and the tensors of a checkpoint, after every check.

    Raises:
        CheckpointError: If the folder is no checkpoint or is damaged.
    """
    manifest = read_manifest(folder)
    name = PurePath(manifest["tensors"]).name
    file = f"{folder}/{name}"
    try:
        payload = place_of(folder).read(name)
    except OSError as error:
        raise CheckpointError(
            f"{file} must be readable, but: {error.strerror or error}; restore the checkpoint's "
            "folder."
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


def _require_ours(folder: Where, place: Place) -> None:
    """Refuse a folder that holds anything but a checkpoint or what a crash left of its first."""
    try:
        names = place.names()
    except NotADirectoryError as error:
        raise CheckpointError(
            f"{folder} must be a checkpoint folder or a new one to be saved to, but: "
            f"{error.strerror}; choose another name."
        ) from None
    except OSError as error:
        raise CheckpointNotWrittenError(str(folder), error.strerror or str(error)) from error
    if MANIFEST in names:
        read_manifest(folder)
    elif foreign := [name for name in names if not _is_leftover(name)]:
        raise CheckpointError(
            f"{folder} must be a checkpoint or an empty folder to be saved to, but holds "
            f"{', '.join(sorted(foreign)[:3])}; choose another folder."
        )


def _is_leftover(name: str) -> bool:
    return name.startswith("tensors-") or (name.startswith(MANIFEST) and name.endswith(".tmp"))


def read_manifest(folder: Where) -> dict[str, Any]:
    """The content of a checkpoint without its tensors.

    Raises:
        CheckpointError: If the folder is no checkpoint, or its manifest is damaged.
    """
    file = f"{folder}/{MANIFEST}"
    try:
        manifest = json.loads(place_of(folder).read(MANIFEST))
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
