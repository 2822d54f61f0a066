"""``lrsa ask``: a mistake is one line, and so is an end before the answer."""

import json
import sys

import pytest
import torch
from ask_helpers import ASK, FIRST, FLAGS, NEW, RULE, SECOND, Terminal, counts, prompt_of, saved
from cli_helpers import refusal

import lrsa_lit.attention
from lrsa_lit.cli.main import main
from lrsa_lit.models.tiny import tiny_tokenizer


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
    yield "unknown hub name", ["--model", "no-such/model", *given], ["--model", "no-such/model", "not a folder here"]
    yield "no model name", ["--model", "", *given], ["--model: it is empty"]
    yield "missing package", ["--model", "package://no-such-dist/x.gguf", *given], ["no-such-dist", "pip install"]
    yield "lag size one", ["--lag-size", "1", *given], ["--lag-size", "1", ">= 2"]
    yield "lag size text", ["--lag-size", "abc", *given], ["--lag-size", "'abc'", "integer"]
    yield "top k too large", ["--lag-size", "8", "--top-k", "9", *given], ["--top-k", "9", "0 to lag_size (8)"]
    yield "sinks negative", ["--sink-size", "-1", *given], ["--sink-size", "-1", ">= 0"]
    yield "chunk zero", ["--chunk-size", "0", *given], ["--chunk-size", "0", ">= 1"]
    yield "no new tokens", ["--max-new-tokens", "0", *given], ["--max-new-tokens", "'0'", "from 1 to"]
    yield "rule and dense", ["--dense", "--top-k", "3", *given], ["--top-k", "--dense"]
    yield "dtype", ["--dtype", "int8", *given], ["--dtype", "int8", "bfloat16"]
    for device in ("cuda:99", "cuda:-1", "mps", "xpu", "hpu", "xla", "tpu", "vulkan", "cpu:x", "cuda:" + "9" * 40):
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


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "missing"])
def test_what_is_no_checkpoint(content, tmp_path, capfd):
    if content is not None:
        (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["ask", "--model", "last.ckpt", "text.txt", FIRST])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    what = "does not exist" if content is None else "is not a checkpoint"
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
