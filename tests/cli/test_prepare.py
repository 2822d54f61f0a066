"""``lrsa prepare`` tokenises the data of a fit, which then needs neither its files nor its filter's work."""

import json
import shutil
from pathlib import Path

import data_files
import pytest
import yaml
from cli_helpers import NO_LOGGER, refusal

from lrsa_lit.cli.main import main
from lrsa_lit.data.filters import BM25

SETTINGS = ["--config", "configs/model/tiny.yaml", "--config", "data.yaml", *NO_LOGGER]


@pytest.fixture(autouse=True)
def _data(elsewhere):
    settings = {"max_tokens": 700, "limit": {"train": 3}, **data_files.hotpotqa(elsewhere)}
    data = {"class_path": "HotpotQA", "init_args": {**settings, "filter": {"class_path": "BM25"}}}
    Path("data.yaml").write_text(yaml.safe_dump({"data": data}))


def test_a_copy_of_the_cache_serves_a_machine_without_the_files(elsewhere, monkeypatch, capfd):
    main(["prepare", *SETTINGS])
    told = capfd.readouterr().out.splitlines()
    assert [line.split(" ")[:2] for line in told[:3]] == [["train:", "3"], ["val:", "1"], ["test:", "1"]]
    assert not Path("runs").exists()
    shutil.copytree("cache", "copy")
    for gone in (elsewhere / "hotpotqa.json", elsewhere / "cache"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    monkeypatch.setenv("LRSA_CACHE_DIR", str(elsewhere / "copy"))
    monkeypatch.setattr(BM25, "scores", lambda *_: pytest.fail("the filter worked again"))
    main(["test", *SETTINGS, "--trainer.enable_progress_bar", "false"])
    about = json.loads(next(elsewhere.rglob("answers.json")).read_text())
    assert about["filtered"][""]["context_tokens_left"] < about["filtered"][""]["context_tokens"]


def test_mistakes_are_those_of_a_fit(capfd):
    assert "max_token" in refusal(capfd, "prepare", *SETTINGS, "--data.max_token", "3")
    assert "question_answering" in refusal(capfd, "prepare", "--task", "sentence_retrieval", *SETTINGS)
