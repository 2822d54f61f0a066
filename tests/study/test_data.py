"""Data sets become token files, as the study says."""

import itertools
import json

import pytest
import torch
import yaml
from helpers import one_line
from study.conftest import STUDY

from lrsa_lit.cli.main import main
from lrsa_lit.data.prompts import TooLong
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.study import tokens
from lrsa_lit.study.articles import Articles


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))


def articles_file(tmp_path) -> str:
    def article(name: str, paragraphs: int) -> dict:
        qas = [{"id": f"{name}-q", "question": "Q?", "answers": [{"text": "fact"}], "is_impossible": False}]
        texts = [{"context": f"{name} fact {number}. " * 5, "qas": qas if number == 0 else []}
                 for number in range(paragraphs)]  # fmt: skip
        return {"title": name, "paragraphs": texts}

    content = {"data": [article("Long", 6), article("Longer", 9), article("Short", 1)]}
    (tmp_path / "squad.json").write_text(json.dumps(content))
    return str(tmp_path / "squad.json")


def test_the_splits_of_the_limits_are_written(tmp_path, capsys):
    given = {"max_tokens": 4096, "train": "data/sample.jsonl", "test": "data/sample.jsonl"}
    sets = {
        "plain": {"class_path": "lrsa_lit.data.QAFiles", "init_args": {**given, "limit": {"train": 2, "test": 1}}},
        "text": {
            "class_path": "lrsa_lit.study.articles.Articles",
            "init_args": {"source": articles_file(tmp_path), "sha256": None, "max_tokens": 300, "scored_from": 100,
                          "val_fraction": 0.0, "test_fraction": 0.9, "limit": {"test": 5}},
        },
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "data_sets": sets}))
    main(["study", "data", str(path), "--data", str(tmp_path / "data")])
    assert {file.name for file in (tmp_path / "data").iterdir()} == {
        "plain-train.npz", "plain-test.npz", "text-test.npz"}  # fmt: skip
    shown = capsys.readouterr().out
    assert "plain-train.npz: 2 examples" in shown
    assert "total: " in shown
    text = tokens.read(tmp_path / "data" / "text-test.npz")
    assert sorted(example["id"] for example in text.examples) == ["Long-q", "Longer-q"]
    assert {(len(example["input_ids"]), example["prompt_length"]) for example in text.examples} == {(300, 100)}
    with pytest.raises(SystemExit, match="2"):
        main(["study", "data", str(path), "--only", "other"])
    assert "'other'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"foo": 1, "limit": {"test": 1}}, "'foo'"),
        ({"tasks": ["foo"], "limit": {"test": 1}}, "data.init_args.tasks: 'foo'"),
        ({}, "init_args.limit"),
    ],
    ids=["unknown", "refused", "no limit"],
)
def test_a_mistake_of_a_data_set_names_it(arguments, named, tmp_path, capsys):
    path = tmp_path / "study.yaml"
    sets = {"plain": STUDY["data_sets"]["plain"], "keys": {"class_path": "lrsa_lit.data.Needles"}}
    sets["keys"]["init_args"] = arguments
    path.write_text(yaml.safe_dump({**STUDY, "data_sets": {**STUDY["data_sets"], **sets}}))
    with pytest.raises(SystemExit, match="2"):
        main(["study", "data", str(path), "--data", str(tmp_path / "data"), "--only", "keys"])
    shown = capsys.readouterr().err
    assert "data_sets.keys: " in shown
    assert named in shown


def test_an_article_is_text_alone(tmp_path):
    made = Articles(source=articles_file(tmp_path), sha256=None, max_tokens=200, scored_from=50, val_fraction=0.0)
    made.tokenizer = tokenizer = tiny_tokenizer()
    records = {record.id: record for split in ("train", "test") for record in made.records(split)}
    text = tokenizer.decode(made.to_example(records["Long-q"])["input_ids"])
    assert text.startswith("Long (1)\nLong fact 0. Long fact 0.")
    assert "Q?" not in text
    assert isinstance(made.to_example(records["Short-q"]), TooLong)
    with pytest.raises(UserError) as error:
        Articles(source=articles_file(tmp_path), sha256=None, max_tokens=200, scored_from=200)
    assert "scored_from" in one_line(error.value)


def test_the_batches_are_those_of_a_fit_with_the_row_as_its_config(tmp_path):
    from data_helpers import ids

    from lrsa_lit.data import Mixture, QAFiles
    from lrsa_lit.study.plan import Study
    from lrsa_lit.study.training import Batches

    def files(name: str, count: int) -> dict:
        lines = [{"id": f"{name}{number}", "passages": [{"title": "T", "text": "x" * number}], "question": "Q?",
                  "answers": ["a"]} for number in range(1, count + 1)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"max_tokens": 1024, "train": str(tmp_path / f"{name}.jsonl"), "limit": {"train": 99}}

    given = {"plain": files("plain", 9), "text": files("text", 4)}
    sets = {name: {"class_path": "lrsa_lit.data.QAFiles", "init_args": options} for name, options in given.items()}
    rows = {"both": {"data": {"init_args": {"weights": {"text": 0.3, "plain": 0.7}}}}}
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({**STUDY, "data_sets": sets, "rows": rows, "parts": {}}, sort_keys=False)
    )
    main(["study", "data", str(tmp_path / "study.yaml"), "--data", str(tmp_path / "data")])
    study = Study(str(tmp_path / "study.yaml"))
    config = study.as_config("both", 3)["data"]["init_args"]
    parts = {name: QAFiles(**part["init_args"]) for name, part in config.pop("data_sets").items()}
    fitted = Mixture(data_sets=parts, tokenizer=tiny_tokenizer(), **config)
    fitted.prepare_data("fit")
    fitted.setup("fit")
    torch.manual_seed(3)
    loader = fitted.train_dataloader()
    expected = [*ids(loader), *ids(loader)]
    read = {name: tokens.read(tokens.path_of(tmp_path / "data", name, "train")) for name in study.row("both").weights}
    batches = Batches(read, study.row("both"), 3, 2)
    found = [batch["id"] for batch in itertools.islice(batches, 2 * len(batches.plan))]
    assert list(itertools.chain(*found)) == expected
    batches.first = 9
    assert next(iter(batches))["id"] == found[9]
