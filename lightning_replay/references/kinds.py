"""Temporary."""

from dataclasses import dataclass
from typing import Any, Literal

Save = Literal["inside", "beside"]
Since = Literal["fit", "first"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    since: Since = "fit"
    kind = "auto"


@dataclass(frozen=True, kw_only=True)
class Auto(Reference): ...


@dataclass(frozen=True, kw_only=True)
class Copy(Reference):
    dtype: Any = None
    device: Any = None
    save: Save = "inside"
    kind = "copy"


@dataclass(frozen=True, kw_only=True)
class Adapter(Reference):
    kind = "adapter"


@dataclass(frozen=True, kw_only=True)
class Cached(Reference):
    top_k: int = 64
    kind = "cached"


@dataclass(frozen=True, kw_only=True)
class EMA(Reference):
    decay: float = 0.999
    dtype: Any = None
    device: Any = None
    kind = "ema"


def reference_of(given):
    if isinstance(given, Reference):
        return given
    k = {"auto": Auto, "copy": Copy, "adapter": Adapter, "cached": Cached, "ema": EMA}
    if given not in k:
        raise ValueError(f"`reference` is one of {', '.join(map(repr, k))}; got {given!r}.")
    return k[given]()
