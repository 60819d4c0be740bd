import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_replay import ChatDataModule, ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
from lightning_replay.data.batches import rows_of
from tests.helpers.chat import CALLING, CALLS, CONVERSATION, OPENING, SPECIAL, TOOLS, TURNS, WORDS, chat_tokenizer
from tests.helpers.modules import VOCABULARY, PlainDescent, quiet_trainer

MARKED = (
    "<s>{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>"
    "{% endgeneration %}{% else %}{{ m.content }} </s>{% endif %}{% endfor %}"
)
FORGETFUL = (
    "<s>{% for m in messages %}<{{ m.role }}> {% if m.role == 'user' or loop.last %}{{ m.content }} {% endif %}</s>"
    "{% endfor %}"
)
# By hand: every token of the conversation, and in capitals here what the assistant says.
TOKENS = "<s> <system> be kind </s> <user> hello how are you </s> <assistant> FINE THANKS </S> <user> what is this </s>"
TOKENS += " <assistant> A CAT </S>"


def ids(words: str) -> list[int]:
    return [(SPECIAL + WORDS).index(word.lower()) for word in words.split()]


def labels(words: str) -> list[int]:
    return [(SPECIAL + WORDS).index(word.lower()) if word != word.lower() else -100 for word in words.split()]


def written(folder: Path, *conversations: Any) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations))
    return path


def chats(path: Path, template: str = TURNS + OPENING, **options: Any) -> ChatDataModule:
    data = ChatDataModule(path, chat_tokenizer(template), **{"validation_fraction": 0} | options)
    data.setup("fit")
    return data


@pytest.mark.parametrize("template", [TURNS + OPENING, MARKED + OPENING], ids=["prefixes", "marks"])
def test_every_turn_of_the_assistant_is_labelled_and_nothing_else(template: str, tmp_path: Path) -> None:
    (batch,) = chats(written(tmp_path, CONVERSATION), template).train_dataloader()
    assert batch["input_ids"].tolist() == [ids(TOKENS)]
    assert batch["labels"].tolist() == [labels(TOKENS)]
    assert batch["attention_mask"].all()


def test_shorter_conversations_are_padded_on_the_right_without_labels(tmp_path: Path) -> None:
    short = "<s> <user> hello </s> <assistant> FINE </S>"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]
    data = chats(written(tmp_path, CONVERSATION, messages))
    (batch,) = data.train_dataloader()
    row = int(batch["attention_mask"].sum(1).argmin())
    missing = len(ids(TOKENS)) - len(ids(short))
    assert batch["input_ids"][row].tolist() == ids(short) + [0] * missing
    assert batch["labels"][row].tolist() == labels(short) + [-100] * missing
    assert batch["attention_mask"][row].tolist() == [1] * len(ids(short)) + [0] * missing
    replayed = rows_of(batch)
    assert replayed.lengths[row] == len(ids(short))
    assert replayed.targets is not None
    assert replayed.tokens[row][replayed.targets[row]].tolist() == [1, *ids("fine </s>")]


def test_long_conversations_are_cut_and_those_with_nothing_left_to_say_are_left_out(tmp_path: Path) -> None:
    late = [{"role": "user", "content": "hello " * 13}, {"role": "assistant", "content": "fine"}]
    data = ChatDataModule(written(tmp_path, CONVERSATION, late), chat_tokenizer(), 14, validation_fraction=0)
    with pytest.warns(UserWarning, match="Left out 1 of 2 conversations .* within 14 tokens"):
        data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].tolist() == [ids(TOKENS)[:14]]
    assert batch["labels"].tolist() == [labels(TOKENS)[:14]]


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        (CONVERSATION, {"template": FORGETFUL + OPENING}, "writes the messages up to 2 in another way"),
        (CONVERSATION[2:], {}, "the assistant speaks first"),
        (CONVERSATION[:2], {}, "has anything that the assistant says within 512 tokens"),
        ("hello", {}, "Conversation 0 is no list of messages"),
        (["hello"], {}, "Conversation 0 is no list of messages"),
        ([{"role": "user"}], {}, "Conversation 0 can't be .*no `content` of text, nor `tool_calls`: .*'role': 'user'"),
        ([{"content": "hello"}], {}, "Conversation 0 can't be .*no `role` of text"),
        ([{"role": "user", "content": ["hello"]}], {}, "the `content` of a message is a list.*Join its parts"),
        (CALLING, {}, "Conversation 0 can't be .*it leaves `tool_calls` out of the text"),
        (CONVERSATION, {"tools_column": "functions"}, r"no column 'functions'; it has \['messages'\]. Set `tools_col"),
        (CONVERSATION, {"messages_column": "turns"}, r"no column 'turns'; it has \['messages'\]. Set `messages_c"),
    ],
)
def test_conversations_that_cannot_be_labelled_exactly_are_refused(
    conversation: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        chats(written(tmp_path, conversation), **options)


# By hand: in capitals what the assistant says, calls included.
CALLED = "<user> what is this </s> <assistant> <CALL> LOOK PLACE HERE </S> <tool> a dog </s> <assistant> A DOG </S>"
# The one in newer versions of transformers, which leave the key out, the other in older ones.
IF_NULL = CALLS.replace("or [] %}", "if m.content is not defined or m.content is none %}")
AS_TEXT = CALLS.replace(
    "{% for name, value in c.function.arguments.items() %}{{ name }} {{ value }} {% endfor %}",
    "{{ (c.function.arguments + '').replace('\"', ' ').replace(':', '').replace('{', '').replace('}', '') }} ",
)


def with_text_arguments(messages: Any) -> Any:
    text = json.dumps(messages).replace('{"place": "here"}', json.dumps(json.dumps({"place": "here"})))
    return json.loads(text)


@pytest.mark.parametrize("spelled", [lambda messages: messages, with_text_arguments], ids=["mapping", "text"])
@pytest.mark.parametrize("template", [CALLS, IF_NULL, AS_TEXT], ids=["calls", "calls if null", "text arguments"])
def test_calls_are_labelled_as_what_the_assistant_says(template: str, spelled: Any, tmp_path: Path) -> None:
    (batch,) = chats(written(tmp_path, spelled(CALLING)), template + OPENING).train_dataloader()
    assert batch["input_ids"].tolist() == [ids("<s> " + CALLED)]
    assert batch["labels"].tolist() == [labels("<s> " + CALLED)]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_handed_to_the_template(as_text: bool, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    other = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]
    rows: list[dict[str, Any]] = [{"messages": CALLING, "tools": TOOLS}, {"messages": other, "tools": []}]
    for written_row in rows:
        written_row["tools"] = json.dumps(written_row["tools"]) if as_text else written_row["tools"]
    path.write_text("\n".join(map(json.dumps, rows)))
    (batch,) = chats(path, CALLS + OPENING).train_dataloader()
    with_tools = "<s> <system> look time </s> " + CALLED
    row = int(batch["attention_mask"].sum(1).argmax())
    assert batch["input_ids"][row].tolist() == ids(with_tools)
    assert batch["labels"][row].tolist() == labels(with_tools)
    alone = "<s> <user> hello </s> <assistant> FINE </S>"
    assert batch["labels"][1 - row][: len(alone.split())].tolist() == labels(alone)
    assert batch["input_ids"][1 - row][: len(alone.split())].tolist() == ids(alone)
    (without,) = chats(path, CALLS + OPENING, tools_column=None).train_dataloader()
    assert without["input_ids"].shape[1] == len(ids("<s> " + CALLED))


def test_a_template_that_leaves_tools_out_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATION, "tools": TOOLS}))
    with pytest.raises(ValueError, match="leaves the tools out of the text.*`tools_column=None`"):
        chats(path)
    assert len(chats(path, tools_column=None).train_dataloader()) == 1
    path.write_text(json.dumps({"messages": CONVERSATION, "tools": "look"}))
    with pytest.raises(ValueError, match="Conversation 0 .*its tools are no JSON text.*`tools_column`"):
        chats(path)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        ChatDataModule(tmp_path / "chats.jsonl", chat_tokenizer(None))


def test_a_chat_model_trains_on_chats_and_replays_its_own(tiny_llama: Any, tmp_path: Path) -> None:
    path = written(tmp_path, *[CONVERSATION] * 8)
    data = chats(path, batch_size=4)
    module = PlainDescent(tiny_llama())
    assert len(SPECIAL + WORDS) <= VOCABULARY
    replay = SelfGeneratedReplay(sampling=Sampling(prompts="chat", stop_at_eos=True))
    monitor = ForgettingMonitor({"chats": data.train_dataloader()})
    trainer = quiet_trainer(max_steps=2, callbacks=[replay, monitor])
    trainer.fit(module, datamodule=ReplayDataModule(data, 0.5))
    # The first step's loss is the cross-entropy of the assistant's words alone.
    batch = module.batches[0]
    with torch.no_grad():
        log_probs = tiny_llama()(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    said = [
        -log_probs[row, place - 1, token].item()
        for row in range(4)
        for place, token in enumerate(labels(TOKENS))
        if token != -100
    ]
    assert len(said) == 4 * 6
    assert module.losses[0] == pytest.approx(sum(said) / len(said), rel=1e-5)
