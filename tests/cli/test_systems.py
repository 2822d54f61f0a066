"""Systems from YAML and on the command line."""

import json
from pathlib import Path

import pytest
import yaml
from cli_helpers import DEBUG, NO_LOGGER, refusal
from plugin_helpers import write_examples

from lrsa_lit import plugins
from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.main import main
from lrsa_lit.paths import shipped
from lrsa_lit.run_labels import title_of_own
from lrsa_lit.systems import KeyNorm, OneShot
from lrsa_lit.tracking.run_record import run_name

SHORT = ["--model.max_new_tokens", "2", "--data.init_args.limit", "{test: 1}", "--trainer.enable_progress_bar", "false"]
TEST = ["test", *DEBUG, *NO_LOGGER, *SHORT]


def test_the_shipped_list_has_every_system_of_one_cut_and_yours_beside_them(tmp_path, monkeypatch):
    write_examples(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    listed = yaml.safe_load(shipped("configs/systems/one_shot.yaml").read_text())["model"]["evaluate"]
    names = {attention["system"]["class_path"] for attention in listed.values() if attention}
    known = plugins.registered("systems").items()
    assert names == {name for name, system in known if issubclass(system, OneShot) and "lrsa_lit" in system.__module__}
    scorer = {"scorer": {"class_path": "value_norm.ValueNorm"}}
    own = {"values": {"system": "ValueNorm"}, "cut": {"system": {"class_path": "AdaKV", "init_args": scorer}}}
    settings = {"plugins": "value_norm", "model": {"evaluate": listed | own, "generate_answers": False}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    main([*TEST, "--config", "own.yaml"])
    about = json.loads(next(tmp_path.rglob("answers.json")).read_text())["attentions"]
    assert list(about) == ["LRSA", *listed, *own]
    assert about["values"]["rule"]["system"]["class_path"] == "value_norm.ValueNorm"
    (line,) = next(tmp_path.rglob("answers.jsonl")).read_text().splitlines()
    losses = {json.loads(line)[name]["loss"] for name in about}
    assert len(losses) == len(about)


def test_the_runs_own_row_is_headed_by_its_system(tmp_path, capfd):
    main(
        [
            *TEST,
            "--model.lrsa.system",
            "KeyNorm",
            "--model.evaluate",
            "{wide: {system: {class_path: KeyNorm, init_args: {kept: 0.9}}}}",
        ]
    )
    shown = capfd.readouterr().out
    assert "KeyNorm" in shown
    assert "LRSA" not in shown
    # In files the run's own attention has the same name in all runs.
    assert {"LRSA", "wide"} <= json.loads(next(tmp_path.rglob("answers.jsonl")).read_text()).keys()
    own = LRSAConfig(system=KeyNorm())
    assert title_of_own(own, ["", "KeyNorm"]) == "KeyNorm (the run's)"
    assert (title_of_own(own, [""]), title_of_own(LRSAConfig())) == ("KeyNorm", "LRSA")
    lrsa = {"lag_size": 32, "top_k": 8, "system": {"class_path": "lrsa_lit.systems.KeyNorm"}}
    settings = {"model": {"backbone": {"source": "tiny"}, "lrsa": lrsa, "train_attention": {}}, "seed_everything": 0}
    assert run_name(settings) == "tiny-KeyNorm-s0"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.lrsa.system", "SnapKV", "--model.lrsa.system.kept", "2"], ["model.lrsa.system.init_args.kept: 2"]),
        (["--model.lrsa.system", "SnapKV", "--model.lrsa.system.kep", "1"], ["model.lrsa.system", "kep", "kept"]),
        (["--model.lrsa.compressor", "KeyDiff", "--model.lrsa.system", "SnapKV"],
         ["model.lrsa.compressor: 'KeyDiff' is not read by the system SnapKV; leave one of them out"]),
        (["--config", "sys.yaml", "--model.lrsa.top_k=4"], ["model.lrsa.top_k: 4 is not read by the system KeyNorm"]),
        (["--model.evaluate", "{x: {system: SnapKV, lag_size: 8}}"], ["model.evaluate.x.lag_size: 8", "SnapKV"]),
        (["--config", "sys.yaml", "--model.evaluate", "{x: {top_k: 4}}"], ["model.evaluate.x.top_k: 4", "KeyNorm"]),
        (["--config", "sys.yaml", "--model.train_attention", "{top_k: 4}"], ["model.train_attention.top_k: 4"]),
        (["--model.lrsa.system", "FreqKV", "--model.train_top_k", "SampledTopK", "--model.train_top_k.choices", "[4]"],
         ["model.train_top_k: it is not allowed with system, which has no K"]),
        (["--model.evaluate", "{x: {system: {class_path: AdaKV, init_args: {scorer: {class_path: SnapKV,"
          " init_args: {window: 0}}}}}}"], ["model.evaluate.x.system.init_args.scorer.init_args.window: 0 is not"]),
        (["--model.evaluate", "{4: {top_k: 4}}"], ["model.evaluate: 4 is not allowed", "a name of letters"]),
        (["--model.evaluate", "{x: {system: Nope}}"], ["model.evaluate.x.system: 'Nope'"]),
        (["--model.evaluate", "{x: {system: MeanPool}}"], ["model.evaluate.x.system: 'MeanPool'"]),
        (["--model.evaluate", "{x: {system: {class_path: SnapKV, init_args: {window: 9999}}}}"],
         ["model.evaluate.x.system.init_args.window: 9999", "the whole prompt of 354 tokens"]),
        (["--model.evaluate", "{x: {system: {class_path: KVzip, init_args: {kept: 0.005}}}}"],
         ["model.evaluate.x.system.init_args.kept: 0.005", "1 of 354 tokens", "4 sinks"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(arguments, parts, capfd):
    Path("sys.yaml").write_text("model: {lrsa: {system: KeyNorm}}")
    error = refusal(capfd, *TEST, *arguments)
    assert all(part in error for part in parts), error


def test_a_checkpoint_of_a_system_says_so_where_it_runs_without(tmp_path, caplog):
    brief = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
    system = ["--model.lrsa.system", "FreqKV", "--model.lrsa.system.capacity", "200"]
    main(["fit", *DEBUG, *NO_LOGGER, *brief, *system])
    weights = [*TEST, "--model.generate_answers", "false", "--ckpt_path", str(next(tmp_path.rglob("last.ckpt")))]
    main(weights)
    assert (
        "the weights were trained with the system FreqKV {'capacity': 200, 'sink_size': 4, 'gamma': 0.5}" in caplog.text
    )
    assert "and now run with {'sink_size': 4, 'lag_size': 32," in caplog.text
    for others in (system, ["--model.evaluate", "{own: {system: {class_path: FreqKV, init_args: {capacity: 200}}}}"]):
        caplog.clear()
        main([*weights, *others])
        assert "trained with" not in caplog.text


def test_a_system_that_cannot_train_is_not_trained(capfd):
    error = refusal(capfd, "fit", *DEBUG, *NO_LOGGER, "--model.lrsa.system", "ExpectedAttention")
    assert "model.train_attention: 'ExpectedAttention' is a system that cannot be trained with" in error
