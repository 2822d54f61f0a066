"""`lrsa fit` and `lrsa test` on chats, instructions and plain texts: shipped configs, all objectives, and a mixture."""

import json
import math

import pytest
import yaml
from cli_helpers import DEBUG, NO_LOGGER, refusal
from cli_helpers import elsewhere as elsewhere

from lrsa_lit.cli.main import main
from lrsa_lit.data import ChatFiles
from lrsa_lit.data.collate import collate
from lrsa_lit.models import Backbone
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.paths import shipped
from lrsa_lit.systems import KeyNorm
from lrsa_lit.tasks import LongContextQA

TINY = ["--config", "configs/model/tiny.yaml", *NO_LOGGER]
RULE = ["--model.lrsa.sink_size", "4", "--model.lrsa.lag_size", "32", "--model.lrsa.top_k", "8"]
SHORT = [
    *RULE,
    "--trainer.max_steps",
    "2",
    "--trainer.val_check_interval",
    "1",
    "--model.optimizer.init_args.lr",
    "0.01",
]


def config(name):
    return ["--config", f"configs/data/{name}.yaml"]


def test_a_folder_stands_for_the_texts_in_it(tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "mine" / name).write_text("The Isk is 212 km long.")
    of = [*TINY, *config("texts"), *RULE, "--data.init_args.test"]
    main(["test", *of, "mine", "--data.init_args.max_tokens", "300"])
    assert "2 pieces" in capfd.readouterr().out
    (tmp_path / "none").mkdir()
    error = refusal(capfd, "test", *of, "none")
    assert "data.init_args.test: 'none' is a folder without any file that ends in" in error


def test_texts_have_a_perplexity(tmp_path, capfd):
    main(["fit", *TINY, *config("texts"), *SHORT, "--data.init_args.max_tokens", "300"])
    shown = capfd.readouterr().out
    assert "Validation on 5 pieces, step 0 → step 2" in shown
    assert "perplexity" in shown
    assert "F1" not in shown
    # The best one is that of the least loss.
    assert list((tmp_path / "runs" / "checkpoints").glob("step*-loss*.ckpt"))
    main(["test", *TINY, *config("texts"), *RULE, "--data.init_args.max_tokens", "300",
          "--data.init_args.scored_from", "200", "--data.init_args.eval_batch_size", "3"])  # fmt: skip
    shown = capfd.readouterr().out
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in shown.splitlines() if "│" in line]
    loss, perplexity = (next(row for row in cells if row[2] == name) for name in ("answer loss", "perplexity"))
    for one, other in zip(loss[3:], perplexity[3:], strict=True):
        assert float(other) == pytest.approx(math.exp(float(one)), rel=1e-2)
    assert "Left out, as no token follows their context (scored_from): " in shown


def test_chats_and_texts_mix_with_questions_under_every_objective(tmp_path, capfd):
    sets = {}
    for name in ("chats", "instructions", "texts", "files"):
        data = yaml.safe_load(shipped(f"configs/data/{name}.yaml").read_text())["data"]
        own = {"packing": None, "max_tokens": 2048, "limit": {"train": 2, "val": 1}}
        sets[name] = {"class_path": data["class_path"], "init_args": data["init_args"] | own}
    terms = [{"class_path": name, "init_args": init_args} for name, init_args in
             {"AnswerLoss": {}, "Distillation": {"positions": 20}, "LanguageModelLoss": {"share": 0.5},
              "HiddenAlignment": {"positions": 9}}.items()]  # fmt: skip
    mixed = {"max_tokens": 2048, "packing": {"tokens": 2048}, "data_sets": sets, "weights": dict.fromkeys(sets, 1)}
    settings = {
        "best_by": "loss",
        "data": {"class_path": "lrsa_lit.data.Mixture", "init_args": mixed},
        "model": {"generate_answers": False},
    }
    settings["model"]["objective"] = {"class_path": "Sum", "init_args": {"objectives": terms}}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", *TINY, "--config", "mixed.yaml", *SHORT])
    shown = capfd.readouterr().out
    for name in sets:
        assert name in shown
    error = refusal(capfd, "fit", *TINY, "--config", "mixed.yaml", *SHORT, "--model.generate_answers", "true")
    assert "model.generate_answers: True is not possible with TextFiles" in error


def test_what_cannot_be_is_refused_before_a_run_begins(tmp_path, capfd):
    (tmp_path / "x.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    options = ["--data.init_args.train", "x.jsonl", "--data.init_args.val", "null"]
    error = refusal(capfd, "fit", *TINY, *config("chats"), *SHORT, *options)
    assert error.startswith("x.jsonl, line 1: messages: has no message of the assistant")
    assert "predict: is not possible with TextFiles" in refusal(capfd, "predict", *TINY, *config("texts"))
    assert "best_by" in refusal(capfd, "fit", *DEBUG, "--best_by", "perplexity")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_message_of_a_chat_can_be_asked_for(tmp_path):
    main(["predict", *TINY, *config("chats")])
    (path,) = (tmp_path / "runs").rglob("predictions.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["gold"] == ["It rises below the glacier of Mount Orda."]
    assert len(lines) == 4


def test_a_system_that_keeps_all_of_a_first_turn_has_the_losses_of_dense_attention():
    data = ChatFiles(train="data/sample-chats.jsonl", tokenizer=tiny_tokenizer())
    batch = collate([data.to_example(record) for record in data.records("train")], 0)
    task = LongContextQA(Backbone("tiny"))
    task.configure_model()
    dense, tokens = task.losses(batch, None)
    found, same = task.losses(batch, task.lrsa.replace(system=KeyNorm(kept=1.0)))
    assert found.tolist() == pytest.approx(dense.tolist(), rel=1e-4)
    assert tokens.tolist() == same.tolist() == [size.answer for size in batch["sizes"]]
