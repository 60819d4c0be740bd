"""Each family of models, from its own package: the same fit, compared with one written by hand.

And every causal family of the installed transformers that a tiny configuration makes, in columns of what must hold.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_replay import ReplayDataModule, Sampling, SelfGeneratedReplay, sample_rows
from lightning_replay.models.calls import find_state
from lightning_replay.models.language_model import evaluating, find_language_model
from lightning_replay.references.independence import independent_copy
from lightning_replay.sampling.decoder import Decoder
from tests.helpers.by_hand import kl_by_hand, weights
from tests.helpers.families import CAUSAL_FAMILIES, FAMILIES, litgpt, tiny_causal
from tests.helpers.modules import (
    DrawnRows,
    PlainDescent,
    TokensModule,
    UserModule,
    mapping_loader,
    quiet_trainer,
    tensor_loader,
)

Make = Callable[..., Any]
WITHOUT_CACHE = {"RWKV", "hand-written", "LitGPT"}
"""Sampled by reading the whole prefix for each token. RWKV has a state, but mixes up the rows of a batch in it."""
EVERY: list[Any] = ["Llama", "GPT-2", "Qwen", "Mamba", "RWKV", "LoRA", "hand-written"]
EVERY.append(pytest.param("LitGPT", marks=pytest.mark.integration))


class TokensDescent(TokensModule, PlainDescent):
    """For models that map tokens to logits."""


def made(family: str, tiny_llama: Make) -> nn.Module:
    """A tiny model with weights that say something, and without dropout."""
    torch.manual_seed(0)
    others: dict[str, Callable[[], nn.Module]] = {
        "Llama": tiny_llama,
        "LoRA": lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)),
        "LitGPT": litgpt,
    }
    module = (FAMILIES | others)[family]()
    if family != "LoRA":
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return module


def logits(module: nn.Module, tokens: Tensor) -> Tensor:
    output: Any = module(tokens)
    found: Tensor = getattr(output, "logits", output)
    return found


@pytest.mark.parametrize("family", EVERY)
def test_a_fit_ends_in_the_weights_of_one_written_by_hand(family: str, tiny_llama: Make) -> None:
    plain = family in ("LitGPT", "hand-written")
    kind: type[UserModule] = TokensDescent if plain else PlainDescent
    ours = kind(made(family, tiny_llama))
    theirs, reference = kind(copy.deepcopy(ours.model)), copy.deepcopy(ours.model).eval()
    loader = (tensor_loader if plain else mapping_loader)(48)
    drawn = DrawnRows()
    replay = SelfGeneratedReplay(coefficient=2.0, seed=0, sampling=Sampling(prompts=[[1]]))
    quiet_trainer(callbacks=[replay, drawn]).fit(ours, datamodule=ReplayDataModule(loader, 0.2))

    optimizer: Any = theirs.configure_optimizers()
    for batch, rows in zip(loader, drawn.rows, strict=True):
        with torch.no_grad():
            before = logits(reference, rows[:, :-1])
        loss = theirs.loss(batch) + 2.0 * kl_by_hand(before, logits(theirs.model, rows[:, :-1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), atol=2e-5, rtol=1e-4)
    assert float((weights(theirs.model) - weights(reference)).abs().max()) > 1e-3


@pytest.mark.parametrize("family", EVERY)
def test_samples_are_those_of_a_plain_loop_over_the_whole_prefix(family: str, tiny_llama: Make) -> None:
    module = made(family, tiny_llama)
    model = find_language_model(UserModule(module), None)
    assert model.has_cache == (family not in WITHOUT_CACHE)
    with evaluating(module):
        ours = sample_rows(model, [[1, 5, 9]] * 8, 12, torch.Generator().manual_seed(0))
        # The same random numbers: the token at which the cumulative probability passes each of them.
        uniforms = torch.rand(8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        tokens = torch.tensor([[1, 5, 9]] * 8)
        for position in range(9):
            cumulative = logits(module, tokens)[:, -1].double().softmax(-1).cumsum(-1)
            token = torch.searchsorted(cumulative, uniforms[:, position, None], right=True)
            tokens = torch.cat([tokens, token], 1)
        log_probs = logits(module, tokens)[:, 2:-1].log_softmax(-1).gather(2, tokens[:, 3:, None]).squeeze(2)
    assert torch.equal(ours.tokens, tokens)
    assert len(tokens[:, 3:].unique()) > 8
    assert ours.log_probs is not None
    torch.testing.assert_close(ours.log_probs[:, 3:], log_probs.float(), atol=1e-4, rtol=1e-4)


ROWS = torch.randint(3, 48, (3, 14), generator=torch.Generator().manual_seed(0))
SOME_FAMILIES = [
    "bert-generation",
    "bloom",
    "falcon",
    "gemma2",
    "gpt_neox",
    "granitemoe",
    "mamba",
    "minimax",
    "mixtral",
]
SOME_FAMILIES += ["mpt", "olmo2", "opt", "openai-gpt", "phi3", "rwkv", "xglm", "xlnet"]
MANY = 120
"""Causal families of transformers that the one tiny configuration makes, at least."""
LEFT_OUT = {"falcon_h1", "nemotron_h", "dory", "prophetnet"}
"""A row of 14 tokens takes the first two a second, padded to chunks of 256; the third needs more layers than two, and
the last one's logits, with these weights, depend on nothing that it reads."""


def looks_ahead(module: nn.Module) -> bool:
    """Whether earlier logits are others if the last tokens are left out or changed, by hand."""
    changed = torch.cat([ROWS[:, :8], 50 - ROWS[:, 8:]], 1)
    whole, others = logits(module, ROWS), (logits(module, ROWS[:, :8]), logits(module, changed)[:, :8])
    scale = (whole[:, 8:] - logits(module, changed)[:, 8:]).std()
    return any(bool((whole[:, :8] - other).std() > 1e-3 * scale) for other in others)


def goes_on(module: Any) -> bool:
    """Whether a loop over single tokens with the model's own cache gives the logits of whole rows, by hand."""
    for prompt in (1, 3):
        parts, whole = [], logits(module, ROWS)
        try:
            state: dict[str, Any] = {}
            for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ROWS.shape[1]))]:
                output = module(ROWS[:, start:end], use_cache=True, **state)
                found = find_state(module, output)
                if found is None or output.logits.shape[1] != end - start:
                    return False
                state = dict([found])
                parts.append(output.logits)
        except (TypeError, ValueError, RuntimeError):
            return False
        if not (torch.cat(parts, 1) - whole).std() < 1e-3 * whole.std():
            return False
    return True


def the_verdict_is_that_of_a_loop_by_hand(module: nn.Module) -> None:
    with torch.no_grad():
        ahead, right = looks_ahead(module), goes_on(module)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = UserModule(copy.deepcopy(module).to(dtype))
        if ahead:
            with pytest.raises(MisconfigurationException, match="is no causal language model"):
                find_language_model(narrow, None)
        else:
            assert find_language_model(narrow, None).has_cache == right, f"in {dtype}"


def samples_are_read_as_the_plain_forward_reads_them(module: Any) -> None:
    try:
        model = find_language_model(UserModule(module), None)
    except MisconfigurationException:
        return  # it looks ahead, says the other column
    with evaluating(module):
        for prompt in (1, 3):
            decoder = Decoder(model, ROWS.shape[1] + 1)
            # A model without a cache is asked for prefixes: rows of other lengths.
            read = [decoder.next_logits(ROWS[:, :end]) for end in range(prompt, ROWS.shape[1] + 1)]
            plain = logits(module, ROWS)[:, prompt - 1 :]
            skipped = int(
                module.config.model_type == "rwkv"
            )  # reads one token alone as something else, without a cache
            ours, theirs = torch.stack(read, 1).log_softmax(-1)[:, skipped:], plain.log_softmax(-1)[:, skipped:]
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def a_copy_stays_as_it_was_when_the_model_trains(module: nn.Module) -> None:
    if looks_ahead(module):
        return  # refused, as another column sees
    model = find_language_model(UserModule(module), None)
    tokens = torch.arange(3, 11).unsqueeze(0)
    with evaluating(module):
        before = model.logits(tokens)
        copied = independent_copy(model)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        after = model.logits(tokens)
    with evaluating(copied.module):
        torch.testing.assert_close(copied.logits(tokens), before)
    assert not torch.allclose(after, before)


def the_user_s_step_is_as_it_was(module: nn.Module) -> None:
    """Its dropout included, which draws from the global random state."""
    if looks_ahead(module):
        return
    results = []
    sampling: dict[str, Any] = {"replay_fraction": 0.2, "refill_rows": 4, "sampling": Sampling(prompts=[[1]])}
    for replay in (None, SelfGeneratedReplay(coefficient=0.0, **sampling)):
        torch.manual_seed(0)
        ours = PlainDescent(copy.deepcopy(module).train(), 0.01)
        trainer = quiet_trainer(callbacks=[] if replay is None else [replay], max_steps=2)
        trainer.fit(ours, mapping_loader(16, batch_size=4))
        results.append((weights(ours), ours.losses))
    assert results[0][1] == results[1][1]
    assert torch.equal(results[0][0], results[1][0])


COLUMNS: dict[str, Callable[[nn.Module], None]] = {
    "samples": samples_are_read_as_the_plain_forward_reads_them,
    "verdict": the_verdict_is_that_of_a_loop_by_hand,
    "independent": a_copy_stays_as_it_was_when_the_model_trains,
    "unchanged": the_user_s_step_is_as_it_was,
}
"""What must hold of a tiny model of every family."""


@pytest.mark.filterwarnings("ignore:The cache of")
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_what_holds_of_some_causal_families(family: str, column: str) -> None:
    COLUMNS[column](tiny_causal(family))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("column", COLUMNS)
def test_what_holds_of_every_causal_family(column: str) -> None:
    wrong, made = {}, 0
    for family in CAUSAL_FAMILIES:
        try:
            module = tiny_causal(family)
        except Exception:  # sizes of its own, or a package that isn't there
            continue
        made += 1
        if family in LEFT_OUT:
            continue
        try:
            COLUMNS[column](module)
        except Exception as error:
            wrong[family] = str(error)
    assert not wrong
    assert made >= MANY
