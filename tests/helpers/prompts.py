"""A tokenizer of whole words whose template puts a token after each turn."""

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

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


ALPACA = (
    "{% for m in messages %}{{ '### Instruction:' if m.role == 'user' else '### Response:' }}\n{{ m.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)


ALPACA_WORDS = ["<unk>", "<s>", "\n", "\n\n", "###", "Instruction:", "Response:", "one", "two", "what", "says"]


def alpaca_tokenizer(template: str = ALPACA) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and line breaks, whose template marks turns with ordinary text alone."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(ALPACA_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Sequence([Split(" ", "removed"), Split(Regex(r"\n+"), "isolated")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer
