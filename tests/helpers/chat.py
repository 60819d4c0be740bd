"""A tokenizer of whole words with a chat template, and a conversation."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<system>", "<assistant>"]


WORDS = ["hello", "how", "are", "you", "fine", "thanks", "what", "is", "this", "a", "cat", "dog", "be", "kind"]


TURNS = "<s>{% for m in messages %}<{{ m.role }}> {{ m.content }} </s>{% endfor %}"


OPENING = "{% if add_generation_prompt %}<assistant>{% endif %}"


CONVERSATION = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello how are you"},
    {"role": "assistant", "content": "fine thanks"},
    {"role": "user", "content": "what is this"},
    {"role": "assistant", "content": "a cat"},
]


def chat_tokenizer(template: str | None = TURNS + OPENING) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = template
    return tokenizer
