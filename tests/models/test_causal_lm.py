import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from transformers.quantizers import HfQuantizer

from lightning_replay import CausalLM
from tests.helpers.modules import mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]


def test_a_local_folder_is_loaded_to_train(tiny_llama: Make, tmp_path: Path) -> None:
    original = tiny_llama().to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        module = CausalLM(folder)
        assert all(child.training for child in module.model.modules())
        for ours, saved in zip(module.model.parameters(), original.parameters(), strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, saved.float())
        assert module.hparams["model"] == str(tmp_path)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(tiny_llama: Make, schedule: Any) -> None:
    rates: list[float] = []

    class Rates(CausalLM):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    module = Rates(tiny_llama(), learning_rate=1.0, warmup_steps=3, schedule=schedule)
    quiet_trainer(max_steps=11, max_epochs=-1).fit(module, mapping_loader())
    after = [1.0] * 8 if schedule == "constant" else [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, *after])


def test_the_schedule_ends_with_the_epochs_where_no_steps_are_given(tiny_llama: Make) -> None:
    module = CausalLM(tiny_llama(), learning_rate=1.0)
    trainer = quiet_trainer(max_steps=-1, max_epochs=2)
    trainer.fit(module, mapping_loader())
    assert trainer.global_step == 16
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_only_matrices_are_decayed_and_frozen_weights_left_out(tiny_llama: Make) -> None:
    module = CausalLM(tiny_llama(), weight_decay=0.3)
    module.model.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
    module.trainer = quiet_trainer(max_steps=5)
    optimizer = cast("Any", module.configure_optimizers())["optimizer"]
    decayed, others = (group["params"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(parameter.dim() >= 2 for parameter in decayed)
    assert all(parameter.dim() == 1 for parameter in others)
    assert len(decayed) + len(others) == sum(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_model_options_are_handed_to_from_pretrained(tiny_llama: Make, name: str, dtype: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    options = {name: dtype, "attn_implementation": "eager", "max_position_embeddings": 48}
    module = CausalLM(tmp_path, model_options=options)
    assert {parameter.dtype for parameter in module.model.parameters()} == {torch.bfloat16}
    assert module.model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    assert module.model.config.max_position_embeddings == 48  # type: ignore[union-attr]
    assert module.hparams["model_options"]["attn_implementation"] == "eager"
    kept = CausalLM(tmp_path, model_options={"attn_implementation": "eager"})
    assert {parameter.dtype for parameter in kept.model.parameters()} == {torch.float32}


def test_model_options_without_effect_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`model_options` are for loading .* LlamaForCausalLM that is loaded already"):
        CausalLM(tiny_llama(), model_options={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
        CausalLM(tmp_path, model_options={"trust_remote_code": True})


def weights(module: CausalLM) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("method", ["gguf", "bitsandbytes_8bit"])
def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(
    tiny_llama: Make, method: str, tmp_path: Path
) -> None:
    class Refusing(HfQuantizer):  # type: ignore[misc]
        """A quantizer whose weights can't be written."""

        def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None: ...

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None: ...

        def is_serializable(self, *args: Any, **options: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    model: Any = tiny_llama()
    model.hf_quantizer = Refusing(SimpleNamespace(quant_method=method))
    module = CausalLM(model, save_to=tmp_path / "saved")
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=f"can't save this Llama.*quantized with {method}.*`save_to`"):
        quiet_trainer(max_steps=1).fit(module, mapping_loader())
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    assert not list((tmp_path / "saved").iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tiny_llama: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        module = CausalLM(tiny_llama(), save_to=folder)
        before = weights(module)
        with pytest.raises(MisconfigurationException, match="`save_to='.*file.*'` can't be written.*Pass a folder"):
            quiet_trainer(max_steps=1).fit(module, mapping_loader())
        assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


def test_an_adapter_that_cannot_be_merged_is_refused_before_the_first_step(tiny_llama: Make, tmp_path: Path) -> None:
    adapter = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
    module = CausalLM(tiny_llama(), adapter=adapter, save_to=tmp_path)
    with pytest.raises(MisconfigurationException, match="PeftModelForCausalLM can't be merged"):
        quiet_trainer(max_steps=1).fit(module, mapping_loader())


@pytest.mark.parametrize("adapter", [None, {"peft_type": "LORA", "r": 2}])
def test_trying_to_save_leaves_the_model_and_the_folder_as_they_were(
    tiny_llama: Make, adapter: Any, tmp_path: Path
) -> None:
    seen: list[Any] = []

    class Seen(CausalLM):
        def on_train_start(self) -> None:
            seen.append((list(tmp_path.iterdir()), base.config.to_dict()))

    module = Seen(tiny_llama(), adapter=adapter, save_to=tmp_path)
    model: Any = module.model
    base = model.get_base_model() if adapter else model
    configuration = base.config.to_dict()
    quiet_trainer(max_steps=1).fit(module, mapping_loader())
    assert seen == [([], configuration)]
    saved = LlamaForCausalLM.from_pretrained(tmp_path)
    merged = copy.deepcopy(model).merge_and_unload() if adapter else model
    for ours, theirs in zip(merged.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_validation_loss_is_that_of_all_target_tokens(tiny_llama: Make) -> None:
    module = CausalLM(tiny_llama(initializer_range=1.0))
    batches = list(mapping_loader(16))
    batches[0]["labels"][:, :-1] = -100  # fewer targets than in the others
    batches[1]["labels"][:, 1:] = -100  # none
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    losses, targets = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits, labels = module.eval()(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
            losses += float(F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum"))
            targets += int((labels != -100).sum())
    (logged,) = quiet_trainer().validate(module, loader, verbose=False)
    assert logged["val/loss"] == pytest.approx(losses / targets, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "`learning_rate`"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"schedule": "linear"}, "'cosine', 'constant'"),
    ],
)
def test_arguments_out_of_range_are_refused(tiny_llama: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLM(tiny_llama(), **arguments)


def _warnings_of_a_fit(module: CausalLM, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(max_epochs=-1, **options).fit(module, mapping_loader())
    return [str(each.message) for each in caught if "has not clearly fallen" in str(each.message)]


def test_a_fit_whose_loss_has_not_fallen_by_more_than_its_noise_says_so(tiny_llama: Make) -> None:
    module = CausalLM(tiny_llama(), learning_rate=1e-7, schedule="constant")
    (warning,) = _warnings_of_a_fit(module, max_steps=24)
    assert module.fall is not None
    fall, error = module.fall
    assert fall <= error
    assert f"by {fall:.2g} ± {error:.2g} nats a token at a learning rate of 1e-07" in warning


def test_no_such_warning_where_the_loss_falls_or_there_are_few_batches(tiny_llama: Make) -> None:
    learns = CausalLM(tiny_llama(), learning_rate=1e-2, schedule="constant")
    assert _warnings_of_a_fit(learns, max_steps=24) == []
    assert learns.fall is not None
    assert learns.fall[0] > learns.fall[1]
    short = CausalLM(tiny_llama(), learning_rate=1e-7)
    assert _warnings_of_a_fit(short, max_steps=15) == []
    assert short.fall is None


def test_a_resumed_fit_is_not_judged_by_what_is_left_of_it(tiny_llama: Make, tmp_path: Path) -> None:
    first = CausalLM(tiny_llama(), learning_rate=1e-7, schedule="constant")
    trainer = quiet_trainer(max_epochs=-1, max_steps=20)
    trainer.fit(first, mapping_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = CausalLM(tiny_llama(), learning_rate=1e-7, schedule="constant")
    trainer = quiet_trainer(max_epochs=-1, max_steps=60)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(second, mapping_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == 60
    assert second.fall is None
    assert not [each for each in caught if "clearly fallen" in str(each.message)]
