"""What is promised, on CUDA: ``pytest -m gpu``. As far as a test tells something new there, it also runs on the CPU."""

import gc
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

import lightning_replay
from lightning_replay import (
    Copy,
    ForgettingBudget,
    ForgettingMonitor,
    ReplayBuffer,
    ReplayDataModule,
    ReplayRows,
    Sampling,
    SelfGeneratedReplay,
    forward_kl,
    linear_divergence,
    linear_next_token_loss,
)
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import find_language_model
from lightning_replay.references.models import FrozenCopy
from lightning_replay.references.offloaded import OffloadedCopy
from lightning_replay.sampling.draw import sample_rows
from lightning_replay.utilities.seeds import own_randomness
from tests.helpers.by_hand import ByHand, weights
from tests.helpers.modules import VOCABULARY, DrawnRows, PlainDescent, UserModule, mapping_loader, quiet_trainer

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms; read when CUDA begins

Make = Callable[..., LlamaForCausalLM]

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]
EPS = {name: torch.finfo(torch.float32 if name == "32-true" else torch.bfloat16).eps for name in PRECISIONS}
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
LARGE = 128_256
"""The vocabulary of Llama 3."""

ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, and torch finds none here"),
]


def cuda_only(test: Any) -> Any:
    for mark in ON_CUDA:
        test = mark(test)
    return test


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_CUDA)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu") if request.param == "cpu" else torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """What ``Trainer(deterministic=True)`` and tests of precision set is set for the whole process."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
    torch.set_float32_matmul_precision(precision)


def trainer_on(device: torch.device, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    given: dict[str, Any] = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1}
    return quiet_trainer(**given | {"deterministic": True, "callbacks": list(callbacks)} | options)


def replay_of(loss: Any = "kl", **options: Any) -> SelfGeneratedReplay:
    defaults: dict[str, Any] = {
        "coefficient": 2.0,
        "replay_fraction": 0.2,
        "refill_rows": 8,
        "seed": 3,
        "sampling": Sampling(length=12),
    }
    return SelfGeneratedReplay(loss, **defaults | options)


def relative(found: Tensor, expected: Tensor) -> float:
    """How far two tensors are apart, relative to the norm of the second."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


class Gradients(L.Callback):
    """Keeps the gradients of the last step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.last = torch.cat([part.grad.flatten().float().cpu() for part in pl_module.parameters()])


class RandomStates(L.Callback):
    """Keeps the global random states before each step."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.states.append(random_state(pl_module.device))


def random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return state if device.type == "cpu" else torch.cat([state, torch.cuda.get_rng_state(device)])


def is_equal(some: Any, other: Any) -> bool:
    return len(some) == len(other) and all(map(torch.equal, some, other))


# The user's step


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_user_s_run_is_as_it_was_to_the_last_bit(tiny_llama: Make, device: torch.device, precision: str) -> None:
    """Without replay rows, the whole run; with rows of no weight also what the step sees, dropout included."""
    results = []
    for options in (None, {"replay_fraction": 0.0}, {"coefficient": 0.0}):
        torch.manual_seed(0)
        module, states = PlainDescent(tiny_llama(attention_dropout=0.1)), RandomStates()
        replay = [] if options is None else [replay_of(**options)]
        trainer_on(device, *replay, states, precision=precision, max_steps=4).fit(module, mapping_loader(32))
        results.append((module, states))
    (plain, states), *others = results
    assert plain.batches[0]["input_ids"].device == device
    assert not torch.equal(weights(plain).float(), weights(tiny_llama()))
    for ours, their_states in others:
        assert torch.equal(weights(ours), weights(plain))
        assert ours.losses == plain.losses
        assert is_equal(their_states.states, states.states)
        for seen, expected in zip(ours.batches, plain.batches, strict=True):
            assert seen.keys() == expected.keys()
            assert is_equal(list(seen.values()), list(expected.values()))


# Losses and their gradients


@pytest.mark.parametrize("vocabulary", [VOCABULARY, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_kl_is_the_difference_of_the_probabilities(
    device: torch.device, dtype: torch.dtype, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = (3 * torch.randn(2, 2, 5, vocabulary, generator=generator)).to(device, dtype)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool, device=device)
    loss = forward_kl(logits.requires_grad_(), reference, mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact, log_pi = logits.detach().double().log_softmax(-1), reference.double().log_softmax(-1)
    by_hand = (exact.exp() - log_pi.exp()) * mask.unsqueeze(-1) / mask.sum()
    # A log-softmax of these sizes is off by some eps in 32 bits; the gradient is then rounded once to its own type.
    assert relative(loss, ((log_pi.exp() * (log_pi - exact)).sum(-1) * mask).sum() / mask.sum()) < 1e-5
    assert relative(gradient, by_hand) < 1e-5 + torch.finfo(dtype).eps / 2
    assert not gradient[~mask].any()


@pytest.mark.parametrize("vocabulary", [1000, LARGE])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_of_the_head_in_chunks_equal_those_by_hand_in_64_bits(
    device: torch.device, precision: str, vocabulary: int
) -> None:
    if device.type == "cpu" and vocabulary == LARGE:
        pytest.skip("slow on a CPU, and no other code")
    width, generator = 32, torch.Generator().manual_seed(0)
    shapes = ((2, 100, width), (vocabulary, width), (2, 100, width), (vocabulary, width))
    made = [torch.randn(*shape, generator=generator) for shape in shapes]
    hidden, weight, reference_hidden, reference_weight = (
        (part / (width**0.25 if len(part.shape) == 2 else 1)).to(device, DTYPES[precision]) for part in made
    )
    mask = torch.rand(2, 100, generator=generator).to(device) < 0.7
    targets = torch.randint(vocabulary, (2, 100), generator=generator).to(device)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        losses = [
            linear_divergence(hidden, weight, reference_hidden, reference_weight, mask=mask),
            linear_next_token_loss(hidden, weight, targets, mask=mask),
        ]
    for number, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, inputs)
        exact = [part.detach().double()[mask] if part.dim() == 3 else part.detach().double() for part in inputs]
        ours, theirs = exact[0].requires_grad_(), exact[1].requires_grad_()
        log_p = (ours @ theirs.T).log_softmax(-1)
        if number:
            expected = -log_p.gather(1, targets[mask].unsqueeze(1)).mean()
        else:
            log_pi = (reference_hidden.double()[mask] @ reference_weight.double().T).log_softmax(-1)
            expected = (log_pi.exp() * (log_pi - log_p)).sum(-1).mean()
        by_hand = torch.autograd.grad(expected, (ours, theirs))
        # A logit of 16 bits is off by eps / 4 of its size, here up to 16, and so are the probabilities.
        allowed = (128 if precision == "32-true" else 4) * EPS[precision]
        assert relative(loss, expected) < allowed
        assert relative(gradients[0][mask], by_hand[0]) < allowed
        assert relative(gradients[1], by_hand[1]) < allowed


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gradient_of_a_step_with_replay_is_that_of_a_step_written_by_hand(
    tiny_llama: Make, device: torch.device, precision: str
) -> None:
    """The reference is another model, so that the divergence is not zero in the first step."""
    drawn, ours = DrawnRows(), Gradients()
    other = tiny_llama(1).to(device, DTYPES[precision])
    replay = replay_of(coefficient=10.0, reference=other, replay_fraction=None)
    data = ReplayDataModule(mapping_loader(), 0.2)
    trainer_on(device, replay, drawn, ours, precision=precision, max_steps=1).fit(
        PlainDescent(tiny_llama()), datamodule=data
    )
    found = {}
    rows = [rows.to(device) for rows in drawn.rows]
    for coefficient in (0.0, 10.0):
        module, gradients = ByHand(tiny_llama(), other, rows, "kl", coefficient), Gradients()
        trainer_on(device, gradients, precision=precision, max_steps=1).fit(module, mapping_loader())
        found[coefficient] = gradients.last
    # Rounding of each of some ten layers adds up; 16 bits are coarse, and yet far finer than what replay adds.
    allowed = (256 if precision == "32-true" else 16) * EPS[precision]
    assert relative(ours.last, found[10.0]) < allowed < 0.2 * relative(found[0.0], found[10.0])


# Samples


def plain_log_probs(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("deterministic", [False, True])
def test_samples_are_those_of_a_loop_without_a_cache(
    tiny_llama: Make, device: torch.device, deterministic: bool
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    module = tiny_llama().to(device).eval()
    model = find_language_model(module, None)
    assert model.has_cache
    before = random_state(device)
    with torch.no_grad():
        samples = sample_rows(model, [[1]] * 64, 24, torch.Generator().manual_seed(5))
    assert torch.equal(random_state(device), before)
    assert samples.tokens.device == device
    numbers = torch.rand(64, 23, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    tokens = torch.ones(64, 1, dtype=torch.int64)
    for position in range(23):
        cumulative = plain_log_probs(module, tokens.to(device))[:, -1].cpu().exp().cumsum(-1)
        drawn = (cumulative <= numbers[:, position, None]).sum(1, keepdim=True)
        tokens = torch.cat([tokens, drawn], 1)
    # A number within rounding of the border between two tokens may fall on the other side: none of these does.
    assert torch.equal(samples.tokens.cpu(), tokens)


@pytest.mark.parametrize(
    ("precision", "vocabulary"), [*((name, VOCABULARY) for name in PRECISIONS), ("32-true", LARGE)]
)
def test_each_token_is_where_its_random_number_falls_in_the_plain_forward_s_distribution(
    tiny_llama: Make, device: torch.device, precision: str, vocabulary: int
) -> None:
    if device.type == "cpu" and vocabulary == LARGE:
        pytest.skip("slow on a CPU, and no other code")
    module = tiny_llama(vocab_size=vocabulary).to(device, DTYPES[precision]).eval()
    rows, length = (256, 16) if vocabulary == VOCABULARY else (16, 8)
    model = find_language_model(module, None)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        samples = sample_rows(model, [[1]] * rows, length, torch.Generator().manual_seed(5))
        log_probs = plain_log_probs(module, samples.tokens[:, :-1])
    numbers = torch.rand(rows, length - 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(device)
    places = samples.tokens[:, 1:, None]
    above = log_probs.exp().cumsum(-1).gather(2, places)[..., 0]
    chosen = log_probs.gather(2, places)[..., 0]
    # 16 bits are off by eps / 4 of logits of about 8, in each of some layers; it is 0.06 of a distribution.
    allowed = 64 * EPS[precision] if precision == "32-true" else 8 * EPS[precision]
    assert bool((numbers < above + allowed).all())
    assert bool((numbers > above - chosen.exp() - allowed).all())
    assert float((samples.log_probs[:, 1:].double() - chosen).abs().mean()) < allowed  # type: ignore[index]
    # And so tokens are as frequent as they should be, to four standard errors.
    expected = log_probs[0, 0].exp()
    frequency = torch.bincount(samples.tokens[:, 1].cpu(), minlength=vocabulary).to(device) / rows
    assert bool(((frequency - expected).abs() <= 4 * (expected / rows).sqrt() + 1 / rows + allowed).all())


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@cuda_only
def test_cache_and_head_are_found_in_every_precision_of_multiplications(tiny_llama: Make, matmul: str) -> None:
    """TF32 makes rounding larger than 32-bit floats suggest."""
    torch.set_float32_matmul_precision(matmul)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4}
    for dtype in (torch.float32, torch.bfloat16):
        module = tiny_llama(**sizes, vocab_size=1024, initializer_range=0.02).to("cuda", dtype)
        model = find_language_model(module, None)
        assert model.has_cache, dtype
        assert OutputHeads().of(model) is not None, dtype


def test_random_numbers_of_replay_s_own_depend_on_their_key_alone(device: torch.device) -> None:
    drawn, before = [], random_state(device)
    for key in (1, 1, 2):
        torch.rand(3, device=device)
        now = random_state(device)
        with own_randomness(device, key):
            drawn.append(torch.rand(3, device=device))
        assert torch.equal(random_state(device), now)
    assert not torch.equal(now, before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# The reference


class Asked(L.Callback):
    """Asks the reference at the start and the end of a fit, where model and reference are."""

    def __init__(self, replay: SelfGeneratedReplay) -> None:
        self.replay = replay
        self.answers: list[tuple[Tensor, Tensor]] = []
        self.tokens = torch.randint(3, VOCABULARY, (8, 10), generator=torch.Generator().manual_seed(7))

    def ask(self, pl_module: Any) -> None:
        taken = self.replay.reference.taken
        assert taken is not None
        tokens = self.tokens.to(pl_module.device)
        with taken.active() as reference:
            theirs = reference.logits(tokens)
        was_training = pl_module.training
        with torch.no_grad():
            self.answers.append((pl_module.model.eval()(tokens).logits.float(), theirs.float()))
        pl_module.model.train(was_training)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ask(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ask(pl_module)


def adapted(make: Make) -> nn.Module:
    peft = pytest.importorskip("peft", reason="PEFT is an extra")
    module: nn.Module = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return module


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["copy", "offloaded", "int8", "offloaded int8", "adapter"])
def test_the_reference_stays_the_model_before_the_fit(
    tiny_llama: Make, device: torch.device, precision: str, kind: str
) -> None:
    if "int8" in kind:
        pytest.importorskip("torchao", reason="torchao is an extra")
    if device.type == "cpu" and precision != "32-true":
        pytest.skip("on the CPU, other tests have this")
    quantize: Any = "int8" if "int8" in kind else None
    reference = "adapter" if kind == "adapter" else Copy(offload="offloaded" in kind, quantize=quantize)
    torch.manual_seed(0)
    module = adapted(tiny_llama) if kind == "adapter" else tiny_llama()
    replay = replay_of(reference=reference)
    asked = Asked(replay)
    trainer = trainer_on(device, replay, asked, precision=precision, max_steps=6, deterministic=False)
    trainer.fit(PlainDescent(module, 0.3), mapping_loader())
    (before, at_start), (after, at_end) = asked.answers
    allowed = 0.1 if quantize else EPS[precision]  # 8 bits a weight: their steps are 1/127 of the row's largest
    assert relative(at_start, before) <= allowed
    assert relative(at_end, at_start) <= EPS[precision]
    assert relative(after, before) > 2 * allowed


@cuda_only
def test_offloaded_weights_compute_as_those_that_stay(tiny_llama: Make) -> None:
    module = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=6).to("cuda")
    model = find_language_model(module, None)
    tokens = torch.randint(VOCABULARY, (8, 10), device="cuda")
    with FrozenCopy(model).active() as copy, OffloadedCopy(model, device="cpu").active() as offloaded:
        weights_at_home = list(offloaded.module.parameters())
        assert all(weight.device.type == "cpu" and weight.is_pinned() for weight in weights_at_home)
        for _ in range(3):  # from the second on, weights are fetched ahead
            torch.testing.assert_close(offloaded.logits(tokens), copy.logits(tokens), rtol=0, atol=0)


# Whole fits


def run(
    make: Make, device: torch.device, *callbacks: L.Callback, replay: dict[str, Any], **options: Any
) -> tuple[Tensor, dict[str, float], list[Tensor]]:
    """A fit; its weights, the figures it has logged and the rows it has drawn."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"max_steps": 8}
    drawn, ckpt_path = Drawn(), options.pop("ckpt_path", None)
    defaults["enable_checkpointing"] = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    drawn.replay = replay_of(**replay)
    trainer = trainer_on(device, drawn.replay, drawn, *callbacks, **defaults | options)
    module = UserModule(make())
    trainer.fit(module, mapping_loader(32), ckpt_path=ckpt_path)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if "seconds" not in name}
    return weights(module).cpu(), figures, drawn.rows


class Drawn(L.Callback):
    replay: SelfGeneratedReplay

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def on_train_batch_start(self, *args: Any) -> None:
        assert self.replay.drawn is not None
        self.rows.append(self.replay.drawn.tokens)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_uninterrupted_one(
    tiny_llama: Make, device: torch.device, precision: str, tmp_path: Path
) -> None:
    """To the last bit, with deterministic algorithms; the budget, the reference and the buffer included."""
    if device.type == "cpu" and precision == "bf16-mixed":
        pytest.skip("on the CPU, other tests have this")
    options: dict[str, Any] = {
        "replay": {"coefficient": ForgettingBudget(0.01), "refill_rows": 6, "uses_per_sample": 2},
        "precision": precision,
    }
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    straight = run(tiny_llama, device, saving, **options)
    resumed = run(tiny_llama, device, **options, ckpt_path=tmp_path / "step=4.ckpt")
    assert torch.equal(resumed[0], straight[0])
    assert resumed[1] == straight[1]
    assert "replay/drift" in resumed[1]
    assert is_equal(resumed[2], straight[2][4:])


def test_refills_in_the_background_change_nothing(tiny_llama: Make, device: torch.device) -> None:
    found = [
        run(tiny_llama, device, replay={"refill_rows": 4, "uses_per_sample": 1, "background": background})
        for background in (False, True)
    ]
    assert len({tuple(rows.flatten().tolist()) for rows in found[0][2]}) == 8  # a refill every other step
    assert torch.equal(found[0][0], found[1][0])
    assert is_equal(found[0][2], found[1][2])
    assert not [each for each in threading.enumerate() if each.name.startswith("replay-refill")]


@pytest.mark.parametrize(
    "replay",
    [{"coefficient": ForgettingBudget(0.01)}, {"reference": "cached"}, {"loss": "ntp"}, {"loss": "lwf"}],
    ids=["budget", "cached", "ntp", "lwf"],
)
@cuda_only
def test_what_is_logged_is_what_the_cpu_logs(tiny_llama: Make, replay: dict[str, Any]) -> None:
    """In 32 bits. Sampling draws its random numbers on the CPU, so the rows are the same."""
    if replay.get("loss") == "lwf":
        replay = replay | {"replay_fraction": None, "refill_rows": "auto", "sampling": Sampling(), "seed": None}
    found = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        torch.manual_seed(0)
        module = PlainDescent(tiny_llama(), 0.02)
        callbacks = [replay_of(**replay), ForgettingMonitor(self_rows=16, every_n_steps=2)]
        trainer = trainer_on(device, *callbacks, max_steps=4)
        trainer.fit(module, mapping_loader(32))
        found.append({name: float(value) for name, value in trainer.callback_metrics.items() if "seconds" not in name})
    assert found[0].keys() == found[1].keys() >= {"forgetting/self", "forgetting_error/self", "replay/loss"}
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=2e-3, abs=1e-6), name


@cuda_only
def test_a_fit_leaves_no_memory_behind(tiny_llama: Make) -> None:
    """Neither the reference nor buffers, streams or a thread's workspace: as much is held as after a plain fit."""

    def fit(*callbacks: L.Callback) -> None:
        module = UserModule(tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=1024))
        trainer = trainer_on(torch.device("cuda", 0), *callbacks, max_steps=4)
        trainer.fit(module, mapping_loader(32))

    def held() -> int:
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated()

    fit()
    plain = held()
    for options in ({}, {"background": True}, {"reference": "cached"}, {"reference": Copy(offload=True)}):
        fit(replay_of(**options), ForgettingMonitor(self_rows=8))
        assert held() <= plain, options


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@cuda_only
def test_a_compiled_module_trains_as_one_that_is_not(tiny_llama: Make, backend: str) -> None:
    seen = []
    for compiles in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_llama()
        module = PlainDescent(torch.compile(model, backend=backend) if compiles else model, 0.02)  # type: ignore[arg-type]
        trainer = trainer_on(torch.device("cuda", 0), replay_of(), max_steps=3, deterministic=False)
        trainer.fit(module, mapping_loader(32))
        seen.append((weights(model), trainer.callback_metrics["replay/loss"]))
    torch._dynamo.reset()
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-3)


class WholeWeights(L.Callback):
    """Keeps the weights at the end of a fit, while they are where they were trained."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = [part.detach() for part in pl_module.parameters()]
        whole = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
        self.weights = torch.cat([part.flatten().cpu() for part in whole])


class Sharded(PlainDescent):
    """FSDP2, as Lightning wants it."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for layer in self.model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


@pytest.mark.parametrize("loss", ["kl", "ntp"])
def test_under_fsdp2_one_process_trains_as_without(
    tiny_llama: Make, device: torch.device, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    for kind in (PlainDescent, Sharded):
        strategy = "auto" if kind is PlainDescent else ModelParallelStrategy(1, 1, save_distributed_checkpoint=False)
        ended = WholeWeights()
        # Lightning's own sampler shuffles.
        options: dict[str, Any] = {"max_steps": 3, "strategy": strategy, "use_distributed_sampler": False}
        trainer = trainer_on(device, replay_of(loss), ended, **options)
        trainer.fit(kind(tiny_llama(), 0.02), mapping_loader(32))
        seen.append((ended.weights, trainer.callback_metrics["replay/loss"]))
    torch.distributed.destroy_process_group()
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-4, check_device=False)


# Copies between host and device, and waiting


@cuda_only
def test_a_buffer_waits_for_rows_that_are_still_being_computed() -> None:
    tokens = torch.randint(1, 100, (64, 32))
    there = tokens.to("cuda")
    late = torch.zeros_like(there)
    torch.cuda._sleep(10**8)  # cycles: some 50 ms
    late += there
    buffer = ReplayBuffer(64, 32, seed=0)
    buffer.add(ReplayRows(late, torch.full((64,), 32, device="cuda")))
    drawn = buffer.draw(64).tokens
    assert sorted(drawn.tolist()) == sorted(tokens.tolist())


NAMED = {
    "linear_losses.py:_mean": "which positions are targets decides how many the head computes",
    "callbacks/budget.py:update": "the budget reads the drift and the new task's loss once an optimizer step",
    "callbacks/reuse_gap.py:_end_pass": "once each row of a refill has been used",
}
"""Where a step of replay waits for the device, and why."""


OURS = Path(lightning_replay.__file__).parent
PACKAGES = ("lightning_replay", "transformers", "peft", "lightning", "tests")
"""Whose code may be why the host waits: the innermost of them."""


class Waits:
    """Keeps which code of ours makes the host wait for the device, in all that a Trainer does with a batch.

    Args:
        begins: The first step that counts.
    """

    def __init__(self, begins: int) -> None:
        self.begins = begins
        self.found: dict[str, int] = {}
        self.others: dict[str, int] = {}
        self.begin, self.end = _Hook(self._watch, "start"), _Hook(self._leave, "end")
        self._shown = warnings.showwarning

    def _watch(self, trainer: L.Trainer) -> None:
        if trainer.global_step >= self.begins:
            self._shown, warnings.showwarning = warnings.showwarning, self._keep
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def _leave(self, trainer: L.Trainer) -> None:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = self._shown

    def _keep(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack() if not frame.name.startswith("<")]
        frames = [frame for frame in frames[:-1] if any(f"/{name}/" in frame.filename for name in PACKAGES)]
        file, function = Path(frames[-1].filename), frames[-1].name
        ours = file.is_relative_to(OURS)
        place = f"{file.relative_to(OURS) if ours else file}:{function}"
        found = self.found if ours else self.others
        found[place] = found.get(place, 0) + 1


class _Hook(L.Callback):
    def __init__(self, act: Callable[[L.Trainer], None], when: str) -> None:
        self.act = act
        self.when = when

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.when == "start":
            self.act(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.when == "end":
            self.act(trainer)


class Silent(UserModule):
    """Reads nothing from the device in its step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coefficient": ForgettingBudget(0.01)},
        {"uses_per_sample": 2, "refill_rows": 16},
        {"loss": "ntp"},
        {"reference": "cached"},
        {"reference": "adapter"},
    ],
    ids=["kl", "budget", "uses", "ntp", "cached", "adapter"],
)
@cuda_only
def test_a_step_of_replay_waits_for_the_device_only_where_it_is_said(tiny_llama: Make, options: dict[str, Any]) -> None:
    model = adapted(tiny_llama) if options.get("reference") == "adapter" else tiny_llama()
    waits = Waits(2)
    replay = replay_of(**{"refill_rows": 64, "uses_per_sample": 1} | options)
    trainer = trainer_on(torch.device("cuda", 0), waits.begin, replay, waits.end, max_steps=12, deterministic=False)
    with warnings.catch_warnings():
        trainer.fit(Silent(model), mapping_loader())
    print(f"waits of {options}: ours {waits.found}; of others {waits.others}")
    assert waits.found.keys() <= NAMED.keys()
    assert "linear_losses.py:_mean" in waits.found  # so the count works
    assert max(waits.found.values()) <= 10 * 2  # two a step at most, in each place
