"""A reference that is another model than the one that trains."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from lightning_replay import KL, LwF, Model, SelfGeneratedReplay, forward_kl
from lightning_replay.callbacks.replay_loss import ReplayLoss
from lightning_replay.references.reference import reference_of
from tests.helpers.modules import HandWritten, UserModule, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]


class Watched(SelfGeneratedReplay):
    """Keeps the rows and the replay loss of each step."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        self.__dict__.setdefault("losses", []).append(self.step.last_loss)
        self.__dict__.setdefault("seen", []).append(None if self.drawn is None else self.drawn.tokens)


def fit(
    model: nn.Module,
    reference: Any,
    steps: int = 3,
    coefficient: float = 0.0,
    loss: ReplayLoss = KL(),  # noqa: B008
    checkpoints: Path | None = None,
    **options: Any,
) -> tuple[Watched, UserModule]:
    fractions = {} if isinstance(loss, LwF) else {"replay_fraction": 0.2, "refill_rows": 8}
    replay = Watched(loss, coefficient, reference, seed=0, **fractions)  # type: ignore[arg-type]
    savers = [] if checkpoints is None else [ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=2)]
    trainer = quiet_trainer(max_steps=steps, callbacks=[replay, *savers], enable_checkpointing=bool(savers))
    module = UserModule(model)
    trainer.fit(module, mapping_loader(rows=8), **options)  # each epoch is a batch, so that one follows a checkpoint
    return replay, module


def divergence(teacher: nn.Module, model: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        return float(forward_kl(model(rows[:, :-1]).logits, teacher(rows[:, :-1]).logits))


@pytest.mark.parametrize("given", ["module", "folder", "path", "lightning module"])
def test_the_loss_is_the_divergence_from_it_on_its_own_samples(tiny_llama: Make, tmp_path: Path, given: str) -> None:
    teacher = tiny_llama(seed=7, hidden_size=32, num_hidden_layers=1)
    teacher.save_pretrained(tmp_path)
    references: dict[str, Any] = {
        "module": teacher,
        "folder": Model(str(tmp_path)),
        "path": Model(tmp_path, dtype=torch.float64),
        "lightning module": Model(UserModule(teacher)),
    }
    replay, _ = fit(tiny_llama(), references[given])
    first = replay.__dict__
    assert float(first["losses"][0]) == pytest.approx(divergence(teacher, tiny_llama(), first["seen"][0]), rel=1e-4)
    # Its samples, which the model that trains would not have drawn.
    expected, _ = fit(teacher, "copy", coefficient=0.0)
    assert torch.equal(first["seen"][0], expected.__dict__["seen"][0])


def test_it_also_works_on_the_new_rows_and_beside_an_adapter(tiny_llama: Make) -> None:
    teacher, adapted = tiny_llama(seed=7), get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    replay, _ = fit(adapted, teacher, loss=LwF())
    (rows,) = [batch["input_ids"] for batch, _ in zip(mapping_loader(rows=8), range(1), strict=False)]
    assert float(replay.__dict__["losses"][0]) == pytest.approx(divergence(teacher, tiny_llama(), rows), rel=1e-4)


def test_a_quantized_folder_can_be_the_reference(tiny_llama: Make, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is an extra")
    from transformers import TorchAoConfig

    options = {"hidden_size": 32, "intermediate_size": 64}
    tiny_llama(seed=7, **options).save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    replay, _ = fit(tiny_llama(), Model(tmp_path, quantization_config=config))
    exact = divergence(tiny_llama(seed=7, **options), tiny_llama(), replay.__dict__["seen"][0])
    assert float(replay.__dict__["losses"][0]) == pytest.approx(exact, rel=0.05)
    assert float(replay.__dict__["losses"][0]) != pytest.approx(exact, rel=1e-5)


def test_modes_gradients_and_weights_of_a_given_module_stay(tiny_llama: Make) -> None:
    teacher = tiny_llama(seed=7).train()
    teacher.lm_head.weight.requires_grad_(False)
    before = {name: (weight.clone(), weight.requires_grad) for name, weight in teacher.named_parameters()}
    fit(tiny_llama(), teacher, coefficient=1.0)
    assert all(part.training for part in teacher.modules())
    for name, weight in teacher.named_parameters():
        assert torch.equal(weight, before[name][0])
        assert weight.requires_grad == before[name][1]
        assert weight.grad is None


def test_a_run_resumes_bit_for_bit_and_its_checkpoint_holds_no_second_model(tiny_llama: Make, tmp_path: Path) -> None:
    def teacher() -> LlamaForCausalLM:
        return tiny_llama(seed=7, hidden_size=64)

    _, ended = fit(tiny_llama(), teacher(), 3, 1.0, checkpoints=tmp_path)
    path = tmp_path / "step=2.ckpt"
    assert path.stat().st_size < sum(weight.nbytes for weight in teacher().parameters())
    _, resumed = fit(tiny_llama(), teacher(), 3, 1.0, ckpt_path=path)
    for one, other in zip(ended.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(MisconfigurationException, match=r"resumes with another reference .* LlamaForCausalLM now"):
        fit(tiny_llama(), tiny_llama(seed=8, hidden_size=64), 4, 1.0, ckpt_path=path)


def test_a_run_without_replay_can_go_on_with_it(tiny_llama: Make, tmp_path: Path) -> None:
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(UserModule(tiny_llama()), mapping_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    replay, _ = fit(tiny_llama(), tiny_llama(seed=7), 4, ckpt_path=tmp_path / "half.ckpt")
    assert len(replay.__dict__["losses"]) == 2


def _shares(model: LlamaForCausalLM) -> nn.Module:
    other = LlamaForCausalLM(model.config)
    other.lm_head.weight = model.lm_head.weight
    shared: nn.Module = other
    return shared


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (lambda make, _: make(seed=7, vocab_size=65), r"has 65 logits a token, and the model .* has 64: .*tokenizer"),
        (lambda _, model: model, r"computes with weights of the model that trains, in `\(the model itself\)`"),
        (lambda _, model: _shares(model), r"in `lm_head` \(Linear\), so it would follow it.*copy.deepcopy"),
        (lambda *_: Model("no/such folder"), r"'no/such folder' can't be loaded: "),
        (lambda *_: nn.Linear(3, 3), r"No next-token logits were found at Linear"),
        (lambda make, _: make(max_position_embeddings=8), r"Samples of 12 tokens don't fit LlamaForC.* takes 8 at"),
    ],
    ids=["vocabulary", "itself", "a shared head", "no folder", "no language model", "shorter rows"],
)
def test_what_cannot_be_compared_is_refused_before_the_first_step(
    tiny_llama: Make, reference: Callable[[Make, Any], Any], message: str
) -> None:
    model = tiny_llama(vocab_size=64)
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, reference(lambda **options: tiny_llama(**{"vocab_size": 64} | options), model), coefficient=1.0)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_a_folder_with_another_tokenizer_of_the_same_size_is_refused(
    tiny_llama: Make, real_data: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tinystories-656k")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(real_data / "tinystories-656k" / name, tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    words = [token for token in tokenizer.get_vocab() if token.isalpha() and len(token) > 3][:2]
    tiny_llama(vocab_size=2048).save_pretrained(tmp_path)

    def begin() -> None:
        replay = SelfGeneratedReplay(reference=Model(tmp_path), replay_fraction=0.2, tokenizer=tokenizer, refill_rows=8)
        quiet_trainer(max_steps=1, callbacks=[replay]).fit(UserModule(tiny_llama(vocab_size=2048)), mapping_loader())

    begin()
    one, other = (f'"{word}":' for word in words)
    assert one in text
    (tmp_path / "tokenizer.json").write_text(text.replace(one, "\0").replace(other, one).replace("\0", other))
    with pytest.raises(MisconfigurationException, match=r"another tokenizer than the run: 2 tokens differ"):
        begin()


def test_what_is_given_is_checked_at_once(tiny_llama: Make) -> None:
    with pytest.raises(TypeError, match=r"is loaded already, and \['dtype'\], which are for loading a folder"):
        Model(HandWritten(), dtype=torch.float16)
    with pytest.raises(TypeError, match=r"a module, a folder or a name; got 3"):
        Model(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got 'some/folder'. A model's folder or name is given as Model\('some/fol"):
        reference_of("some/folder")  # type: ignore[arg-type]
    module = tiny_llama()
    assert reference_of(module) == Model(module)
    assert repr(Model(module)) == "Model(LlamaForCausalLM)"
