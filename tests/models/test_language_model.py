from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_replay.models.language_model import LanguageModel, evaluating, find_language_model
from tests.helpers.modules import VOCABULARY, HandWritten, UserModule

Make = Callable[..., LlamaForCausalLM]
TOKENS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
ROWS = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))


def of(module: nn.Module) -> LanguageModel:
    return find_language_model(UserModule(module), None)


def test_a_hugging_face_model_is_found_with_what_it_can_do(tiny_llama: Make) -> None:
    module = UserModule(nn.ModuleDict({"inner": tiny_llama()}))
    found = find_language_model(module, None)
    assert found.module is module.model["inner"]  # type: ignore[index]
    assert (found.vocabulary, found.context, found.has_cache) == (VOCABULARY, 32, True)


def test_a_hand_written_model_is_found_as_the_child_that_holds_all_parameters() -> None:
    module = UserModule(HandWritten())
    found = find_language_model(module, None)
    assert found.module is module.model
    assert (found.vocabulary, found.has_cache) == (VOCABULARY, False)


def test_a_module_that_is_the_model_itself_is_found() -> None:
    class Whole(UserModule):
        def __init__(self) -> None:
            super().__init__(nn.Embedding(VOCABULARY, 8))
            self.head = nn.Linear(8, VOCABULARY)

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.model(tokens))
            return logits

    module = Whole()
    assert find_language_model(module, None).module is module


def test_of_several_models_the_one_that_trains_is_meant(tiny_llama: Make) -> None:
    module = UserModule(tiny_llama())
    module.teacher = tiny_llama(seed=1)
    with pytest.raises(MisconfigurationException, match="several language models.*language_model='model'"):
        find_language_model(module, None)
    assert find_language_model(module, "teacher").module is module.teacher
    module.teacher.requires_grad_(False)
    assert find_language_model(module, None).module is module.model


def test_missing_logits_name_the_argument_that_says_where_they_are() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            pooled: Tensor = self.embedding(tokens).mean(1)
            return pooled

    with pytest.raises(MisconfigurationException, match="no logits of shape.*`language_model`"):
        of(Classifier())
    with pytest.raises(MisconfigurationException, match=r"names no module.*Its children are \['model'\]"):
        find_language_model(UserModule(Classifier()), "model.gpt")


def test_evaluating_gives_every_submodule_its_mode_back() -> None:
    model = HandWritten()
    model.train()
    model.block.eval()
    with evaluating(model):
        assert not any(child.training for child in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert model.head.training
    assert not model.block.training


def test_a_model_that_computes_elsewhere_does_so_without_its_compilation(tiny_llama: Make) -> None:
    """Where weights are fetched to another device, the model without `torch.compile` is called there as well."""
    compiled: Any = torch.compile(tiny_llama())
    model = replace(find_language_model(UserModule(compiled), None), runs_on=torch.device("meta"))
    assert model.uncompiled.module is not model.module
    assert model.uncompiled.device == torch.device("meta")
