"""The callback that looks at each layer alone: in a trainer on batches made by hand, and by the command line."""

import functools
import json
import shlex

import processes
import pytest
import torch
import yaml
from cli_helpers import DEBUG, NO_LOGGER, elsewhere, forwards, recorded_runs, refusal  # noqa: F401 - a fixture
from helpers import quiet_trainer, refused
from mlflow.tracking import MlflowClient
from torch.utils.data import DataLoader

from lrsa_lit.analysis.ablation import HeadAblation, LayerAblation
from lrsa_lit.analysis.head_worths import budgets_for, write_budgets
from lrsa_lit.attention import LRSAConfig, enable, mean_top_k, using
from lrsa_lit.cli.main import main
from lrsa_lit.data.collate import collate
from lrsa_lit.models import Backbone
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import MeanPool
from lrsa_lit.tasks import LongContextQA

RULE = LRSAConfig(sink_size=4, lag_size=16, top_k=2)
LAYERS = ["--config", "configs/experiment/layers.yaml"]
PROMPTS = (150, 90, 120)


def task(model, rule=RULE):
    made = LongContextQA(Backbone("tiny"), rule, max_new_tokens=1)
    made.model = enable(model, rule)
    return made


def examples(model):
    """Questions whose answers, of 5, 3 and 4 tokens, are what the model says with dense attention."""
    made, generator = [], torch.Generator().manual_seed(0)
    for length in PROMPTS:
        prompt = torch.randint(3, 259, (1, length), generator=generator)
        ids = model.generate(prompt, max_new_tokens=length // 30, do_sample=False, eos_token_id=None, pad_token_id=2)
        empty = {"gold_spans": [], "answer_spans": [], "answers": ["x"], "match": "any"}
        made.append({"id": f"q{length}", "input_ids": ids[0].tolist(), "prompt_length": length, **empty})
    return made


def trainer(folder, *callbacks, **options):
    return quiet_trainer(default_root_dir=folder, callbacks=list(callbacks), **options)


def loader(rows, size=1):
    rows = [{**row, "position": position} for position, row in enumerate(rows)]
    return DataLoader(rows, batch_size=size, collate_fn=functools.partial(collate, pad_token_id=2))


def found(folder):
    """What the latest validation has left."""
    latest = max(folder.glob("validate-*"), key=lambda made: int(made.name.rpartition("-")[2]))
    return json.loads((latest / "layers.json").read_text())


def shown_flags(shown):
    """The suggested settings."""
    (line,) = [line for line in shown.splitlines() if " % kept: " in line]
    return shlex.split(line.partition(": ")[2])


def test_losses_are_those_of_each_question_alone_under_the_rules_set_by_hand(tmp_path, caplog):
    model = tiny_model(num_layers=3).double()
    rows = examples(model)
    # Its weights say that they were trained with another rule, and the run leaves a layer dense.
    model.config.lrsa = {"top_k": 5}
    made = task(model, RULE.replace(dense_layers=(1,)))
    caplog.clear()
    repeated = {**rows[0], "repeated": True}
    exact = trainer(tmp_path, LayerAblation(top_k=1), precision="64-true")
    exact.validate(made, loader([*rows, repeated], 4), verbose=False)
    assert not [message for message in caplog.messages if "trained with" in message]
    assert made.model.config.lrsa["dense_layers"] == [1]

    sparse = RULE.replace(top_k=1)
    rules = [sparse, *(sparse.replace(dense_layers=(layer,)) for layer in range(3)), None]
    expected = []
    for rule in rules:
        with using(made.model, rule), torch.no_grad():
            expected.append([made.summed_losses(collate([row], 2), 0).item() for row in rows])
    questions = found(tmp_path)["questions"]
    assert questions["id"] == [f"q{length}" for length in PROMPTS]
    assert questions["tokens"] == [5, 3, 4]
    losses = [questions["none"], *questions["layers"], questions["all"]]
    assert losses == [pytest.approx(each, rel=1e-6) for each in expected]
    assert len({round(sum(each), 4) for each in losses}) == 5
    assert LRSAConfig.from_dict(found(tmp_path)["rule"]) == sparse


def test_the_only_layer_whose_attention_matters_comes_first(tmp_path, capfd):
    model = tiny_model(num_layers=4)
    for layer in (0, 1, 3):
        torch.nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
    rows = examples(model)
    trainer(tmp_path, LayerAblation(share=0.9)).validate(task(model), loader(rows), verbose=False)
    first, *others = found(tmp_path)["ranking"]
    assert first["layer"] == 2
    assert first["fall"] == pytest.approx(found(tmp_path)["all"]["fall"], rel=1e-4)
    assert first["low"] > 0.01
    assert [abs(other["fall"]) < 1e-5 for other in others] == [True] * 3
    assert "│ layer 2 │" in capfd.readouterr().out
    ranking = str(next(tmp_path.rglob("layers.json")))
    ranked = RULE.replace(top_k=0, head_top_k={"ranking": ranking, "budget": 0.5, "tokens": 150})
    assert ranked.head_top_k == (0, 0, 16, 0)


def test_the_first_questions_only(tmp_path):
    rows, losses = examples(tiny_model()), []
    for size in (1, 2, 3):
        made = task(tiny_model())
        trainer(tmp_path, LayerAblation(limit=2)).validate(made, loader(rows, size), verbose=False)
        questions = found(tmp_path)["questions"]
        assert questions["id"] == ["q150", "q90"]
        losses.append([questions["none"], *questions["layers"], questions["all"]])
    assert losses[1:] == [[pytest.approx(each, rel=1e-5) for each in losses[0]]] * 2


def test_each_validation_keeps_its_ranking(tmp_path, capfd):
    rows, shown = examples(tiny_model()), []
    for _ in range(2):
        made = trainer(tmp_path, LayerAblation(limit=1))
        for _ in range(2):
            made.validate(task(tiny_model()), loader(rows), verbose=False)
            lines = capfd.readouterr().out.splitlines()
            shown += [line.removeprefix("Layers: ") for line in lines if line.startswith("Layers: ")]
    names = ["layers.json", "layers-2.json"]
    assert shown == [str(tmp_path / folder / name) for folder in ("validate-1", "validate-2") for name in names]
    assert sorted(shown) == sorted(str(path) for path in tmp_path.rglob("*.json"))


@pytest.mark.parametrize("rule", [RULE.replace(top_k=0), RULE.replace(compressor=MeanPool())], ids=["none", "pool"])
def test_rules_that_select_nothing(rule, tmp_path):
    made = task(tiny_model(), rule)
    trainer(tmp_path, LayerAblation()).validate(made, loader(examples(tiny_model())), verbose=False)
    assert found(tmp_path)["rule"] == rule.to_dict()
    assert found(tmp_path)["suggestion"]["top_k"] >= 1


def test_nothing_in_a_fit(tmp_path, capfd):
    model = tiny_model()
    rows = loader(examples(model))
    callback = LayerAblation()
    trainer(tmp_path, callback, max_steps=2, num_sanity_val_steps=1).fit(task(model), rows, rows)
    assert not list(tmp_path.rglob("layers.json"))
    assert "% kept" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("field", "value"), [("top_k", -1), ("share", 0.0), ("share", 1.0), ("share", float("nan")), ("limit", 0)]
)
def test_wrong_values(field, value):
    with refused(field, value):
        LayerAblation(**{field: value})


def test_a_rule_that_drops_nothing(tmp_path):
    model = tiny_model()
    with refused("top_k", 16):
        trainer(tmp_path, LayerAblation(top_k=16)).validate(task(model), loader(examples(model)))
    assert not list(tmp_path.iterdir())


def validate(*options):
    main(["validate", *DEBUG, *options])


def test_the_command_and_what_it_suggests(tmp_path, capfd):
    validate(*LAYERS, "--trainer.callbacks.top_k", "1", "--trainer.callbacks.share", "0.6")
    shown = capfd.readouterr().out
    artifact = next((tmp_path / "runs/artifacts").rglob("layers.json"))
    beside = next(path for path in (tmp_path / "runs").rglob("layers.json") if path != artifact)
    assert f"Layers: {beside.relative_to(tmp_path)}" in shown.splitlines()
    assert artifact.read_text() == beside.read_text()
    values = json.loads(artifact.read_text())
    assert len(values["questions"]["id"]) == 2

    # With the best layer dense, a run of its own has the loss that it was ranked by.
    best = values["ranking"][0]
    validate("--model.lrsa.top_k", "1", "--model.lrsa.dense_layers", f"[{best['layer']}]")
    alone, _ = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    assert alone.data.metrics["val/loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert alone.data.metrics["val/dense/loss"] == pytest.approx(values["all"]["loss"], rel=1e-5)

    capfd.readouterr()
    with pytest.raises(SystemExit):
        validate(*NO_LOGGER, *shown_flags(shown), "--print_config")
    rule = yaml.safe_load(capfd.readouterr().out)["model"]["lrsa"]
    assert (rule["dense_layers"], rule["top_k"]) == ([best["layer"]], 6)
    assert values["suggestion"] == {"dense_layers": rule["dense_layers"], "top_k": 6, "kept": (1 + 6 / 32) / 2}
    validate(*NO_LOGGER, *shown_flags(shown))


def test_a_fit_by_the_command_line_does_not_ask_for_it(tmp_path):
    short = ["--model.max_new_tokens", "1", "--trainer.max_steps", "3"]
    assert forwards(*LAYERS, *short) == forwards(*short)
    assert not list(tmp_path.rglob("layers.json"))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("trainer.callbacks.share", "1.5", "LayerAblation.share: 1.5 is not allowed"),
        ("trainer.callbacks.share", "0.01", "LayerAblation.share: 0.01 is not allowed"),
        ("trainer.callbacks.top_k", "32", "LayerAblation.top_k: 32 is not allowed"),
        ("trainer.callbacks.limit", "some", "limit"),
        ("model.lrsa.top_k", "32", "model.lrsa.top_k: 32 is not allowed"),
        ("model.lrsa.system", "KeyNorm", "model.lrsa.system: 'KeyNorm' has no K; LayerAblation is for rules"),
    ],
)
def test_mistakes_are_one_line_before_a_run_is_recorded(option, value, says, tmp_path, capfd):
    line = refusal(capfd, "validate", *DEBUG, *LAYERS, f"--{option}", value)
    assert says in line
    store = tmp_path / "runs/mlflow.db"
    assert [path for path in tmp_path.rglob("runs/*") if path != store] == []
    assert not store.exists() or MlflowClient(f"sqlite:///{store}").get_experiment_by_name("debug") is None


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["null", "3"])
def test_two_devices_find_what_one_does(limit, tmp_path):
    # Five questions: one is repeated on the second device.
    options = [*DEBUG, *NO_LOGGER, *LAYERS, "--data.init_args.limit", "{val: 5}", "--trainer.accelerator", "cpu"]
    options += ["--trainer.callbacks.limit", limit]
    main(["validate", *options, "--trainer.default_root_dir", "one"])
    two = ["--config", "configs/trainer/ddp.yaml", "--trainer.devices", "2", "--trainer.default_root_dir", "two"]
    assert processes.run(["validate", *options, *two], tmp_path).count(" % kept: ") == 1
    one, other = (found(tmp_path / folder) for folder in ("one", "two"))
    assert one["questions"]["id"] == other["questions"]["id"]
    assert len(one["questions"]["id"]) == (5 if limit == "null" else 3)
    for name in ("none", "all"):
        assert one["questions"][name] == pytest.approx(other["questions"][name], rel=1e-5)
    assert one["suggestion"] == other["suggestion"]


def test_the_only_head_whose_attention_matters_gets_the_budget(tmp_path, capfd):
    """The output of all other heads is zero: none of them is worth anything."""
    model = tiny_model(num_layers=3)
    for layer, decoder in enumerate(model.model.layers):
        # Two query heads of each of two key-value heads.
        silent = slice(None) if layer != 1 else slice(0, decoder.self_attn.o_proj.in_features // 2)
        torch.nn.init.zeros_(decoder.self_attn.o_proj.weight.data[:, silent])
        decoder.self_attn.o_proj.weight.data.mul_(30)
    callback = HeadAblation(top_k=15, share=0.25)
    trainer(tmp_path, callback).validate(task(model), loader(examples(model)), verbose=False)
    (path,) = tmp_path.rglob("heads.json")
    values = json.loads(path.read_text())
    first, *others = values["ranking"]
    assert (first["layer"], first["head"]) == (1, 1)
    assert first["fall"] > 0.1
    assert [abs(other["fall"]) < 1e-5 for other in others] == [True] * 5
    ranked = RULE.replace(top_k=0, head_top_k={"ranking": str(path), "budget": 0.4, "tokens": 150})
    assert ranked.head_top_k == ((0, 0), (0, 16), (0, 0))
    # 0.25 x 6 heads x 16: the best one is dense, the next one has the rest.
    budgets = json.loads((path.parent / "head_top_k.json").read_text())
    assert budgets == values["head_top_k"]
    assert (budgets[1][1], sum(map(sum, budgets))) == (16, 24)
    assert "│ layer 1 head 1 │" in (shown := capfd.readouterr().out)
    assert f"25 % kept: --model.lrsa.head_top_k {path.parent / 'head_top_k.json'}" in shown

    write_budgets(path, tmp_path / "half.json", 8, least=2)
    half = LRSAConfig(lag_size=16, top_k=2, head_top_k=str(tmp_path / "half.json"))
    assert mean_top_k(half, 3) == 8
    with using(model, half):
        model(torch.arange(3, 90)[None])


def test_budgets_of_layers(tmp_path):
    ranking = [{"layer": layer, "fall": fall} for layer, fall in ((2, 0.5), (0, 0.1), (1, -0.2))]
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"ranking": ranking, "rule": {"lag_size": 16}}))
    write_budgets(path, tmp_path / "k.json", 7)
    assert json.loads((tmp_path / "k.json").read_text()) == [5, 0, 16]
    assert budgets_for([[0.1, 0.1], [0.3, 0.2]], 4, 8, least=1) == [[1, 1], [8, 6]]
    with refused("mean_top_k", 1.0):
        budgets_for([1.0, 2.0], 1, 16, least=2)


def test_heads_are_ranked_under_one_k(tmp_path):
    ragged = task(tiny_model(), RULE.replace(head_top_k=[2, [0, 1]]))
    for callback, made, reason in (
        (HeadAblation(), ragged, "a single K"),
        (LayerAblation(), ragged, "a single K"),
        (HeadAblation(top_k=0), task(tiny_model()), "anything to lose"),
    ):
        with refused("top_k", reason=reason):
            callback.check_settings(made, "validate")
