"""What `reference` may be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from lightning_replay.models.language_model import find_language_model
from lightning_replay.references.adapters import DisabledAdapter
from lightning_replay.references.models import FrozenCopy, MovingAverage
from lightning_replay.references.reference import EMA, Adapter, Auto, Cached, Copy, Reference, reference_of
from tests.helpers.modules import UserModule, quiet_trainer

Make = Callable[..., LlamaForCausalLM]


def test_a_name_stands_for_the_defaults_and_an_object_for_itself() -> None:
    names: list[Any] = ["auto", "copy", "adapter", "cached", "ema"]
    assert [reference_of(name) for name in names] == [Auto(), Copy(), Adapter(), Cached(top_k=64), EMA(decay=0.999)]
    assert all(reference_of(name).since == "fit" for name in names)
    own = EMA(decay=0.5, since="first")
    assert reference_of(own) is own


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: reference_of("teacher"), ValueError, "'cached', 'ema', a module, or a Reference"),  # type: ignore[arg-type]
        (lambda: reference_of(None), TypeError, "such as Copy.*got None"),  # type: ignore[arg-type]
        (lambda: reference_of(EMA), TypeError, "got <class"),  # type: ignore[arg-type]
        (lambda: Adapter(since="last"), ValueError, "`since` of Adapter is 'fit' or 'first'; got 'last'"),  # type: ignore[arg-type]
        (lambda: Copy(quantize="int4"), ValueError, "`quantize` of Copy is 'int8' or None; got 'int4'"),  # type: ignore[arg-type]
        (lambda: Copy(dtype="int8"), ValueError, "`dtype` of Copy .* got 'int8'"),
        (lambda: EMA(dtype=torch.int8), ValueError, "`dtype` of EMA .* got torch.int8"),
        (lambda: Auto(save="above"), ValueError, "`save` of Auto is 'inside' or 'beside'; got 'above'"),  # type: ignore[arg-type]
        (lambda: Cached(top_k=0), ValueError, "`top_k` of Cached .* got 0"),
        (lambda: EMA(decay=1.0), ValueError, "`decay` of EMA .* below 1; got 1.0"),
        (lambda: EMA(decay=True), ValueError, "got True"),
        (lambda: Copy("bfloat16"), TypeError, "positional"),  # type: ignore[call-arg,arg-type]
        (lambda: Reference(), TypeError, "abstract"),  # type: ignore[abstract]
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_what_each_reference_takes_of_a_model_with_and_without_a_fresh_adapter(tiny_llama: Make) -> None:
    trainer = quiet_trainer()
    plain = find_language_model(UserModule(tiny_llama()), None)
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    fresh = find_language_model(UserModule(adapted), None)
    taken = {
        type(reference): tuple(type(reference.take(model, trainer)) for model in (plain, fresh))
        for reference in (Auto(), Copy(), Cached(), EMA())
    }
    assert taken == {
        Auto: (FrozenCopy, DisabledAdapter),
        Copy: (FrozenCopy, FrozenCopy),
        Cached: (FrozenCopy, DisabledAdapter),
        EMA: (MovingAverage, MovingAverage),
    }
    assert type(Adapter().take(fresh, trainer)) is DisabledAdapter


def test_which_references_are_the_model_at_fit_start_on_every_input() -> None:
    exact: list[Reference] = [Auto(), Copy(), Adapter(), Copy(device="cpu", save="beside")]
    others: list[Reference] = [Cached(), EMA(), Copy(dtype="bfloat16"), Copy(quantize="int8"), Auto(since="first")]
    assert [reference.is_model_at_fit_start for reference in (*exact, *others)] == [True] * 4 + [False] * 5


def test_a_reference_keeps_the_type_and_the_device_that_were_asked_for(tiny_llama: Make) -> None:
    model = find_language_model(UserModule(tiny_llama()), None)
    for reference in (Copy(dtype="bfloat16"), EMA(dtype=torch.bfloat16, device="cpu"), Auto(dtype="bfloat16")):
        with reference.take(model, quiet_trainer()).active() as active:
            assert {parameter.dtype for parameter in active.module.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
