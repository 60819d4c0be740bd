"""Values under every precision equal those computed by hand, in 64 bits, from the logits of the same model."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_replay import EMA, KL, Cached, Copy, ForgettingMonitor, ReplayDataModule, SelfGeneratedReplay
from tests.helpers.modules import PlainDescent, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]

PRECISIONS = ["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed"]
DECAY = 0.5
TOP_K = 4
REFERENCES: dict[str, Callable[[], Any]] = {
    "copy": Copy,
    "adapter": lambda: "adapter",
    "cached": lambda: Cached(top_k=TOP_K),
    "ema": lambda: EMA(decay=DECAY),
}
DIVERGENCES = {
    "kl": KL(),
    "softened": KL(temperature=2.0),
    "reverse": KL("reverse"),
    "jensen_shannon": KL("jensen_shannon", temperature=2.0),
}


def divergence_by_hand(kind: str, log_p: Tensor, log_pi: Tensor) -> Tensor:
    """Of normalized log-probabilities in 64 bits, at each position."""
    p, pi = log_p.exp(), log_pi.exp()
    if kind == "reverse":
        return (p * (log_p - log_pi)).sum(-1)
    if kind == "jensen_shannon":
        log_m = ((p + pi) / 2).log()
        return (p * (log_p - log_m) + pi * (log_pi - log_m)).sum(-1) / 2
    return (pi * (log_pi - log_p)).sum(-1)


def in_buckets(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some tokens and of all others together."""
    chosen = log_probs.gather(-1, ids)
    return torch.cat([chosen, (1 - chosen.exp().sum(-1, keepdim=True)).log()], -1)


class ByHand(L.Callback):
    """Computes the replay loss of each step by hand, before the step, and keeps what was logged after it."""

    def __init__(self, replay: SelfGeneratedReplay, loss: str, reference: str) -> None:
        self.replay, self.loss, self.reference = replay, loss, reference
        self.model: Any = None
        self.before: Any = None
        self.expected: list[float] = []
        self.logged: list[float] = []
        self.dtypes: set[torch.dtype] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.model = pl_module.model
        self.before = copy.deepcopy(self.model)
        self.before.eval()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        drawn = self.replay.drawn
        if self.loss == "lwf":
            tokens, mask = batch["input_ids"], torch.ones(batch["input_ids"][:, 1:].shape, dtype=torch.bool)
        else:
            assert drawn is not None
            tokens, mask = drawn.tokens.long(), drawn.targets_mask
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            logits, reference = (model(tokens[:, :-1]).logits for model in (self.model, self.before))
        self.dtypes |= {logits.dtype, reference.dtype}
        temperature = getattr(DIVERGENCES.get(self.loss), "temperature", 1.0)
        ours, theirs = ((each.double() / temperature).log_softmax(-1) for each in (logits, reference))
        if self.loss == "ntp":
            values = F.cross_entropy(logits.double().mT, tokens[:, 1:], reduction="none")
        elif self.reference == "cached":
            assert drawn is not None
            assert drawn.top_ids is not None
            assert drawn.top_log_probs is not None
            cached = drawn.top_log_probs.double()
            values = divergence_by_hand(self.loss, in_buckets(ours, drawn.top_ids.long()), cached.log_softmax(-1))
            if batch_idx == 0:  # rounded to 16 bits, or computed without the autocast of the step
                torch.testing.assert_close(cached, in_buckets(theirs, drawn.top_ids.long()), atol=0.05, rtol=0.05)
        else:
            values = divergence_by_hand(self.loss, ours, theirs)
        self.expected.append(float(values[mask].mean()))

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.logged.append(float(trainer.callback_metrics["replay/loss"]))
        if self.reference == "ema":
            for average, weight in zip(self.before.parameters(), self.model.parameters(), strict=True):
                average.data.lerp_(weight.detach(), 1 - DECAY)


def compared(model: Any, precision: Any, loss: str, reference: str) -> ByHand:
    replay = SelfGeneratedReplay(
        DIVERGENCES.get(loss, loss),  # type: ignore[arg-type]
        coefficient=1.0,
        reference=REFERENCES[reference](),
        replay_fraction=None if loss == "lwf" else 0.2,
        seed=0,
    )
    by_hand = ByHand(replay, loss, reference)
    trainer = quiet_trainer(max_steps=3, precision=precision, callbacks=[replay, by_hand])
    trainer.fit(PlainDescent(model), mapping_loader())
    return by_hand


CASES = [(loss, "copy") for loss in [*DIVERGENCES, "ntp", "lwf"]]
CASES += [(loss, reference) for reference in ("adapter", "cached", "ema") for loss in ("softened", "jensen_shannon")]
CASES += [("lwf", "adapter"), ("lwf", "ema")]


@pytest.mark.parametrize(("loss", "reference"), CASES, ids=[", ".join(case) for case in CASES])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_replay_loss_is_that_of_a_computation_in_64_bits_on_the_same_logits(
    tiny_llama: Make, precision: str, loss: str, reference: str
) -> None:
    model: Any = tiny_llama()
    if reference == "adapter":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
    by_hand = compared(model, precision, loss, reference)
    types = {"32": torch.float32, "64": torch.float64, "16": torch.float16, "bf16": torch.bfloat16}
    assert by_hand.dtypes == {types[precision.partition("-")[0]]}
    assert by_hand.logged == pytest.approx(by_hand.expected, rel=1e-5, abs=2e-7)
    assert by_hand.logged[2] > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_join_the_batch_under_every_precision(tiny_llama: Make, precision: Any) -> None:
    module, data = PlainDescent(tiny_llama()), ReplayDataModule(mapping_loader(), 0.2)
    quiet_trainer(precision=precision, callbacks=[SelfGeneratedReplay("mixed", seed=0)]).fit(module, datamodule=data)
    assert [len(batch["input_ids"]) for batch in module.batches] == [10] * 6
    assert all(loss > 0 for loss in module.losses)


class AtTheEnd(L.Callback):
    """Measures by hand what a monitor measures, a row at a time."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.measured: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before: Any = copy.deepcopy(pl_module.model)
        self.measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.measure(trainer, pl_module)

    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model: Any = pl_module.model
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            logits, reference = (each(self.rows).logits[:, :-1] for each in (model, self.before))
        targets = self.rows[:, 1:]
        ours, theirs = (each.double().log_softmax(-1) for each in (logits, reference))
        self.measured.append(
            {
                "prior_loss/rows": float(-ours.gather(2, targets[..., None]).mean()),
                "prior_accuracy/rows": float((logits.argmax(-1) == targets).double().mean()),
                "prior_kl/rows": float(divergence_by_hand("kl", ours, theirs).mean()),
            }
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_monitor_measures_what_a_computation_in_64_bits_does_on_the_same_logits(
    tiny_llama: Make, precision: Any, tmp_path: Path
) -> None:
    rows: Any = mapping_loader(24, batch_size=8)
    monitor = ForgettingMonitor({"rows": rows})
    by_hand = AtTheEnd(rows.dataset.tokens)
    trainer = quiet_trainer(max_steps=4, precision=precision, callbacks=[monitor, by_hand])
    trainer.fit(PlainDescent(tiny_llama()), mapping_loader())
    start, end = by_hand.measured
    assert monitor.baseline["rows"] == pytest.approx(start["prior_loss/rows"], rel=1e-6)
    for key, value in end.items():
        assert float(trainer.callback_metrics[key]) == pytest.approx(value, rel=1e-5)
    rise = end["prior_loss/rows"] - start["prior_loss/rows"]
    assert float(trainer.callback_metrics["forgetting/rows"]) == pytest.approx(rise, rel=1e-4)
    assert end["prior_kl/rows"] > 0
