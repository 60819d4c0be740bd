from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lightning_replay.language_model import find_language_model
from lightning_replay.prompts import find_prompts
from tests.modules import HandWritten, UserModule

TEMPLATE = (
    "{{ '<s> ' }}{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
WORDS = ["<unk>", "<s>", "<end>", "<user>", "<assistant>", "what", "the", "user", "says", "one", "two"]


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A real tokenizer of whole words with a chat template."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = template
    return tokenizer


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
