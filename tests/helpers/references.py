"""What the tests of references ask: a language model of any module, and a reference's answer."""

import torch
from torch import Tensor, nn

from lightning_replay.models.language_model import LanguageModel, find_language_model
from lightning_replay.references.models import ReferenceModel
from tests.helpers.modules import VOCABULARY, UserModule

TOKENS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))


def of(module: nn.Module) -> LanguageModel:
    return find_language_model(UserModule(module), None)


def answer(reference: ReferenceModel) -> Tensor:
    with reference.active() as model:
        return model.logits(TOKENS)
