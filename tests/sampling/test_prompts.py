from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_replay.models.language_model import find_language_model
from lightning_replay.sampling.prompts import find_prompts
from tests.helpers.modules import HandWritten, UserModule
from tests.helpers.prompts import chat_tokenizer


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
    assert prompts.max_token == 4


@pytest.mark.parametrize(
    ("given", "tokenizer", "message"),
    [
        (["one"], None, "need a tokenizer"),
        ("chat", None, "need a tokenizer"),
        ("chat", chat_tokenizer(None), "has none"),
        ("chat", chat_tokenizer("{{ '<user>' }}"), "before and after the user's words"),
        (None, SimpleNamespace(), r"Pass `prompts=\[\[token_id\]\]`"),
    ],
)
def test_what_is_missing_is_named(given: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        find_prompts(given, of(HandWritten()), tokenizer)
