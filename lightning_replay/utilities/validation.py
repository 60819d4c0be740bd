"""Checks of user input that several modules share."""

from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard, get_args

import torch
from torch import Tensor

__all__ = [
    "are_ids",
    "check_choice",
    "check_model_folder",
    "check_package",
    "described",
    "is_integer",
    "is_number",
    "is_whole",
]


def is_whole(value: Any, least: int, most: int | None = None) -> bool:
    """Whether a value is an integer in a range; True and False are not.

    Example:
        >>> is_whole(3, least=1), is_whole(3.0, least=1), is_whole(True, least=1), is_whole(0, least=1)
        (True, False, False, False)
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and least <= value and (most is None or value <= most)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise an error if a value is not one of a ``Literal``'s.

    Raises:
        ValueError: With the allowed values.
    """
    if value not in get_args(choices):
        raise ValueError(f"`{name}` is one of {', '.join(map(repr, get_args(choices)))}; got {value!r}.")


def check_model_folder(given: Any) -> None:
    """Raise an error for a path to nothing, which ``from_pretrained`` would take for a malformed name on the hub.

    Raises:
        FileNotFoundError: If a text or path that can't be a name on the hub is no folder.

    Example:
        >>> check_model_folder("gpt2")
        >>> check_model_folder("/nowhere/gpt2")
        Traceback (most recent call last):
            ...
        FileNotFoundError: There is no folder '/nowhere/gpt2' with a model. A name on the hub is 'name' or 'owner/name'.
    """
    if not isinstance(given, (str, Path)):
        return
    text = str(given)
    is_path = isinstance(given, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1
    if is_path and not Path(given).is_dir():
        raise FileNotFoundError(
            f"There is no folder {text!r} with a model. A name on the hub is 'name' or 'owner/name'."
        )


def is_number(value: Any) -> bool:
    """Whether a value is a real number; True and False are not.

    Example:
        >>> is_number(0.5), is_number(2), is_number("0.5"), is_number(True)
        (True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def are_ids(tokens: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor of integers of shape ``(rows, length)``.

    Example:
        >>> are_ids(torch.tensor([[1, 2]])), are_ids(torch.tensor([[0.5, 2]])), are_ids([[1, 2]])
        (True, False, False)
    """
    return isinstance(tokens, Tensor) and tokens.dim() == 2 and is_integer(tokens)


def is_integer(values: Tensor) -> bool:
    """Whether a tensor is of an integer type."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def described(value: Any) -> str:
    """A short description of a value, for an error message.

    Example:
        >>> described(torch.zeros(2, 3)), described([1, 2])
        ('torch.float32 of shape (2, 3) on cpu', 'a list')
    """
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device.type}"


def check_package(given: Any, what: str) -> None:
    """Raise an error for an object of the `pytorch_lightning` package, whose classes are not those of `lightning`.

    Args:
        given: The object.
        what: What it is, as in ``"the Trainer"``.

    Raises:
        TypeError: If it is of that package.
    """
    packages = {kind.__module__.partition(".")[0] for kind in type(given).__mro__}
    if "pytorch_lightning" in packages and "lightning" not in packages:
        raise TypeError(
            f"{what} ({type(given).__name__}) is from the `pytorch_lightning` package, whose classes are not those "
            "of `lightning`, which lightning-replay supports. Import Trainer, modules, datamodules and callbacks "
            "from `lightning.pytorch` (or write `import lightning as L`) instead of `pytorch_lightning`."
        )
