"""Fits whose replay loss runs in the place of the output head, against the same fits with whole logits."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_replay import (
    KL,
    Cached,
    ForgettingMonitor,
    LwF,
    NextToken,
    ReplayDataModule,
    ReplayRows,
    Sampling,
    SelfGeneratedReplay,
    head_chunks,
)
from lightning_replay.references.models import LiveModel
from lightning_replay.references.reference import Reference
from tests.helpers.by_hand import weights
from tests.helpers.modules import PlainDescent, mapping_loader, quiet_trainer

Make = Callable[..., Any]


class WholeKL(KL):
    """A loss of one's own, which gets whole logits."""

    def __call__(self, logits: Tensor, rows: ReplayRows, reference_logits: Callable[[], Tensor]) -> Tensor:
        assert logits.dim() == 3
        return super().__call__(logits, rows, reference_logits)


class WholeNextToken(NextToken):
    def __call__(self, logits: Tensor, rows: ReplayRows, reference_logits: Callable[[], Tensor]) -> Tensor:
        assert logits.dim() == 3
        return super().__call__(logits, rows, reference_logits)


class WholeLwF(LwF):
    def on_logits(self, logits: Tensor, reference_logits: Tensor, mask: Tensor | None) -> Tensor:
        assert logits.dim() == reference_logits.dim() == 3
        return super().on_logits(logits, reference_logits, mask)


LOSSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "forward": (KL(), WholeKL(), {}),
    "reverse, softened": (KL("reverse", 2.0), WholeKL("reverse", 2.0), {}),
    "jensen_shannon": (KL("jensen_shannon"), WholeKL("jensen_shannon"), {}),
    "ntp": (NextToken(), WholeNextToken(), {}),
    "lwf": (LwF(2.0), WholeLwF(2.0), {}),
    "cached": (KL(), WholeKL(), {"reference": Cached(top_k=4)}),
}
MODELS: dict[str, Callable[[Make], Any]] = {
    "tied": lambda make: make(tie_word_embeddings=True),
    "checkpointed": lambda make: checkpointed(make()),
    "LoRA on the head": lambda make: get_peft_model(make(), LoraConfig(target_modules=["q_proj", "lm_head"], r=2)),
    "head saved": lambda make: get_peft_model(
        make(), LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    ),
}


def checkpointed(module: Any) -> Any:
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return module


def fitted(model: Any, loss: Any, options: dict[str, Any], **trainer: Any) -> Tensor:
    module = PlainDescent(model)
    replay = SelfGeneratedReplay(
        loss, 2.0, seed=0, **({} if isinstance(loss, LwF) else {"sampling": Sampling(prompts=[[1]])} | options)
    )
    data: dict[str, Any] = (
        {"train_dataloaders": mapping_loader()}
        if isinstance(loss, LwF)
        else {"datamodule": ReplayDataModule(mapping_loader(), 0.2)}
    )
    quiet_trainer(callbacks=[replay], **{"max_steps": 4, "accumulate_grad_batches": 2} | trainer).fit(module, **data)
    return weights(module)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_fit_ends_in_the_weights_of_one_with_whole_logits(loss: str, model: str, tiny_llama: Make) -> None:
    in_chunks, whole, options = LOSSES[loss]
    torch.manual_seed(1)
    start = weights(MODELS[model](tiny_llama))
    found = []
    for kind in (in_chunks, whole):
        torch.manual_seed(1)
        found.append(fitted(MODELS[model](tiny_llama), kind, options))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)
    assert float((found[1] - start).abs().max()) > 1e-3


class Exchanged(LiveModel):
    """A reference of one's own that has its weights in the trained module for as long as it is active."""

    weights_stay = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._kept = [part.detach().clone() for part in model.module.parameters()]

    def active(self) -> Any:
        @contextmanager
        def exchanged() -> Any:
            self._exchange()
            try:
                with super(Exchanged, self).active() as model:
                    yield model
            finally:
                self._exchange()

        return exchanged()

    def _exchange(self) -> None:
        for kept, part in zip(self._kept, self._model.module.parameters(), strict=True):
            now = part.detach().clone()
            part.data.copy_(kept)
            kept.copy_(now)


class Exchanges(Reference):
    def take(self, model: Any, trainer: Any) -> Any:
        return Exchanged(model)


def test_a_reference_that_borrows_the_trained_module_is_compared_as_a_copy(tiny_llama: Make) -> None:
    found = [fitted(tiny_llama(), KL(), {"reference": reference}) for reference in ("copy", Exchanges())]
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Counts the tensors of a shape that are made."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.found = numbers, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for part in tree_flatten(output)[0]:
            is_float = isinstance(part, Tensor) and part.is_floating_point()
            if is_float and part.untyped_storage().size() >= self.numbers * part.element_size():
                self.found.append(str(func))
        return output


@pytest.mark.parametrize("options", [{}, {"reference": Cached(top_k=4)}, {"loss": "ntp"}, {"loss": WholeKL()}], ids=str)
def test_neither_replay_nor_the_monitor_makes_logits_of_a_batch_unless_a_loss_takes_them(
    options: dict[str, Any], tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_chunks._CHUNK, "cpu", (8 * 1000, 1))
    model = tiny_llama(vocab_size=1000)

    class Bodies(PlainDescent):
        """A loss of the hidden states, so that the step itself makes no logits."""

        def loss(self, batch: Any) -> Tensor:
            return self.model.model(batch["input_ids"])[0].square().mean()  # type: ignore[operator,no-any-return]

    replay = SelfGeneratedReplay(seed=0, refill_rows=8, sampling=Sampling(prompts=[[1]]), **options)
    monitor = ForgettingMonitor({"prior": mapping_loader(8, 12)}, every_n_steps=1)
    trainer = quiet_trainer(callbacks=[replay, monitor], max_steps=2)
    seen: list[str] = []

    def watched(name: str, hook: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with Largest(4 * 11 * 1000) as largest:
                result = hook(*args, **kwargs)
            seen.extend(f"{name}: {each}" for each in largest.found)
            return result

        return run

    monkeypatch.setattr(replay.step, "_on_replay_rows", watched("step", replay.step._on_replay_rows))
    monkeypatch.setattr(monitor, "_measure", watched("monitor", monitor._measure))
    trainer.fit(Bodies(model), datamodule=ReplayDataModule(mapping_loader(64, 12, batch_size=16), 0.2))
    assert trainer.global_step == 2
    assert bool(seen) == isinstance(options.get("loss"), WholeKL)
