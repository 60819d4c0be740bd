from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_replay import Sampling, sample_rows
from lightning_replay.models.language_model import find_language_model
from lightning_replay.sampling.prompts import find_prompts
from lightning_replay.sampling.rows import RowGenerator
from tests.helpers.modules import HandWritten, UserModule
from tests.helpers.prompts import ALPACA, ALPACA_WORDS, alpaca_tokenizer, chat_tokenizer


def of(module: Any) -> Any:
    return find_language_model(UserModule(module), None)


def test_texts_begin_with_the_start_token(tiny_llama: Any) -> None:
    prompts = find_prompts(["one two", "the user"], of(tiny_llama()), chat_tokenizer())
    assert prompts.starts == [[1, 9, 10], [1, 6, 7]]
    assert prompts.reply == []


def test_token_ids_are_taken_as_they_are(tiny_llama: Any) -> None:
    assert find_prompts([[3, 4], [5]], of(tiny_llama()), None).starts == [[3, 4], [5]]


def test_a_chat_template_is_split_around_the_user_s_words(tiny_llama: Any) -> None:
    prompts = find_prompts("chat", of(tiny_llama()), chat_tokenizer())
    assert prompts.starts == [[1, 3]]  # <s> <user>
    assert prompts.reply == [2, 4]  # <end> <assistant>
    assert prompts.turn_end == 1
    assert prompts.answer_end == [2]
    assert prompts.max_token == 4


@pytest.mark.parametrize(
    ("given", "tokenizer", "message"),
    [
        (["one"], None, "need a tokenizer"),
        ("chat", None, "need a tokenizer"),
        ("chat", chat_tokenizer(None), "has none"),
        ("chat", chat_tokenizer("{{ '<user>' }}"), "before and after the user's words"),
        (None, SimpleNamespace(), r"Pass `sampling=lightning_replay.Sampling\(prompts=\[\[token_id\]\]\)`"),
    ],
)
def test_what_is_missing_is_named(given: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        find_prompts(given, of(HandWritten()), tokenizer)


def ids(text: str) -> list[int]:
    return [ALPACA_WORDS.index(word.replace("|", "\n")) for word in text.split()]


ONE_TURN = ALPACA.replace("{% for", "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}{% for")
SPECIAL_AFTER_TEXT = ALPACA.replace("### Response:", "### Response:<s>")


@pytest.mark.parametrize(
    ("template", "reply", "turn_end", "answer_end"),
    [
        (ALPACA, "### Response: |", 3, "### Instruction: |"),
        (ONE_TURN, "### Response: |", 3, ""),
        (SPECIAL_AFTER_TEXT, "### Response: <s> |", 3, "### Instruction: |"),
        (ALPACA.replace("\\n\\n{% endfor", "\\n{% endfor"), "### Response: |", 3, "### Instruction: |"),
    ],
    ids=["text alone", "one turn", "a special token later", "one line break"],
)
def test_turns_that_end_in_ordinary_text_end_with_all_of_it(
    template: str, reply: str, turn_end: int, answer_end: str, tiny_llama: Any
) -> None:
    prompts = find_prompts("chat", of(tiny_llama()), alpaca_tokenizer(template))
    assert prompts.starts == [ids("### Instruction: |")]
    assert prompts.reply == ids(reply)
    assert prompts.turn_end == turn_end
    assert prompts.answer_end == ids(answer_end)


class Scripted(nn.Module):
    """Draws the words of a script, whatever it has read before."""

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.eye(len(ALPACA_WORDS))[script] * 1e4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[: tokens.shape[1]].expand(len(tokens), -1, -1)


# What is drawn after each position, the first three being the prompt's own; single line breaks and a lone ### end
# nothing, and the whole sequences do. The last word is never reached.
DRAWN = "one | two ### | one || ### Response: | two || ### one | two || ### Instruction: |"
SCRIPT = "Instruction: | " + DRAWN + " says"


@pytest.mark.parametrize("targets", ["all", "answer"])
def test_samples_of_such_a_template_keep_their_line_breaks(targets: Any) -> None:
    script = ids(SCRIPT)
    model = of(Scripted(script))
    generator = RowGenerator(Sampling(prompts="chat", targets=targets))
    generator.bind(model, alpaca_tokenizer())
    with torch.no_grad():
        rows, quality = generator.generate(model, 2, len(script) + 1, 0, lambda tokens: None)
    expected = ids("### Instruction: | " + DRAWN)
    assert [row[:length].tolist() for row, length in zip(rows.tokens, rows.lengths, strict=True)] == [expected] * 2
    answer = len(expected) - len(ids("two || ### one | two || ### Instruction: |"))
    begin = 3 if targets == "all" else answer
    assert rows.targets is not None
    assert rows.targets[0, : len(expected)].tolist() == [place >= begin for place in range(len(expected))]
    assert quality["ended"] == 1


def test_a_turn_is_not_ended_by_what_the_prompt_or_the_opening_says(tiny_llama: Any) -> None:
    # The answer's end is also the end of the reply's opening: it has to be drawn again.
    script = ids("Instruction: | one ### Response: | | says")
    model = of(Scripted(script))
    with torch.no_grad():
        samples = sample_rows(
            model,
            [ids("### Instruction: |")],
            9,
            torch.Generator().manual_seed(0),
            stop=[ids("Response: |"), ids("| |")],
            reply=ids("### Response: |"),
            turn_end=3,
        )
    assert samples.replies is not None
    assert (samples.replies.tolist(), samples.lengths.tolist()) == ([7], [9])


def test_the_tokens_that_end_a_turn_are_a_part_of_the_reply(tiny_llama: Any) -> None:
    for turn_end in (0, 3):
        with pytest.raises(ValueError, match=f"`turn_end` is 1 to 2, the tokens of `reply`; got {turn_end}"):
            sample_rows(of(tiny_llama()), [[1]], 8, torch.Generator(), reply=[2, 4], turn_end=turn_end)
