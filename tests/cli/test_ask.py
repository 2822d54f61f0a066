"""``lrsa ask``: questions about a text, on the cache that is left of it."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading

import pytest
import torch
from ask_helpers import FIRST, SECOND, TEXT, bare, ids_of, prompt_of
from chat_templates import with_template
from cli_helpers import DEBUG, NO_LOGGER, refusal
from rich.console import Console
from scripted import scripted_model
from transformers import DynamicCache, TextStreamer

import lrsa_lit.attention
from lrsa_lit.attention import LRSACache, LRSAConfig, enable
from lrsa_lit.chat_template import render
from lrsa_lit.cli.ask.dialogue import Dialogue
from lrsa_lit.cli.ask.reader import Reader, kept_tokens
from lrsa_lit.cli.main import main
from lrsa_lit.data.prompts import INSTRUCTION
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.folder import save_folder
from lrsa_lit.models.generation import before_stop, stop_tokens
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention import stored_size

RULE = LRSAConfig(sink_size=4, lag_size=32, top_k=8)
FLAGS = ["--lag-size", "32", "--top-k", "8", "--sink-size", "4"]
TRIMMING = (
    "{{ mood }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
NEW = 6
ASK = ["ask", "--model", "tiny", "--max-new-tokens", str(NEW)]


class Terminal(io.StringIO):
    """What is typed, on something that says it is a terminal; Ctrl-C where it runs dry, if asked for."""

    def __init__(self, typed, *, interrupted=False):
        super().__init__(typed)
        self._interrupted = interrupted

    def isatty(self):
        return True

    def readline(self, *size):
        line = super().readline(*size)
        if not line and self._interrupted:
            raise KeyboardInterrupt
        return line


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    # No terminal, even where pytest runs in one: a test must not wait for a question.
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (tmp_path / "text.txt").write_text(f"\n{TEXT}\n", encoding="utf-8")


@pytest.fixture
def ask(capfd):
    """Run the command; returns what it wrote to stdout and stderr."""

    def run(*arguments):
        main([*ASK, *arguments])
        return capfd.readouterr()

    return run


def words(ids):
    return tiny_tokenizer().decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def greedy(model, prompt):
    """The answer's tokens by parallel passes over everything, without any cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stop_tokens(tiny_tokenizer()):
            break
    return ids[len(prompt) :]


def counts(shown):
    found = re.findall(r"^([\d,]+) tokens read, ([\d,]+) kept per head \((\d+) %\)$", shown, flags=re.MULTILINE)
    return [tuple(int(number.replace(",", "")) for number in line) for line in found]


def saved(folder, rule=None, **sizes):
    """A model folder as a fit's export leaves it."""
    model = tiny_model(**sizes)
    (model if rule is None else enable(model, rule)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


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


def test_json_has_one_object_a_question_and_nothing_else_on_stdout(ask):
    shown = ask(*FLAGS, "text.txt", FIRST, "--json", SECOND)
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["question"] for line in lines] == [FIRST, SECOND]
    fields = {"question", "answer", "tokens_seen", "tokens_kept", "seconds_to_first_token", "seconds"}
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


def test_scaled_positions_take_the_text_that_did_not_fit(ask, capfd, tmp_path):
    model = saved(tmp_path / "model", max_positions=len(prompt_of(FIRST)) // 2)
    with pytest.raises(SystemExit):
        ask(*FLAGS, "--model", model, "text.txt", FIRST)
    suggested = re.search(r"--rope-scaling yarn:\d+", capfd.readouterr().err)[0].split()
    ((seen, _, _),) = counts(ask(*FLAGS, "--model", model, *suggested, "text.txt", FIRST).out)
    assert seen > len(prompt_of(FIRST)) - 1


def test_scripts_are_never_asked(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("", interrupted=True))
    assert len(ask(*FLAGS, "--json", "text.txt", FIRST).out.splitlines()) == 1


def test_the_models_own_rule_is_the_default(ask, tmp_path):
    model = saved(tmp_path / "model", RULE.replace(top_k=4))
    shown = ask("--model", model, "text.txt", FIRST)
    ((seen, kept, _),) = counts(shown.out)
    assert kept == stored_size(seen, RULE.replace(top_k=4).rule)
    assert "never trained" not in shown.err
    ((seen, kept, _),) = counts(ask("--model", model, "--top-k", "16", "text.txt", FIRST).out)
    assert kept == stored_size(seen, RULE.replace(top_k=16).rule)


def test_an_untrained_model_keeps_a_quarter(ask):
    ((seen, kept, _),) = counts(ask("--lag-size", "64", "text.txt", FIRST).out)
    assert kept == stored_size(seen, LRSAConfig(lag_size=64, top_k=16).rule)


def test_dense_layers_are_averaged():
    rule = RULE.replace(dense_layers=(0,))
    model, cache = enable(tiny_model().eval(), rule), LRSACache(rule, 2)
    model(torch.tensor([prompt_of(FIRST)]), past_key_values=cache)
    seen = len(prompt_of(FIRST))
    assert kept_tokens(cache) == round((seen + stored_size(seen, RULE.rule)) / 2)


def bad_inputs():
    given = ["text.txt", FIRST]
    yield "no file", [], ["FILE", "required"]
    yield "missing file", ["nowhere.txt", FIRST], ["FILE", "nowhere.txt"]
    yield "folder", [".", FIRST], ["FILE", "."]
    yield "not UTF-8", ["latin.txt", FIRST], ["FILE", "latin.txt", "UTF-8", "byte 3"]
    yield "empty file", ["empty.txt", FIRST], ["FILE", "empty.txt", "empty"]
    yield "no question", ["text.txt"], ["QUESTION"]
    yield "empty question", ["text.txt", FIRST, " "], ["QUESTION", "number 2", "empty"]
    yield "missing model folder", ["--model", "./nowhere", *given], ["--model", "./nowhere", "tiny"]
    yield "unknown hub name", ["--model", "no-such/model", *given], ["--model", "no-such/model"]
    yield "missing package", ["--model", "package://no-such-dist/x.gguf", *given], ["no-such-dist", "pip install"]
    yield "lag size one", ["--lag-size", "1", *given], ["--lag-size", "1", ">= 2"]
    yield "lag size text", ["--lag-size", "abc", *given], ["--lag-size", "'abc'", "integer"]
    yield "top k too large", ["--lag-size", "8", "--top-k", "9", *given], ["--top-k", "9", "0 to lag_size (8)"]
    yield "sinks negative", ["--sink-size", "-1", *given], ["--sink-size", "-1", ">= 0"]
    yield "chunk zero", ["--chunk-size", "0", *given], ["--chunk-size", "0", ">= 1"]
    yield "no new tokens", ["--max-new-tokens", "0", *given], ["--max-new-tokens", "'0'", "from 1 to"]
    yield "rule and dense", ["--dense", "--top-k", "3", *given], ["--top-k", "--dense"]
    yield "dtype", ["--dtype", "int8", *given], ["--dtype", "int8", "bfloat16"]
    for device in ("cuda:99", "cuda:-1", "mps", "xpu", "hpu", "xla", "tpu", "vulkan", "cpu:x", "", "cuda:" + "9" * 40):
        if not (device == "mps" and torch.backends.mps.is_available()):
            yield f"device {device}", ["--device", device, *given], ["--device", repr(device), "cpu"]
    yield "no such device", ["--device", "banana", *given], ["--device", "banana", "cpu"]
    yield "device without data", ["--device", "meta", *given], ["--device", "meta", "cpu"]
    yield "unknown option", ["--topk", "3", *given], ["--topk"]
    yield "too long", ["long.txt", FIRST], ["FILE", "long.txt", "8,192 positions", "tiny", "max-new-tokens"]
    yield "scaling", ["--rope-scaling", "ntk:2", "text.txt", FIRST], ["--rope-scaling", "ntk:2", "yarn:FACTOR"]
    yield "scaling without end", ["--rope-scaling", "yarn:1e99", *given], ["--rope-scaling", "yarn:1e99"]
    yield "scaling too much", ["--rope-scaling", "yarn:9999999999", *given], ["--rope-scaling", "1,000,000"]
    yield "huge integer", ["--top-k", str(10**30), *given], ["--top-k", "integer", "2147483647"]
    yield "thousands of digits", ["--max-new-tokens", "9" * 5000, *given], ["--max-new-tokens", "integer"]
    yield "many new tokens", ["--max-new-tokens", str(10**9), *given], ["FILE", "1,000,000,000", "8,192 positions"]
    yield "template arguments", ["--template-arguments", "[1]", *given], ["--template-arguments", "[1]", "object"]
    yield "template argument", ["--template-arguments", '{"x": 1}', *given], ["--template-arguments.x"]
    yield "binary file", ["binary.txt", FIRST], ["FILE", "binary.txt", "NUL"]
    yield "UTF-16 file", ["utf16.txt", FIRST], ["FILE", "utf16.txt", "UTF-8"]
    yield "path with NUL", ["text\0.txt", FIRST], ["FILE", "text\\x00.txt", "path"]
    yield "overlong path", ["x" * 5000, FIRST], ["FILE", "xxx"]
    yield "endless file", ["/dev/zero", FIRST], ["FILE", "/dev/zero", "device"]
    yield "question of other bytes", ["text.txt", FIRST, "caf\udce9?"], ["QUESTION", "number 2", "UTF-8"]
    yield "scaling down", ["--rope-scaling", "yarn:0.5", "text.txt", FIRST], ["--rope-scaling", "0.5", "from 1"]
    yield "follow-ups too long", ["fitting.txt", FIRST, SECOND], ["FILE", "fitting.txt", "8,192 positions"]


@pytest.mark.parametrize(("arguments", "named"), [pytest.param(*case[1:], id=case[0]) for case in bad_inputs()])
def test_bad_input_is_one_line(arguments, named, tmp_path, capfd):
    (tmp_path / "latin.txt").write_bytes("Münster".encode("latin-1").replace(b"M", b"abM"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"ab\0c")
    (tmp_path / "utf16.txt").write_text("abc", encoding="utf-16")
    (tmp_path / "long.txt").write_text("a" * (8192 - len(prompt_of(FIRST, "a")) - NEW + 2))
    (tmp_path / "fitting.txt").write_text("a" * (8192 - len(prompt_of(FIRST, "a")) - NEW + 1))
    with pytest.raises(SystemExit) as stop:
        main([*ASK, *arguments])
    assert stop.value.code == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert [line.startswith("lrsa: error: ") for line in lines].count(True) == 1
    assert "Traceback" not in shown.err
    for part in named:
        assert part in lines[-1]


def test_too_long_names_the_number_and_the_longest_text_fits(ask, capfd, tmp_path):
    needed = len(prompt_of(FIRST)) + NEW
    with pytest.raises(SystemExit):
        ask(*FLAGS, "--model", saved(tmp_path / "short", max_positions=needed - 1), "text.txt", FIRST)
    assert f"needs {needed:,} tokens" in capfd.readouterr().err
    assert counts(ask(*FLAGS, "--model", saved(tmp_path / "long", max_positions=needed), "text.txt", FIRST).out)


def test_a_broken_rule_in_the_models_config(capfd, tmp_path):
    model = saved(tmp_path / "model", RULE)
    path = tmp_path / "model/config.json"
    capfd.readouterr()
    for broken in ({"lag_size": -3}, {"lag": 3}, "text"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lrsa": broken}))
        with pytest.raises(SystemExit) as stop:
            main([*ASK, "--model", model, "text.txt", FIRST])
        assert stop.value.code == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"lrsa: error: --model: {model!r} has no valid rule")


def test_an_unsupported_family_is_one_line(capfd, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "b")
    tiny_tokenizer().save_pretrained(tmp_path / "b")
    assert "--model: 'BloomForCausalLM'" in refusal(capfd, *ASK, "--model", "./b", "text.txt", FIRST)


def test_ctrl_c_while_reading(monkeypatch, capfd):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lrsa_lit.attention, "prefill", interrupted)
    with pytest.raises(SystemExit) as stop:
        main([*ASK, *FLAGS, "text.txt", FIRST])
    assert stop.value.code == 130
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_instead_of_a_question(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", Terminal("", interrupted=True))
    with pytest.raises(SystemExit) as stop:
        main([*ASK, *FLAGS, "text.txt", FIRST])
    assert stop.value.code == 130
    shown = capfd.readouterr()
    assert len(counts(shown.out)) == 1
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("lora", [False, True], ids=["all-weights", "lora"])
def test_the_checkpoint_of_a_fit(lora, ask, tmp_path, capfd):
    adapters = ["--model.backbone.lora", "{rank: 4, target_modules: all-linear}"] if lora else []
    main(["fit", *DEBUG, *NO_LOGGER, *adapters, "--trainer.max_steps", "2", "--model.optimizer.lr", "0.05"])
    checkpoint = next((tmp_path / "runs").rglob("last.ckpt"))
    capfd.readouterr()
    main(["ask", "--model", str(checkpoint), "--max-new-tokens", "4", "text.txt", FIRST])
    shown = capfd.readouterr()
    trained = load_trained(checkpoint)
    assert LRSAConfig.from_dict(trained.rule) == LRSAConfig(sink_size=4, lag_size=32, top_k=8)
    assert (trained.backbone.lora is not None) == lora
    assert "never trained" not in shown.err
    seen = int(re.search(r"([\d,]+) tokens read", shown.out)[1].replace(",", ""))
    kept = stored_size(seen, LRSAConfig.from_dict(trained.rule).rule)
    assert f"{kept:,} kept per head" in shown.out
    weights = trained.build().state_dict()
    assert all(weights[name].equal(weight) for name, weight in trained.weights.items())


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "missing"])
def test_what_is_no_checkpoint(content, tmp_path, capfd):
    if content is not None:
        (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["ask", "--model", "last.ckpt", "text.txt", FIRST])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    what = "does not exist" if content is None else "is no checkpoint"
    assert line.startswith(f"lrsa: error: --model: last.ckpt {what}")


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_out_of_memory_on_a_cpu_is_one_line(error, monkeypatch, capfd):
    def full(*args, **kwargs):
        raise error(
            "[enforce fail at alloc_cpu.cpp:130] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
        )

    monkeypatch.setattr(lrsa_lit.attention, "prefill", full)
    line = refusal(capfd, *ASK, *FLAGS, "text.txt", FIRST)
    assert "out of memory" in line
    assert "4000000000000 bytes" in line


def test_other_runtime_errors_are_not_hidden(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(lrsa_lit.attention, "prefill", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main([*ASK, *FLAGS, "text.txt", FIRST])


def test_a_pipe_is_a_file(ask, tmp_path):
    expected = json.loads(ask(*FLAGS, "--json", "text.txt", FIRST).out)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[TEXT])
    writer.start()
    answer = json.loads(ask(*FLAGS, "--json", "pipe", FIRST).out)
    writer.join()
    assert answer["answer"] == expected["answer"]


def test_a_template_that_trims_and_takes_arguments(capfd, tmp_path):
    """A prompt is that of training, whether the arguments are given or come from the checkpoint."""
    saved(tmp_path / "model")
    with_template(TRIMMING).save_pretrained(tmp_path / "model")
    argument = '{"mood": "calm"}'
    arguments = [*DEBUG, *NO_LOGGER, "--model.backbone.source", "./model", "--trainer.max_steps", "1"]
    main(["fit", *arguments, "--model.template_arguments", argument, "--validate_first", "false"])
    checkpoint = str(next((tmp_path / "runs").rglob("last.ckpt")))
    main(["export", checkpoint, "--out", "exported"])

    def seen(model, *flags):
        capfd.readouterr()
        main(["ask", "--json", "--max-new-tokens", "1", *flags, "--model", model, "text.txt", FIRST])
        return json.loads(capfd.readouterr().out)["tokens_seen"]

    prompt = [{"role": "user", "content": f"{TEXT}\n\n{INSTRUCTION}\n\nQuestion: {FIRST}"}]
    plain = seen("./model")
    assert plain == len(ids_of(render(prompt, with_template(TRIMMING))))
    assert seen("./model", "--template-arguments", argument) == plain + len("calm")
    assert seen(checkpoint) == plain + len("calm")
    assert seen("./exported") == plain + len("calm")
    assert seen(checkpoint, "--template-arguments", "{}") == plain
    assert seen(checkpoint, "--template-arguments", '{"mood": "merry"}') == plain + len("merry")


def test_template_arguments_without_effect_are_refused_by_a_fit(capfd):
    error = refusal(capfd, "fit", *DEBUG, *NO_LOGGER, "--model.template_arguments", "{mod: calm}")
    assert error.startswith("model.template_arguments.mod: ")


def test_a_folder_of_adapters(tmp_path, capfd):
    """It answers as the adapters and their rule do on the base model that the folder names."""
    tiny_model().save_pretrained(tmp_path / "base"), tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = enable(Backbone(str(tmp_path / "base"), lora=LoRA(rank=2)).build(), RULE)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    save_folder(model, tiny_tokenizer(), tmp_path / "adapters")
    save_folder(model.merge_and_unload(), tiny_tokenizer(), tmp_path / "merged")
    answers = []
    for name in ("adapters", "merged", "base"):
        main(["ask", "--json", "--model", name, *FLAGS, "--max-new-tokens", str(NEW), "text.txt", FIRST])
        answers.append(json.loads(capfd.readouterr().out))
    assert answers[0]["answer"] == answers[1]["answer"] != answers[2]["answer"]
