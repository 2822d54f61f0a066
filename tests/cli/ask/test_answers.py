"""``lrsa ask``: what is answered, what is kept of the text, and how both are shown."""

import io
import json
import os
import sys
import threading

import pytest
import torch
from ask_helpers import (
    FIRST,
    FLAGS,
    NEW,
    RULE,
    SECOND,
    TEXT,
    Terminal,
    bare,
    counts,
    greedy,
    ids_of,
    prompt_of,
    saved,
    words,
)
from rich.console import Console
from scripted import scripted_model
from transformers import DynamicCache, TextStreamer

from lrsa_lit.attention import LRSACache, LRSAConfig, enable
from lrsa_lit.cli.ask.dialogue import Dialogue
from lrsa_lit.cli.ask.reader import Reader, kept_tokens
from lrsa_lit.cli.main import main
from lrsa_lit.models.generation import before_stop, stop_tokens
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention import stored_size
from lrsa_lit.systems import KVzip


def test_the_answer_is_printed_and_what_was_kept_of_the_text(ask):
    shown = ask(*FLAGS, "text.txt", FIRST)
    answer = greedy(enable(tiny_model().eval(), RULE), prompt_of(FIRST))
    seen = len(prompt_of(FIRST)) + len(answer) - 1
    kept = stored_size(seen, RULE.rule)
    assert kept < seen / 2
    assert counts(shown.out) == [(seen, kept, round(100 * kept / seen))]
    assert words(answer) in shown.out
    assert "tokens/s" in shown.err
    assert "tiny was never trained with LRSA" in shown.err


def test_the_answer_is_printed_token_by_token(ask, monkeypatch):
    pieces = []
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda self, text, stream_end=False: pieces.append(text))
    ask(*FLAGS, "text.txt", FIRST)
    answer = greedy(enable(tiny_model().eval(), RULE), prompt_of(FIRST))
    assert len(pieces) == len(answer) + 1
    assert "".join(pieces).strip() == words(answer)


def test_a_follow_up_is_the_whole_conversation_from_scratch(ask):
    shown = ask(*FLAGS, "--json", "text.txt", FIRST, SECOND)
    first, second = (json.loads(line) for line in shown.out.splitlines())

    model = enable(tiny_model().eval(), RULE)
    prompt = prompt_of(FIRST)
    answer = greedy(model, prompt)
    # The second question alone is worded as a training prompt without any text.
    conversation = prompt + before_stop(answer, stop_tokens(tiny_tokenizer())) + ids_of("<|im_end|>\n") + bare(SECOND)
    assert first["answer"] == words(answer)
    assert second["answer"] == words(greedy(model, conversation))
    assert second["tokens_seen"] == len(conversation) + len(greedy(model, conversation)) - 1
    assert second["tokens_kept"] == stored_size(second["tokens_seen"], RULE.rule)


@pytest.mark.parametrize("end", ["<|im_start|>", "<|im_end|>"], ids=["another message", "end of message"])
def test_an_answer_ends_at_its_first_special_token(end, capfd, tmp_path):
    scripted_model(f"\nParis{end}junk").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["ask", "--model", str(tmp_path / "model"), "--max-new-tokens", "12", *FLAGS, "text.txt", FIRST]
    capfd.readouterr()
    main(arguments)
    answer, count = capfd.readouterr().out.splitlines()
    assert answer == "Paris"
    assert count.startswith(f"{len(prompt_of(FIRST)) + len('Paris'):,} tokens read")
    main([*arguments, SECOND, "--json"])
    assert [json.loads(line)["answer"] for line in capfd.readouterr().out.splitlines()] == ["Paris", "Paris"]


@pytest.mark.parametrize("end", ["<|im_start|>", "<|im_end|>"], ids=["another message", "end of message"])
def test_a_conversation_goes_on_as_the_chat_template_writes_it(end):
    model, tokenizer = scripted_model(f"\nParis{end}junk"), tiny_tokenizer()
    reader = Reader(model, DynamicCache(config=model.config), tokenizer, Dialogue(tokenizer, TEXT), max_new_tokens=12)
    reader.read(Console(file=io.StringIO()))
    for question in (FIRST, SECOND):
        assert reader.answer(question, show=False).answer == "Paris"
    conversation = prompt_of(FIRST) + ids_of("Paris<|im_end|>\n") + bare(SECOND) + ids_of("Paris")
    expected = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([conversation]), past_key_values=expected)
    for layer, fresh in zip(reader.cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, fresh.keys)


@pytest.mark.parametrize("question", [False, True])
def test_a_system_that_has_the_prompt_repeated_cuts_once(question):
    """The text, or that with its first question; what comes later is kept."""
    tokenizer, model = tiny_tokenizer(), tiny_model().eval()
    enable(model, LRSAConfig(system=KVzip(0.5, chunk=64, question=question)))
    dialogue = Dialogue(tokenizer, TEXT)
    prompt = len(prompt_of(FIRST)) if question else len(dialogue.ids)
    reader = Reader(model, LRSACache.of(model), tokenizer, dialogue, max_new_tokens=4)
    reader.read(Console(file=io.StringIO()))
    assert kept_tokens(reader.cache) == (len(dialogue.ids) if question else prompt // 2)
    for question in (FIRST, SECOND):
        found = reader.answer(question, show=False)
        assert found.tokens_kept == prompt // 2 + found.tokens_seen - prompt


def test_json_has_one_object_a_question_and_nothing_else_on_stdout(ask):
    shown = ask(*FLAGS, "text.txt", FIRST, "--json", SECOND)
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["question"] for line in lines] == [FIRST, SECOND]
    seconds = {"seconds_to_first_token", "seconds"}
    fields = {"question", "answer", "tokens_seen", "tokens_restored", "tokens_kept"} | seconds
    assert all(set(line) == fields for line in lines)
    assert all(0 < line["seconds_to_first_token"] <= line["seconds"] for line in lines)
    assert "tokens/s" in shown.err


def test_several_questions_are_named_before_their_answers(ask):
    shown = ask(*FLAGS, "text.txt", FIRST, SECOND).out
    assert shown.index(f"> {FIRST}\n") < shown.index(f"> {SECOND}\n")
    assert len(counts(shown)) == 2


def test_dense_keeps_everything_and_is_the_models_own_answer(ask):
    shown = json.loads(ask("--dense", "--json", "text.txt", FIRST).out)
    assert shown["answer"] == words(greedy(tiny_model().eval(), prompt_of(FIRST)))
    assert shown["tokens_kept"] == shown["tokens_seen"]
    assert shown["answer"] != words(greedy(enable(tiny_model().eval(), RULE), prompt_of(FIRST)))


def test_a_dense_follow_up(ask):
    shown = ask("--dense", "text.txt", FIRST, SECOND)
    assert [line[2] for line in counts(shown.out)] == [100, 100]
    assert "never trained" not in shown.err


def test_the_text_comes_from_stdin(ask, monkeypatch):
    from_file = json.loads(ask(*FLAGS, "--json", "text.txt", FIRST).out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"\ufeff{TEXT}\n".encode())))
    from_stdin = json.loads(ask(*FLAGS, "--json", "-", FIRST).out)
    assert from_stdin["answer"] == from_file["answer"]
    assert from_stdin["tokens_seen"] == from_file["tokens_seen"]


@pytest.mark.parametrize("given", [[], [FIRST]], ids=["none given", "one given"])
@pytest.mark.parametrize("typed", [f"{SECOND}\n\nnot reached\n", SECOND], ids=["empty line", "Ctrl-D"])
def test_further_questions_are_typed(given, typed, ask, monkeypatch):
    expected = [json.loads(line) for line in ask(*FLAGS, "--json", "text.txt", *given, SECOND).out.splitlines()]
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    shown = ask(*FLAGS, "text.txt", *given)
    assert [line[0] for line in counts(shown.out)] == [line["tokens_seen"] for line in expected]
    assert all(line["answer"] in shown.out for line in expected)
    assert "Question (an empty line ends)" in shown.err


def test_a_typed_question_that_does_not_fit_is_refused_and_the_next_one_answered(ask, monkeypatch, tmp_path):
    model = saved(tmp_path / "model", max_positions=len(prompt_of(FIRST)) + NEW)
    monkeypatch.setattr(sys, "stdin", Terminal(f"{FIRST} {FIRST}\n{FIRST}\n\n"))
    shown = ask(*FLAGS, "--model", model, "text.txt")
    assert len(counts(shown.out)) == 1
    assert f"lrsa: FILE: 'text.txt' needs {len(prompt_of(FIRST)) + NEW + len(FIRST) + 1:,} tokens" in shown.err


def test_scripts_are_never_asked(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("", interrupted=True))
    assert len(ask(*FLAGS, "--json", "text.txt", FIRST).out.splitlines()) == 1


def test_a_pipe_is_a_file(ask, tmp_path):
    expected = json.loads(ask(*FLAGS, "--json", "text.txt", FIRST).out)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[TEXT])
    writer.start()
    answer = json.loads(ask(*FLAGS, "--json", "pipe", FIRST).out)
    writer.join()
    assert answer["answer"] == expected["answer"]
