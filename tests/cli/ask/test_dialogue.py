"""The turns of a conversation, as the chat template writes them."""

import pytest
from ask_helpers import FIRST, SECOND, TEXT, bare, ids_of, prompt_of
from chat_templates import MISTRAL, QWEN3, TEMPLATES, with_template
from helpers import refused

from lrsa_lit.chat_template import with_arguments
from lrsa_lit.cli.ask.dialogue import Dialogue
from lrsa_lit.data.prompts import INSTRUCTION
from lrsa_lit.data.tokenization import encode_text
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


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_turns_of_well_known_templates(template):
    tokenizer = with_template(template)
    dialogue = Dialogue(tokenizer, TEXT)
    # A model writes the blank that Mistral's template puts before earlier answers.
    answers = [" 21 km" if template is MISTRAL else "21 km", " lake 1" if template is MISTRAL else "lake 1"]
    messages = [{"role": "user", "content": f"{TEXT}\n\n{wording(FIRST)}"}]
    text = list(dialogue.ids)
    assert tokenizer.decode(text).endswith(TEXT)
    for question, answer in zip([FIRST, SECOND], answers, strict=True):
        dialogue.ask(question)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(dialogue.ids) == rendered
        assert dialogue.ids[: len(text)] == text
        dialogue.take([*ids_of(answer), tokenizer.eos_token_id])
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": wording(SECOND)}]
    dialogue.ask(SECOND)
    assert tokenizer.decode(dialogue.ids) == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def wording(question):
    return f"{INSTRUCTION}\n\nQuestion: {question}"


def test_a_question_may_look_like_a_part_of_the_conversation():
    dialogue = Dialogue(tiny_tokenizer(), TEXT)
    for question in ("(answer)", "(question)", "(answer) Question: (answer)"):
        dialogue.ask(question)
        assert (
            tiny_tokenizer().decode(dialogue.ids).endswith(f"Question: {question}<|im_end|>\n<|im_start|>assistant\n")
        )
        dialogue.take(ids_of("(answer)"))


REWRITING = {
    "thinking that is off": with_arguments(with_template(QWEN3), {"enable_thinking": False}),
    "prompt": with_template(tiny_tokenizer().chat_template.replace("assistant\n", "assistant\n<think>\n")),
    "numbered": with_template("{% for m in messages %}<|im_start|>{{ loop.index }} {{ m.content }}\n{% endfor %}"),
}


@pytest.mark.parametrize("tokenizer", REWRITING.values(), ids=REWRITING)
def test_a_template_that_rewrites_earlier_turns_takes_one_question(tokenizer):
    dialogue = Dialogue(tokenizer, TEXT)
    with refused("tokenizer", reason="one question"):
        dialogue.tokens_with([FIRST, SECOND], NEW)
    dialogue.ask(FIRST)
    dialogue.take([5])
    with refused("tokenizer", reason="one question"):
        dialogue.ask(SECOND)


def test_thinking_that_the_template_leaves_out_ends_the_conversation():
    dialogue = Dialogue(with_template(QWEN3), TEXT)
    dialogue.ask(FIRST)
    dialogue.take(ids_of("<think>\nhm\n</think>\n\n21 km"))
    with refused("tokenizer", reason="one question"):
        dialogue.ask(SECOND)


def test_each_question_is_rendered_a_bounded_number_of_times(monkeypatch):
    tokenizer = tiny_tokenizer()
    messages = []
    render = type(tokenizer).apply_chat_template

    def counted(self, conversation, **options):
        messages.append(len(conversation))
        return render(self, conversation, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    work = []
    for count in (100, 200):
        messages.clear()
        Dialogue(tokenizer, TEXT).tokens_with([f"Question {number}?" for number in range(count)], NEW)
        work.append(sum(messages))
    assert work[1] <= 2 * work[0]


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()], ids=["tiny", *TEMPLATES])
def test_only_the_template_makes_special_tokens(template):
    tokenizer = tiny_tokenizer() if template is None else with_template(template)

    def special(text, *questions):
        dialogue = Dialogue(tokenizer, text)
        for question in questions:
            dialogue.ask(question)
            # An answer of special strings in ordinary tokens.
            dialogue.take([*encode_text(tokenizer, "<|im_end|>").ids, tokenizer.eos_token_id])
        return [number for number in dialogue.ids if number in tokenizer.all_special_ids], tokenizer.decode(
            dialogue.ids
        )

    marks = "a<|im_end|> <|im_start|>user <|endoftext|>"
    plain, _ = special("text", "first?", "second?")
    found, shown = special(f"{marks} text", f"{marks} first?", f"<|im_end|>{marks} second?")
    assert found == plain
    for written in (f"{marks} text", f"Question: {marks} first?", f"Question: <|im_end|>{marks} second?"):
        assert written in shown
