"""Chats and instructions: which tokens are learnt, packed and not, and what is refused."""

import json

import pytest
import torch
from chat_templates import QWEN3, TEMPLATES, with_template
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from objective_helpers import RULE, losses

from lrsa_lit.attention import enable
from lrsa_lit.data import ChatFiles, InstructionFiles
from lrsa_lit.data.chats import Chat, Message, chat_of, encode_chat
from lrsa_lit.data.collate import IGNORE_INDEX, collate, collate_packed, collate_training, learnt_spans
from lrsa_lit.data.prompts import TooLong
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.objectives import AnswerLoss, Distillation
from lrsa_lit.objectives.positions import Positions

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The tiny tokenizer's template, which says by itself what the assistant writes."""
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=20).filter(str.strip)


def turns(*contents, system="", weights=()):
    """A row: messages of the user and the assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    found = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    for message, weight in zip(found[1::2], weights, strict=False):
        message["weight"] = weight
    return {"messages": [{"role": "system", "content": system}] * bool(system) + found}


def example_of(row, tokenizer, max_tokens=5000):
    return encode_chat(chat_of(row, "c", "x.jsonl, line 1"), tokenizer, max_tokens)


def learnt_texts(example, tokenizer):
    return [tokenizer.decode(example["input_ids"][slice(*span)]) for span in learnt_spans(example)]


CHATS = st.builds(lambda pairs, system: turns(*(text for pair in pairs for text in pair), system=system),
                  st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), WORDS | st.just(""))  # fmt: skip


@given(row=CHATS)
def test_the_learnt_tokens_are_those_that_the_template_marks(row):
    tokenizer, marking = tiny_tokenizer(), with_template(MARKED)
    found = marking.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
    example = example_of(row, tokenizer)
    count = len(example["input_ids"])
    # The template ends with a line break, which nobody writes.
    assert found["input_ids"][:count] == example["input_ids"]
    assert tokenizer.decode(found["input_ids"][count:]) == "\n"
    labels = collate_training([example], 0)["labels"][0]
    assert (labels != IGNORE_INDEX).int().tolist() == found["assistant_masks"][:count]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_learnt_tokens_follow_the_prompts_of_well_known_templates(template):
    """By tokenising each prefix of the chat: what a prompt for an answer has, and what the chat with it has more."""
    tokenizer = with_template(template)
    row = turns("Where is the café?", "In Tesmar.", "And the Isk?", "Not there.", "Why?", "It is long.")
    example = example_of(row, tokenizer)
    spans = learnt_spans(example)
    assert len(spans) == 3
    for number, (start, end) in zip((1, 3, 5), spans, strict=True):
        before, behind = row["messages"][:number], row["messages"][: number + 1]
        prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(behind, tokenize=False)
        answer = whole.removeprefix(prompt).partition("<|im_end|>")[0] + "<|im_end|>"
        expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert example["input_ids"][:start] == expected
        assert tokenizer.decode(example["input_ids"][start:end]) == answer
        assert row["messages"][number]["content"] in answer
    assert example["prompt_length"] == spans[-1][0]
    assert example["first_turn"] == spans[0][0]
    assert example["question"] == "Why?"
    assert len(example["input_ids"]) == spans[-1][1]


def test_an_answer_of_the_past_that_the_template_writes_otherwise_begins_with_its_content():
    tokenizer = with_template(QWEN3)
    tokenizer.chat_template = "{% set enable_thinking = false %}" + QWEN3
    assert learnt_texts(example_of(turns("a", "b", "c", "d"), tokenizer), tokenizer) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_weight_of_0_leaves_an_answer_out(tokenizer):
    example = example_of(turns("a", "wrong", "b", "right", weights=[0, 1]), tokenizer)
    assert learnt_texts(example, tokenizer) == ["right<|im_end|>"]
    last = example_of(turns("a", "right", "b", "wrong", weights=[1, 0]), tokenizer)
    assert learnt_texts(last, tokenizer) == ["right<|im_end|>"]
    assert tokenizer.decode(last["input_ids"]).endswith("wrong<|im_end|>")


def test_control_tokens_in_a_message_are_text(tokenizer):
    example = example_of(turns("<|im_end|>", "a<|im_start|>b"), tokenizer)
    assert example["input_ids"].count(tokenizer.eos_token_id) == 2
    assert example["input_ids"].count(tokenizer.bos_token_id) == 2
    assert learnt_texts(example, tokenizer) == ["a<|im_start|>b<|im_end|>"]


def test_a_chat_may_begin_with_the_assistant(tokenizer):
    row = {"messages": [{"role": "assistant", "content": "Hello!"}, *turns("a", "b")["messages"]]}
    assert learnt_texts(example_of(row, tokenizer), tokenizer) == ["Hello!<|im_end|>", "b<|im_end|>"]


EXAMPLES = [example_of(row, tiny_tokenizer()) | {"id": str(number)} for number, row in enumerate((
    turns("Where is the café?", "In Tesmar.", "How long is the Isk?", "212 km.", system="Answer."),
    turns("x" * 70, "y"), turns("a", "wrong" * 9, "b" * 40, "right", "c", "d", weights=[0, 1, 1])))]  # fmt: skip


def plain_loss(model, example):
    """The summed cross-entropy of the learnt tokens of one example, from all logits."""
    ids = torch.tensor([example["input_ids"]])
    logs = model(ids, use_cache=False).logits[0].log_softmax(-1)
    return -sum(logs[place - 1, ids[0, place]] for start, end in learnt_spans(example) for place in range(start, end))


def test_the_loss_is_that_of_a_plain_computation_packed_and_not():
    model = enable(tiny_model().double(), RULE)
    expected = sum(plain_loss(model, example) for example in EXAMPLES)
    for batch in (collate_training(EXAMPLES, 2), collate_packed(EXAMPLES)):
        torch.testing.assert_close(losses(model, AnswerLoss(), batch)[0], expected, rtol=1e-9, atol=1e-9)
        assert sum(map(AnswerLoss().count, batch["sizes"])) == (batch["labels"] != IGNORE_INDEX).sum()


def test_positions_predict_the_labels_and_others_are_drawn_beside_them():
    for batch in (collate_training(EXAMPLES, 2), collate_packed(EXAMPLES)):
        positions, labels = Positions(batch, 7, 3), batch["labels"].flatten()
        answers = positions.answers()
        assert set((answers + 1).tolist()) == set((labels != IGNORE_INDEX).nonzero()[:, 0].tolist())
        others = positions.drawn(lambda size: 9999, "x", besides_answers=True)
        assert len(others) == sum(size.tokens - 1 - size.answer for size in batch["sizes"])
        assert not set(others.tolist()) & set(answers.tolist())
        some = positions.drawn(lambda size: 5, "x", besides_answers=True)
        assert set(some.tolist()) < set(others.tolist())
        assert len(some) == 15
    model = enable(tiny_model().double(), RULE)
    both = [losses(model, Distillation(positions=9), batch)
            for batch in (collate_training(EXAMPLES, 2), collate_packed(EXAMPLES))]  # fmt: skip
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


def chats(folder, *rows, **options):
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChatFiles(train=str(folder / "x.jsonl"), tokenizer=tiny_tokenizer(), **options)


def test_examples_come_out_of_the_cache_as_they_were(tmp_path):
    rows = [turns("a", "b", "c", "d"), {"id": "own", **turns("e" * 30, "f")}]
    data = chats(tmp_path, *rows, batch_size=2)
    data.prepare_data()
    data.setup()
    (batch,) = data.train_dataloader()
    assert sorted(batch["id"]) == ["own", "train-1"]
    expected = {name: example_of(row, tiny_tokenizer()) for name, row in zip(["train-1", "own"], rows, strict=True)}
    for name, size, spans in zip(batch["id"], batch["sizes"], batch["learnt"], strict=True):
        assert [tuple(span) for span in spans] == learnt_spans(expected[name])
        assert size.answer == sum(end - start for start, end in spans)
    assert batch["step_sizes"] == batch["sizes"]


def test_a_chat_that_is_too_long_is_left_out_and_counted(tmp_path):
    data = chats(tmp_path, turns("a", "b"), turns("a" * 100, "b"), max_tokens=60)
    assert isinstance(encode_chat(next(data.records("train")), tiny_tokenizer(), 20), TooLong)
    data.prepare_data()
    data.setup()
    assert data.report["train"]["kept"] == data.report["train"]["too_long"] == 1
    needed = len(example_of(turns("a" * 100, "b"), tiny_tokenizer())["input_ids"])
    with refused("max_tokens", 40, f"{needed} or more", reason="as each of its 1 chats needs more"):
        chats(tmp_path, turns("a" * 100, "b"), max_tokens=40).prepare_data()


BAD = {
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "messages: has no message of the assistant"),
    "no message": ({"messages": []}, "messages: has no message of the assistant"),
    "ends with the user": (turns("a", "b", "c"), "messages: ends with a message of the user"),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role: 'tool' is not allowed; it must be"),
    "empty": (turns("a", " \n"), "messages[1].content: is empty"),
    "null": (turns("a", None), "messages[1].content: is null"),
    "nothing learnt": (turns("a", "b", weights=[0]), "has weight 0 in all"),
    "weight": (turns("a", "b", weights=[2]), "messages[1].weight: 2 is not allowed; it must be 0 or 1"),
    "field": ({"message": []}, "message: no such field; fields are messages, id"),
    "tools": ({**turns("a", "b"), "tools": []}, "tools: no such field"),
    "no object": ([1], "chat: is list; it must be an object"),
}


@pytest.mark.parametrize(("row", "said"), BAD.values(), ids=BAD)
def test_a_bad_chat_is_refused_with_its_file_and_line(row, said, tmp_path):
    data = chats(tmp_path, turns("a", "b"), row)
    with refused(f"{tmp_path / 'x.jsonl'}, line 2", reason=said):
        data.prepare_data()


DROPS = {
    "leaves out": ("{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}",
                   "leaves out messages[0] (system)"),
    "changes": ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "changes the text"),
    "cuts": ("{% for m in messages %}{{ m.content.split('Z')[0] }}<|im_end|>{% endfor %}", "changes the text"),
    "fails": ("{{ raise_exception('No') }}", "the chat template"),
    "never ends": ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token after an answer"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "said"), DROPS.values(), ids=DROPS)
def test_a_template_that_loses_a_message_is_refused_with_file_and_line(template, said, tmp_path):
    data = chats(tmp_path, turns("aZb", "c", system="s"))
    data.tokenizer.chat_template = template
    with refused(f"{tmp_path / 'x.jsonl'}, line 1", reason=said):
        data.prepare_data()


def test_instructions_are_chats_of_one_turn(tmp_path, tokenizer):
    rows = [{"instruction": "Say it.", "input": "212", "output": "two"}, {"instruction": "Go.", "output": "ok"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = InstructionFiles(train=str(tmp_path), tokenizer=tokenizer)
    expected = [(Message("user", "Say it.\n\n212"), Message("assistant", "two")),
                (Message("user", "Go."), Message("assistant", "ok"))]  # fmt: skip
    assert list(data.records("train")) == [Chat(f"train-{n}", each) for n, each in enumerate(expected, start=1)]
    example = data.to_example(next(data.records("train")))
    assert learnt_texts(example, tokenizer) == ["two<|im_end|>"]
    batch = collate([example], 0)
    assert batch["prompt_length"] == batch["first_turn"] == [example["prompt_length"]]
    assert batch["answers"] == [("two",)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "", "output": "x"}, "instruction: is empty"),
        ({"instruction": "a", "output": " "}, "output: is empty"),
        ({"instruction": "a"}, "output: is missing"),
        ({"instruction": "a", "output": "b", "inputs": "c"}, "inputs: no such field"),
    ],
)
def test_a_bad_instruction_is_refused_with_its_file_and_line(row, said, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with refused(f"{tmp_path / 'x.jsonl'}, line 1", reason=said):
        InstructionFiles(train=str(tmp_path / "x.jsonl"), tokenizer=tiny_tokenizer()).prepare_data()


def test_files_that_are_not_there_are_refused(tmp_path):
    with refused("train", reason="neither train, val nor test"):
        ChatFiles()
    with refused("val", str(tmp_path / "no.jsonl"), reason="is not an existing file"):
        list(ChatFiles(val=str(tmp_path / "no.jsonl"), tokenizer=tiny_tokenizer()).records("val"))
    with refused("test", str(tmp_path), reason="is a folder without any file that ends in .jsonl"):
        list(ChatFiles(test=str(tmp_path), tokenizer=tiny_tokenizer()).records("test"))
