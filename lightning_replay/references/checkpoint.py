"""The reference's weights in a file of their own, beside the checkpoints that name it."""

import hashlib
import os
import posixpath
from collections.abc import Mapping
from typing import Any, NamedTuple

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import override

from lightning_replay.utilities.io import atomic_write

__all__ = ["ReferenceFile", "SavesReferenceBeside", "read_reference"]


class ReferenceFile(NamedTuple):
    """What a checkpoint stores of the file, which is in the folder of the checkpoint, wherever that was moved.

    Attributes:
        file: Its name, with the first digits of the hash, so that runs that share a folder have files of their own.
        sha256: The hash of its bytes.
        size: The number of its bytes.
    """

    file: str
    sha256: str
    size: int


class SavesReferenceBeside(CheckpointIO):
    """Takes the reference out of each checkpoint that is written, and writes it once into the same folder.

    Only a ``CheckpointIO`` knows the path of a checkpoint: `on_save_checkpoint` doesn't get it, and
    `trainer.save_checkpoint` takes any. It runs on rank 0 alone, as all writing of checkpoints does. If another plugin
    replaces it, the reference stays inside the checkpoint, which can be read as well.

    Args:
        wrapped: The plugin that reads and writes checkpoints.
        key: The key of the reference's weights in a checkpoint.
    """

    def __init__(self, wrapped: CheckpointIO, key: str) -> None:
        self.wrapped = wrapped
        self.key = key
        self._known: tuple[Mapping[str, Tensor], ReferenceFile] | None = None

    def forget(self) -> None:
        """Forget the weights that were saved last. The next fit has others."""
        self._known = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        weights = checkpoint.get(self.key)
        if weights:
            # The reference first, so that a checkpoint never names a file that is missing.
            checkpoint = checkpoint | {self.key: self._write(weights, _folder(path))._asdict()}
        self.wrapped.save_checkpoint(checkpoint, path, storage_options)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.wrapped.load_checkpoint(path, *args, **kwargs)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        self.wrapped.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        self.wrapped.teardown()

    def _write(self, weights: Mapping[str, Tensor], folder: str) -> ReferenceFile:
        """Write the weights, unless they are in the folder already."""
        if self._known is not None and _same(self._known[0], weights):
            named = self._known[1]
            if _size(folder, named.file) == named.size:
                return named
        # Tied weights share memory, which the format refuses.
        content = save({name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()})
        digest = hashlib.sha256(content).hexdigest()
        named = ReferenceFile(f"reference-{digest[:16]}.safetensors", digest, len(content))
        if _size(folder, named.file) != named.size:
            _write_whole(content, folder, named.file)
        self._known = weights, named
        return named


def read_reference(named: Mapping[str, Any], checkpoint: Any) -> dict[str, Tensor]:
    """The weights in the file that a checkpoint names.

    Args:
        named: What the checkpoint stores of the file.
        checkpoint: The checkpoint's path.

    Raises:
        MisconfigurationException: If the file is missing or was altered.
    """
    path = posixpath.join(_folder(checkpoint), named["file"])
    try:
        content: bytes = url_to_fs(path)[0].cat_file(path)
    except FileNotFoundError as error:
        raise MisconfigurationException(
            f"{checkpoint} names the reference model in {named['file']}, but there is no such file in its folder. It "
            "was written beside the checkpoint: copy it there from the folder that the checkpoint comes from. With "
            "`save='inside'` a checkpoint needs no other file."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != named["sha256"]:
        raise MisconfigurationException(
            f"{path} is not the reference model that {checkpoint} was saved with: it has {len(content)} bytes with the "
            f"SHA-256 {digest}, and {named['size']} bytes with {named['sha256']} are expected. Copy the file again "
            "from the folder that the checkpoint comes from."
        )
    return load(content)


def _folder(checkpoint: Any) -> str:
    return os.path.dirname(str(checkpoint)) or "."


def _size(folder: str, name: str) -> int | None:
    filesystem, path = url_to_fs(posixpath.join(folder, name))
    return int(filesystem.size(path)) if filesystem.exists(path) else None


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states share their memory. The weights of a frozen copy never change in it."""
    return one.keys() == other.keys() and all(one[name].data_ptr() == other[name].data_ptr() for name in one)


def _write_whole(content: bytes, folder: str, name: str) -> None:
    """Replace a file in one step, once the new one is complete."""
    filesystem, path = url_to_fs(posixpath.join(folder, name))
    filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, content)  # object stores show an object once it is complete
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
