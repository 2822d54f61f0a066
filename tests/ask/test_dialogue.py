"""The turns of a conversation, as the chat template writes them."""

from __future__ import annotations

import pytest
from ask_helpers import FIRST, SECOND, TEXT, bare, ids_of, prompt_of

from lrsa_lit.ask.dialogue import Dialogue
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer

NEW = 6


@pytest.mark.parametrize("question", [FIRST, "?", "12", "\n\nWhy", "ß"])
def test_the_prompt_is_that_of_training(question):
    dialogue = Dialogue(tiny_tokenizer(), TEXT)
    text = list(dialogue.ids)
    assert tiny_tokenizer().decode(text).endswith(TEXT)
    dialogue.ask(question)
    assert dialogue.ids == prompt_of(question)
    assert dialogue.ids[: len(text)] == text


@pytest.mark.parametrize("end", [[2], [1], []], ids=["ended", "another message", "cut off"])
def test_turns_are_the_rendered_conversation(end):
    tokenizer = tiny_tokenizer()
    dialogue = Dialogue(tokenizer, TEXT)
    messages = []
    for question, answer in ((FIRST, "21 km"), (SECOND, "lake 1"), ("Why?", "")):
        dialogue.ask(question)
        content = tokenizer.decode(bare(question)).removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
        messages.append({"role": "user", "content": content if messages else f"{TEXT}\n\n{content}"})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(dialogue.ids) == rendered
        dialogue.take(ids_of(answer) + end)
        messages.append({"role": "assistant", "content": answer})


def test_tokens_are_counted_without_asking():
    dialogue = Dialogue(tiny_tokenizer(), TEXT)
    before = list(dialogue.ids)
    counted = dialogue.tokens_with([FIRST, SECOND], NEW)
    assert dialogue.ids == before
    for question in (FIRST, SECOND):
        dialogue.ask(question)
        dialogue.take([5] * NEW)
    assert len(dialogue.ids) == counted


def test_a_template_that_rewrites_earlier_turns_takes_one_question():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    dialogue = Dialogue(tokenizer, TEXT)
    dialogue.ask(FIRST)
    dialogue.take([5])
    with pytest.raises(UserError, match="rewrites earlier turns"):
        dialogue.ask(SECOND)
