"""Learning without forgetting compares the logits that the step's own call returns, wherever in the batch they are."""

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_replay import SelfGeneratedReplay
from tests.helpers.modules import PlainDescent, Rows, quiet_trainer

Make = Callable[..., LlamaForCausalLM]
Call = Callable[[Any, Any], Tensor]


class Masked(DataLoader[Any]):
    """Batches of rows of 12 tokens; some rows are padded, and some tokens are no targets."""

    def __init__(self, side: str) -> None:
        super().__init__(Rows(32), batch_size=8)
        self.side = side

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            labels, mask = batch["labels"].clone(), batch["attention_mask"].clone()
            padding = slice(0, 3) if self.side == "left" else slice(9, 12)
            labels[::2, padding], mask[::2, padding] = -100, 0
            labels[1::4, 5:7] = -100
            yield {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}


class Calling(PlainDescent):
    """A module with a loss of its own on the logits of a call."""

    def __init__(self, model: Any, call: Call) -> None:
        super().__init__(model)
        self.call = call

    def loss(self, batch: Any) -> Tensor:
        logits: Tensor = self.call(self.model, batch)
        return logits.float().log_softmax(-1)[..., 3].mean()


class ByHand(L.Callback):
    """The divergence at the targets among some columns of the batch, computed before each step."""

    def __init__(self, call: Call, columns: list[int]) -> None:
        self.call, self.columns = call, columns
        self.expected: list[float] = []
        self.logged: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = copy.deepcopy(pl_module.model)

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        p, q = (self.call(model, batch).log_softmax(-1) for model in (pl_module.model, self.before))
        values = (q.exp() * (q - p)).sum(-1)
        found = []
        for row, (labels, mask) in enumerate(zip(batch["labels"], batch["attention_mask"], strict=True)):
            for place, column in enumerate(self.columns):
                if column + 1 < 12 and mask[column] and mask[column + 1] and labels[column + 1] != -100:
                    found.append(float(values[row, place]))
        self.expected.append(sum(found) / len(found))

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.logged.append(float(trainer.callback_metrics["replay/loss"]))


def masked(model: Any, batch: Any, **options: Any) -> Tensor:
    logits: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"], **options).logits
    return logits


def embedded(model: Any, batch: Any, train: bool) -> Tensor:
    embeddings = model.get_input_embeddings().requires_grad_(train)
    logits: Tensor = model(inputs_embeds=embeddings(batch["input_ids"])).logits
    return logits


ALL = list(range(12))
CALLS: dict[str, tuple[Call, list[int]]] = {
    "the whole batch": (masked, ALL),
    "all but the last column": (lambda model, batch: model(batch["input_ids"][:, :-1]).logits, ALL[:-1]),
    "columns from the fourth on": (lambda model, batch: model(batch["input_ids"][:, 3:]).logits, ALL[3:]),
    "columns from the middle": (lambda model, batch: model(input_ids=batch["input_ids"][:, 4:9]).logits, ALL[4:9]),
    "the last logits": (lambda model, batch: masked(model, batch, logits_to_keep=5), ALL[-5:]),
    "logits at indices": (lambda model, batch: masked(model, batch, logits_to_keep=torch.tensor([2, 7, 8])), [2, 7, 8]),
    "the last logits of a part": (
        lambda model, batch: model(batch["input_ids"][:, 2:10], logits_to_keep=4).logits,
        ALL[6:10],
    ),
    "embeddings that don't train": (lambda model, batch: embedded(model, batch, train=False), ALL),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CALLS)
def test_the_divergence_is_taken_at_the_targets_of_the_call(tiny_llama: Make, kind: str, side: str) -> None:
    call, columns = CALLS[kind]
    by_hand = ByHand(call, columns)
    trainer = quiet_trainer(max_steps=3, callbacks=[SelfGeneratedReplay("lwf", 1.0), by_hand])
    trainer.fit(Calling(tiny_llama(), call), Masked(side))
    assert by_hand.logged == pytest.approx(by_hand.expected, rel=1e-4, abs=1e-6)
    assert by_hand.logged[-1] > 1e-3


class Other(DataLoader[Any]):
    """Batches of a kind that only the user's step knows."""

    def __iter__(self) -> Any:
        for batch in Masked("left"):
            yield {"text": batch}


@pytest.mark.parametrize("options", [{}, {"logits_to_keep": 5}])
def test_of_a_batch_of_another_kind_the_mask_of_the_call_decides(tiny_llama: Make, options: Any) -> None:
    def call(model: Any, batch: Any) -> Tensor:
        return masked(model, batch, **options)

    class Unpacking(Calling):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch["text"])

    class ByMask(ByHand):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            given = batch["text"] | {"labels": batch["text"]["input_ids"]}
            super().on_train_batch_start(trainer, pl_module, given, batch_idx)

    by_hand = ByMask(call, ALL[-options.get("logits_to_keep", 12) :])
    trainer = quiet_trainer(max_steps=3, callbacks=[SelfGeneratedReplay("lwf", 1.0), by_hand])
    trainer.fit(Unpacking(tiny_llama(), call), Other(Rows(32)))
    assert by_hand.logged == pytest.approx(by_hand.expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "given"),
    [
        (lambda model, batch: model(batch["input_ids"][:, ::2]).logits, r"\(8, 6\)"),
        (lambda model, batch: model(batch["input_ids"].repeat(2, 1)).logits, r"\(16, 12\)"),
        (lambda model, batch: model(batch["input_ids"][:4]).logits, r"\(4, 12\)"),
    ],
    ids=["every second column", "rows twice", "half of the rows"],
)
def test_a_call_on_something_else_than_columns_of_the_batch_is_refused(
    tiny_llama: Make, call: Call, given: str
) -> None:
    with pytest.raises(MisconfigurationException, match=rf"shape \(8, 12\), the model was called on tokens .* {given}"):
        quiet_trainer(callbacks=[SelfGeneratedReplay("lwf")]).fit(Calling(tiny_llama(), call), Masked("right"))


def test_columns_that_could_be_several_with_other_targets_are_refused(tiny_llama: Make) -> None:
    tokens = torch.full((8, 12), 5)
    labels = tokens.clone()
    labels[:, :6] = -100
    batches: Any = [{"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}]
    module = Calling(tiny_llama(), lambda model, batch: model(batch["input_ids"][:, 4:]).logits)
    with pytest.raises(MisconfigurationException, match="can't be determined which logits"):
        quiet_trainer(callbacks=[SelfGeneratedReplay("lwf")]).fit(module, DataLoader(batches, batch_size=None))


def test_a_call_with_embeddings_that_train_is_refused(tiny_llama: Make) -> None:
    module = Calling(tiny_llama(), lambda model, batch: embedded(model, batch, train=True))
    with pytest.raises(MisconfigurationException, match=r"\['inputs_embeds'\] are computed with weights that train"):
        quiet_trainer(callbacks=[SelfGeneratedReplay("lwf")]).fit(module, Masked("right"))
