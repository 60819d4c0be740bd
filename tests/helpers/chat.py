"""A tokenizer of whole words with a chat template, and a conversation."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<system>", "<assistant>"]


WORDS = ["hello", "how", "are", "you", "fine", "thanks", "what", "is", "this", "a", "cat", "dog", "be", "kind"]
WORDS += ["<tool>", "<call>", "look", "time", "place", "here"]


TURNS = "<s>{% for m in messages %}<{{ m.role }}> {{ m.content }} </s>{% endfor %}"


OPENING = "{% if add_generation_prompt %}<assistant>{% endif %}"


# Calls and tools, as in templates of models that call tools.
CALLS = (
    "<s>{% if tools %}<system> {% for t in tools %}{{ t.function.name }} {% endfor %}</s>{% endif %}"
    "{% for m in messages %}<{{ m.role }}> {% if m.content %}{{ m.content }} {% endif %}"
    "{% for c in m.tool_calls or [] %}<call> {{ c.function.name }} "
    "{% for name, value in c.function.arguments.items() %}{{ name }} {{ value }} {% endfor %}{% endfor %}"
    "</s>{% endfor %}"
)


CALLING = [
    {"role": "user", "content": "what is this"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"place": "here"}}}],
    },
    {"role": "tool", "content": "a dog"},
    {"role": "assistant", "content": "a dog"},
]


TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"properties": {"place": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "time", "parameters": {"properties": {}}}},
]


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
