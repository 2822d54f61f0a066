"""What is kept of the evidence, as it stands beside the answers of a test."""

import json

import pytest
from cli_helpers import DEBUG, NO_LOGGER

from lrsa_lit.analysis.survival import EvidenceSurvival
from lrsa_lit.cli.main import main
from lrsa_lit.errors import UserError

CALLBACKS = "[{class_path: lrsa_lit.callbacks.AnswerWriter}, {class_path: lrsa_lit.analysis.survival.EvidenceSurvival}]"
RULES = {
    "everything": "{top_k: 32}",
    "nothing": "{top_k: 0}",
    "pooled": "{compressor: {class_path: lrsa_lit.ops.sparse_attention.MeanPool}}",
    "layers": "{dense_layers: [0, 1]}",
}


def test_survival_is_of_what_selects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    rules = "{dense: null, " + ", ".join(f"{name}: {rule}" for name, rule in RULES.items()) + "}"
    main(["test", *DEBUG, *NO_LOGGER, "--trainer.callbacks", CALLBACKS, "--model.evaluate", rules])
    (path,) = (tmp_path / "runs").rglob("answers.json")
    found = {name: of_sets[""] for name, of_sets in json.loads(path.read_text())["survival"].items()}
    assert [name for name, kept in found.items() if kept is None] == ["dense", "pooled", "layers"]
    everything = found["everything"]
    assert {everything["gold"], everything["answer"], everything["chance"]} <= {1.0, None}
    assert everything["quarters"] == [1.0] * 4
    assert found["nothing"]["gold"] == found["nothing"]["chance"] == 0
    assert 0 < found["LRSA"]["gold"] < 1
    assert sum(found["LRSA"]["quarters"]) / 4 == pytest.approx(found["LRSA"]["chance"], abs=1e-3)


def test_it_looks_at_a_question_at_least():
    with pytest.raises(UserError) as error:
        EvidenceSurvival(0)
    assert error.value.field == "EvidenceSurvival.questions"
