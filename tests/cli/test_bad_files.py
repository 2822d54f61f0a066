"""Files and folders that a run cannot use end it in one line with exit code 2, before anything is written."""

import os

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, refusal, refused_before_anything_is_written

from lrsa_lit.cli.main import main


def bad_files():
    broken = '{"id": "a", "passages": [{"title": "t", "text": "x"}], "question": "q", "answers": ["x"]}\n{"id": \n'
    record = '{"id": "a", "passages": [{"title": "t", "text": "x"}], "question": "q", "answers": ["x"]}\n'
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 9))
    yield "broken YAML", ["--config", "x.yaml"], {"x.yaml": "model: ["}, ["--config", "x.yaml", "line 1"]
    yield "config that is a folder", ["--config", "."], {}, ["--config: . is neither a file"]
    yield "config that is a list", ["--config", "x.yaml"], {"x.yaml": "- a"}, ["--config: x.yaml", "list", "mapping"]
    yield "empty config", ["--config", "x.yaml"], {"x.yaml": "# all of it"}, ["--config: x.yaml", "nothing", "mapping"]
    yield (
        "section twice",
        ["--config", "x.yaml"],
        {"x.yaml": "model: {lrsa: {top_k: 4}}\nmodel: {max_new_tokens: 4}"},
        ["--config: x.yaml, line 2", "'model'", "twice"],
    )
    yield "missing config", ["--config", "nowhere.yaml"], {}, ["--config", "nowhere.yaml"]
    yield (
        "missing model package",
        ["--model.backbone.source", "package://no-such-dist/x.gguf"],
        {},
        ["no-such-dist", "pip install"],
    )
    yield "missing model folder", ["--model.backbone.source", "./nowhere"], {}, ["model.backbone.source", "./nowhere"]
    yield (
        "corrupt model",
        ["--model.backbone.source", "x.gguf", "--model.backbone.sha256", "00"],
        {"x.gguf": "no"},
        ["x.gguf", "sha256"],
    )
    yield (
        "unreadable model",
        ["--model.backbone.source", "x.gguf"],
        {"x.gguf": "no"},
        ["model.backbone.source", "x.gguf"],
    )
    yield (
        "corrupt data package",
        ["--data.class_path", "lrsa_lit.data.HotpotQA", "--data.init_args.sha256", "00"],
        {},
        ["hotpotqa.json", "sha256"],
    )
    yield "broken JSON line", ["--data.init_args.train", "x.jsonl"], {"x.jsonl": broken}, ["x.jsonl", "line 2"]
    yield "missing data file", ["--data.init_args.val", "nowhere.jsonl"], {}, ["nowhere.jsonl"]
    yield (
        "empty split",
        ["--data.init_args.train", "x.jsonl"],
        {"x.jsonl": ""},
        ["data.init_args.train: 'x.jsonl'", "train"],
    )
    yield (
        "unwritable output",
        ["--trainer.default_root_dir", "/proc/nowhere"],
        {},
        ["trainer.default_root_dir", "/proc/nowhere"],
    )
    yield (
        "unwritable store",
        ["--trainer.logger", "lrsa_lit.tracking.MLflowRun", "--trainer.logger.tracking_uri", "sqlite:////proc/x/y.db"],
        {},
        ["tracking_uri", "/proc/x/y.db"],
    )
    yield (
        "file store",
        ["--trainer.logger", "lrsa_lit.tracking.MLflowRun", "--trainer.logger.tracking_uri", "file:./x"],
        {},
        ["tracking_uri", "file:./x", "sqlite:///"],
    )
    yield "missing checkpoint", ["--ckpt_path", "nowhere.ckpt"], {}, ["ckpt_path", "nowhere.ckpt"]
    yield "no name of a checkpoint", ["--ckpt_path", ""], {}, ["--ckpt_path: it is empty"]
    yield "junk checkpoint", ["--ckpt_path", "x.pt"], {"x.pt": "no"}, ["ckpt_path", "x.pt"]
    yield "checkpoint by a word", ["--ckpt_path", "best"], {}, ["ckpt_path", "best", "last"]
    yield (
        "twice the same id",
        ["--data.init_args.train", "x.jsonl"],
        {"x.jsonl": record + record},
        ["data.init_args.train: 'x.jsonl'", "'a'", "train"],
    )
    yield (
        "store that is none",
        ["--trainer.logger", "lrsa_lit.tracking.MLflowRun", "--trainer.logger.tracking_uri", "sqlite:///x.db"],
        {"x.db": "no database"},
        ["tracking_uri", "x.db"],
    )
    yield "config with a NUL", ["--config", "a\0b"], {}, ["--config: ", "not a path"]
    yield "config of a long name", ["--config", "a" * 5000], {}, ["--config: ", "not a path"]
    yield "config that contains itself", ["--config", "x.yaml"], {"x.yaml": "a: &a [*a]"}, ["x.yaml", "contains itself"]
    yield "group of a file that explodes", ["--model.lrsa", "x.yaml"], {"x.yaml": laughs}, ["model.lrsa", "values"]
    yield (
        "unknown kind of folder",
        ["--trainer.default_root_dir", "package:///x"],
        {},
        ["trainer.default_root_dir: 'pack"],
    )
    yield "unreadable data", ["--data.init_args.train", "/proc/self/mem"], {}, ["data.init_args.train: '/proc/self"]


@pytest.mark.parametrize(("options", "files", "named"), [pytest.param(*case[1:], id=case[0]) for case in bad_files()])
def test_bad_files_are_one_line(options, files, named, tmp_path, capfd):
    refused_before_anything_is_written(capfd, tmp_path, options, files, named)


@pytest.mark.parametrize("group", ["model", "model.backbone", "model.lrsa", "trainer"])
def test_a_group_of_a_file_that_is_no_text(group, tmp_path, capfd):
    (tmp_path / "junk.json").write_bytes(b"\x9b\xff" * 9)
    assert refusal(capfd, "fit", *DEBUG, f"--{group}=junk.json").startswith(f"{group}=junk.json: ")


@pytest.mark.parametrize("setting", ["model.backbone", "data", "data.init_args.train", "ckpt_path"])
def test_a_pipe_is_not_waited_for(setting, tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(capfd, "fit", *DEBUG, f"--{setting}", "pipe").startswith(f"{setting}: pipe ")


def test_home_is_where_runs_are_kept(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    main(["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--trainer.default_root_dir", "~/runs"])
    (saved,) = (tmp_path / "home/runs").rglob("last.ckpt")
    assert not (tmp_path / "~").exists()
    (tmp_path / "home/x.ckpt").write_bytes(saved.read_bytes())
    main(["export", "~/x.ckpt", "--out", "~/model"])
    assert (tmp_path / "home/model/config.json").is_file()


def test_checkpoint_of_another_kind_of_training(tmp_path, capfd):
    main(["fit", *DEBUG, *NO_LOGGER])
    full = str(next((tmp_path / "runs").rglob("last.ckpt")))
    for options in (["--model.backbone.lora", "{rank: 4}"], ["--trainer.max_steps", "8"]):
        command = "test" if "lora" in options[0] else "fit"
        assert "ckpt_path: " in refusal(capfd, command, *DEBUG, *NO_LOGGER, *options, "--ckpt_path", full)


def test_unsupported_family_is_one_line(tmp_path, capfd):
    from transformers import BloomConfig, BloomForCausalLM

    from lrsa_lit.models.tiny import tiny_tokenizer

    BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "bloom"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "bloom")
    assert "BloomForCausalLM" in refusal(capfd, "fit", *DEBUG, *NO_LOGGER, "--model.backbone.source", "./bloom")


def test_predictions_into_an_unwritable_folder(capfd):
    writer = "[{class_path: lrsa_lit.callbacks.PredictionWriter, init_args: {path: /proc/x/p.jsonl}}]"
    error = refusal(capfd, "predict", *DEBUG, *NO_LOGGER, "--trainer.callbacks", writer)
    assert "'/proc/x/p.jsonl' cannot be written" in error


@pytest.mark.parametrize("content", [{"weights": 1}, [1]], ids=["dict", "list"])
def test_a_file_of_torch_that_is_no_checkpoint(content, tmp_path, capfd):
    torch.save(content, tmp_path / "x.ckpt")
    assert "ckpt_path: x.ckpt is not a checkpoint" in refusal(
        capfd, "test", *DEBUG, *NO_LOGGER, "--ckpt_path", "x.ckpt"
    )
