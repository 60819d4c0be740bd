"""When a reference is taken, kept, saved and restored; with references that are not of the package."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_replay import ReplayDataModule, SelfGeneratedReplay
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.adapters import DisabledAdapter
from lightning_replay.references.keeper import ReferenceKeeper
from lightning_replay.references.models import FrozenCopy, LiveModel, ReferenceModel, SavedReference
from lightning_replay.references.reference import Adapter, Auto, Copy, Reference
from tests.helpers.modules import VOCABULARY, UserModule, mapping_loader, quiet_trainer
from tests.helpers.references import TOKENS, answer, of

Make = Callable[..., LlamaForCausalLM]


class Uniform(nn.Module):
    """Finds all tokens equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(VOCABULARY), requires_grad=False)

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


@dataclass(frozen=True, kw_only=True)
class Teacher(Reference):
    """Another model than the one that trains: a reference of the user's own."""

    module: nn.Module

    @override
    def take(self, model: LanguageModel, trainer: L.Trainer) -> ReferenceModel:
        return LiveModel(model.on(self.module.to(model.device)))


class HeadOnly(SavedReference):
    """The live model with the head that it had at fit start; a reference that needs saving."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.head = model.module.get_parameter("lm_head.weight").detach().clone()

    @override
    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        weight = self.model.module.get_parameter("lm_head.weight")
        now = weight.data
        weight.data = self.head
        try:
            with torch.no_grad():
                yield self.model
        finally:
            weight.data = now

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return {"head": self.head}

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.head = state["head"].clone()


@dataclass(frozen=True, kw_only=True)
class Head(Reference):
    @override
    def take(self, model: LanguageModel, trainer: L.Trainer) -> ReferenceModel:
        return HeadOnly(model)


def train(model: LanguageModel) -> None:
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.5)


def resuming(path: str = "half.ckpt") -> L.Trainer:
    trainer = quiet_trainer()
    trainer.ckpt_path = path
    return trainer


def begun(reference: Reference, trainer: L.Trainer, owner: str = "") -> ReferenceKeeper:
    keeper = ReferenceKeeper(reference, owner)
    keeper.begin_fit(trainer)
    return keeper


def test_a_reference_is_taken_once_a_fit_or_once_for_all(tiny_llama: Make) -> None:
    trainer, model = quiet_trainer(), of(tiny_llama())
    for reference in (Copy(since="fit"), Copy(since="first")):
        keeper = begun(reference, trainer)
        taken = [keeper.taken, keeper.get(trainer, model)]
        train(model)
        taken += [keeper.get(trainer, model), keeper.taken]
        keeper.begin_fit(trainer)
        taken += [keeper.taken, keeper.get(trainer, model)]
        first = taken[1]
        kept = reference.since == "first"
        assert [each is first for each in taken] == [False, True, True, True, kept, kept]
        assert taken[0] is None
        assert (taken[4] is None) != kept


def test_a_saved_copy_is_restored_into_a_model_that_has_trained(tiny_llama: Make) -> None:
    trainer, model = quiet_trainer(), of(tiny_llama())
    keeper = begun(Copy(), trainer)
    before = answer(keeper.get(trainer, model))
    keeper.begin_training()
    checkpoint: dict[str, Any] = {}
    keeper.save(trainer, checkpoint)
    assert list(checkpoint) == ["lightning_replay_reference"]
    train(model)
    again = begun(Copy(), resuming())
    again.load(resuming(), checkpoint)
    # A checkpoint that is saved before the reference is needed holds it as well.
    passed_on: dict[str, Any] = {}
    again.begin_training()
    again.save(resuming(), passed_on)
    assert passed_on["lightning_replay_reference"] is checkpoint["lightning_replay_reference"]
    assert torch.equal(answer(again.get(resuming(), model)), before)


def test_an_adapter_off_is_restored_though_the_adapter_has_trained(tiny_llama: Make) -> None:
    trainer = quiet_trainer()
    for reference in (Auto(), Adapter()):
        model = of(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])))
        keeper, checkpoint = begun(reference, trainer), dict[str, Any]()
        before = answer(keeper.get(trainer, model))
        keeper.save(trainer, checkpoint)
        assert checkpoint["lightning_replay_reference"] is None
        del checkpoint["lightning_replay_untrained"]
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                if "lora" in name:
                    parameter.add_(1)
        again = begun(reference, resuming())
        with pytest.raises(MisconfigurationException, match="holds no reference model|switches a fresh PEFT adapter"):
            again.get(resuming(), model)
        again.load(resuming(), checkpoint)
        assert isinstance(again.adapter(model), DisabledAdapter)
        assert torch.equal(answer(again.get(resuming(), model)), before)
    # Whoever asks for a copy now gets no adapter, and there is no copy to restore.
    copying = begun(Copy(), resuming())
    copying.load(resuming(), checkpoint)
    assert copying.adapter(model) is None
    with pytest.raises(MisconfigurationException, match="holds no reference model"):
        copying.get(resuming(), model)


def test_a_checkpoint_of_fit_start_does_not_count_as_a_resume(tiny_llama: Make) -> None:
    trainer, model = resuming(), of(tiny_llama())
    keeper, checkpoint = begun(Copy(), quiet_trainer()), dict[str, Any]()
    keeper.save(quiet_trainer(), checkpoint)
    assert checkpoint == {"lightning_replay_untrained": True}
    again = begun(Copy(), trainer)
    assert again.resumed_from(trainer) == "half.ckpt"
    again.load(trainer, checkpoint)
    assert again.resumed_from(trainer) is None
    again.begin_training()
    assert again.resumed_from(trainer) is None
    assert isinstance(again.get(trainer, model), FrozenCopy)
    later: dict[str, Any] = {}
    again.save(trainer, later)
    assert set(later) == {"lightning_replay_reference"}


def test_owners_have_references_of_their_own_and_read_what_had_no_owner(tiny_llama: Make) -> None:
    trainer, model = quiet_trainer(), of(tiny_llama())
    checkpoint: dict[str, Any] = {}
    for owner in ("", "prior"):
        keeper = begun(Copy(), trainer, owner)
        keeper.get(trainer, model)
        keeper.begin_training()
        keeper.save(trainer, checkpoint)
        train(model)
    assert list(checkpoint) == ["lightning_replay_reference", "lightning_replay_reference/prior"]
    answers = []
    for owner in ("", "prior", "other"):
        keeper = begun(Copy(), resuming(), owner)
        keeper.load(resuming(), checkpoint)
        answers.append(answer(keeper.get(resuming(), model)))
    assert not torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_a_reference_of_one_s_own_is_taken_again_after_a_resume(tiny_llama: Make) -> None:
    trainer, model, checkpoint = quiet_trainer(), of(tiny_llama()), dict[str, Any]()
    keeper = begun(Teacher(module=Uniform()), trainer)
    assert not keeper.is_model_at_fit_start
    assert torch.equal(answer(keeper.get(trainer, model)), torch.zeros(*TOKENS.shape, VOCABULARY))
    assert keeper.adapter(model) is None
    keeper.follow(model)
    keeper.begin_training()
    keeper.save(trainer, checkpoint)
    assert checkpoint == {"lightning_replay_reference": None}
    for saved in (checkpoint, {}):
        again = begun(Teacher(module=Uniform()), resuming())
        again.load(resuming(), saved)
        assert torch.equal(answer(again.get(resuming(), model)), torch.zeros(*TOKENS.shape, VOCABULARY))


def test_a_reference_of_one_s_own_that_has_weights_gets_them_back(tiny_llama: Make) -> None:
    trainer, model, checkpoint = quiet_trainer(), of(tiny_llama()), dict[str, Any]()
    keeper = begun(Head(), trainer)
    head = keeper.get(trainer, model).state_dict()["head"].clone()  # type: ignore[attr-defined]
    keeper.begin_training()
    keeper.save(trainer, checkpoint)
    train(model)
    again = begun(Head(), resuming())
    with pytest.raises(MisconfigurationException, match="holds no reference model"):
        again.get(resuming(), model)
    again.load(resuming(), checkpoint)
    assert torch.equal(again.get(resuming(), model).state_dict()["head"], head)  # type: ignore[attr-defined]


def test_a_run_with_a_reference_of_one_s_own_goes_on_after_a_resume(tiny_llama: Make, tmp_path: Path) -> None:
    def fit(path: Path | None = None) -> tuple[Tensor, float]:
        torch.manual_seed(0)
        replay = SelfGeneratedReplay(reference=Teacher(module=Uniform()), source="live", refill_rows=8, seed=1)
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
        module, data = UserModule(tiny_llama()), ReplayDataModule(mapping_loader(32), 0.25)
        trainer = quiet_trainer(callbacks=[replay, saving], enable_checkpointing=True, max_steps=8)
        trainer.fit(module, datamodule=data, ckpt_path=path)
        weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        return weights, float(trainer.callback_metrics["replay/loss"])

    straight, resumed = fit(), fit(tmp_path / "step=4.ckpt")
    assert torch.equal(straight[0], resumed[0])
    assert straight[1] == resumed[1] > 0
