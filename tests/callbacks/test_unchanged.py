"""`training_step` sees, returns and logs with replay what it would without, whatever the model and its loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from lightning_replay import Sampling, SelfGeneratedReplay
from tests.helpers.by_hand import weights
from tests.helpers.modules import VOCABULARY, PlainDescent, UserModule, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = VOCABULARY - 1


class Router(PlainDescent):
    """A mixture of experts, whose own loss includes the balance of all tokens of the call."""

    def __init__(self) -> None:
        config = MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
        super().__init__(MixtralForCausalLM(config))


class OwnTokens(nn.Module):
    """Computes its loss from the tokens that it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, tokens: Tensor) -> Any:
        logits = self.inner(tokens).logits
        self.loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return {"logits": logits, "loss": self.loss}


class FromTokens(PlainDescent):
    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(batch["input_ids"])["loss"]
        return loss


class Weighted(PlainDescent):
    """Weighs rows by hand, so that a mean over more rows would change the loss."""

    def loss(self, batch: Any) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"]).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").mean(1)
        return (losses * torch.arange(1, len(losses) + 1)).mean()


class Packed(PlainDescent):
    """Two documents in each row, told apart by positions that begin again."""

    def loss(self, batch: Any) -> Tensor:
        tokens = batch["input_ids"]
        positions = torch.arange(tokens.shape[1]).remainder(tokens.shape[1] // 2).expand_as(tokens)
        loss: Tensor = self.model(tokens, position_ids=positions, labels=tokens, use_cache=False).loss
        return loss


class LastLogits(PlainDescent):
    def loss(self, batch: Any) -> Tensor:
        logits = self.model(batch["input_ids"], logits_to_keep=3).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, -2:].flatten())


class Mask4D(PlainDescent):
    """Lets each token see itself and the three before it."""

    def loss(self, batch: Any) -> Tensor:
        tokens = batch["input_ids"]
        places = torch.arange(tokens.shape[1])
        distance = places[:, None] - places
        seen = (distance >= 0) & (distance < 4)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        mask = mask.expand(len(tokens), 1, -1, -1)
        loss: Tensor = self.model(tokens, attention_mask=mask, labels=tokens).loss
        return loss


class Embedded(PlainDescent):
    def loss(self, batch: Any) -> Tensor:
        embedded = self.model.get_input_embeddings()(batch["input_ids"]) * 0.5  # type: ignore[operator]
        loss: Tensor = self.model(inputs_embeds=embedded, labels=batch["labels"]).loss
        return loss


class Seeing(PlainDescent):
    """An image before each row."""

    def __init__(self) -> None:
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_id=IMAGE, vision_feature_layer=-1
        )
        super().__init__(LlavaForConditionalGeneration(config))

    def loss(self, batch: Any) -> Tensor:
        rows = batch["input_ids"].clamp(max=IMAGE - 1)
        tokens = torch.cat([torch.full((len(rows), 4), IMAGE), rows], 1)
        images = rows[:, :1, None, None].float().expand(-1, 3, 8, 8) / VOCABULARY
        loss: Tensor = self.model(input_ids=tokens, pixel_values=images, labels=tokens).loss
        return loss


class Patched(LlamaForCausalLM):  # type: ignore[misc]
    """Gives no logits when it is given labels, as models that are patched for fused losses do in training."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        output = super().forward(input_ids, labels=labels, **options)
        return output if labels is None else CausalLMOutputWithPast(loss=output.loss)


def patched(make: Make) -> Patched:
    model = make()
    ours = Patched(model.config)
    ours.load_state_dict(model.state_dict())
    return ours


def test_learning_without_forgetting_needs_the_logits_of_the_user_s_call(tiny_llama: Make) -> None:
    trainer = quiet_trainer(callbacks=[SelfGeneratedReplay("lwf")])
    with pytest.raises(MisconfigurationException, match="Patched returned none .*Switch the fused loss off"):
        trainer.fit(PlainDescent(patched(tiny_llama)), mapping_loader())


KINDS: dict[str, Callable[[Make], UserModule]] = {
    "mixture of experts with a router loss": lambda make: Router(),
    "loss from the model's own tokens": lambda make: FromTokens(OwnTokens(make())),
    "rows weighed by hand": lambda make: Weighted(make()),
    "packed rows": lambda make: Packed(make()),
    "logits_to_keep": lambda make: LastLogits(make()),
    "4-D masks": lambda make: Mask4D(make()),
    "inputs_embeds": lambda make: Embedded(make()),
    "image inputs": lambda make: Seeing(),
    "no logits beside labels": lambda make: PlainDescent(patched(make)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_user_s_step_is_as_it_was(tiny_llama: Make, kind: str) -> None:
    results = []
    sampling: dict[str, Any] = {"replay_fraction": 0.2, "refill_rows": 8, "sampling": Sampling(prompts=[[1]])}
    for replay in (None, SelfGeneratedReplay(coefficient=0.0, **sampling)):
        torch.manual_seed(0)
        module = KINDS[kind](tiny_llama)
        trainer = quiet_trainer(callbacks=[] if replay is None else [replay], max_steps=4)
        trainer.fit(module, mapping_loader(32))
        results.append((module, trainer))
    (plain, alone), (ours, replayed) = results
    assert ours.losses == plain.losses  # to the last bit
    assert torch.equal(weights(ours), weights(plain))
    assert replayed.callback_metrics["train/loss"] == alone.callback_metrics["train/loss"]
    for theirs, without in zip(ours.batches, plain.batches, strict=True):
        assert theirs.keys() == without.keys()
        assert all(torch.equal(theirs[name], without[name]) for name in theirs)
    # Replay took place: the divergence is that of a model that has been trained.
    assert float(replayed.callback_metrics["replay/loss"]) > 0
