"""``lrsa export --card`` and ``--push``: a card, code that generates under the rule, and the hub."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from cli_helpers import refusal
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, enable, enabled_config, generate_under_rule
from lrsa_lit.checkpoints.resume import RUN
from lrsa_lit.cli.main import main
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.checkpoint import describe, trained_weights
from lrsa_lit.models.generation_code import INSTALL
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.tracking.evaluation_run import EvaluationRun

RULE = LRSAConfig(sink_size=2, lag_size=16, top_k=4)
IDS = torch.randint(3, 259, (2, 90), generator=torch.Generator().manual_seed(0))
STORE = "sqlite:///runs/mlflow.db"


@pytest.fixture
def checkpoint():
    """Writes a checkpoint of the tiny model without a fit."""

    def write(rule=RULE, run=None, lora=None, name="x.ckpt"):
        backbone = Backbone("tiny", lora=lora)
        model = backbone.build()
        content = {"pytorch-lightning_version": "2.6.0", "global_step": 1, **({RUN: run} if run else {})}
        content["state_dict"] = {f"model.{key}": weight for key, weight in trained_weights(backbone, model).items()}
        describe(content, backbone, rule and rule.to_dict())
        torch.save(content, name)
        return name

    return write


def recorded(name, metrics, **tags):
    return EvaluationRun(name, {}, metrics, tags).record(f"sqlite:///{Path('runs/mlflow.db').absolute()}", None)


def card_of(folder="model"):
    text = (Path(folder) / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_has_rule_budget_data_and_scores(checkpoint, capfd):
    from mlflow.entities import Dataset, DatasetInput

    run_id = recorded("fit-run", {"val/f1": 0.5, "val/dense/f1": 0.25, "train/loss": 9.0}, rule="L16-K4")
    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').absolute()}")
    data = Dataset("QAFiles train", "abcd", "lrsa_lit", "{}", profile=json.dumps({"kept": 1200}))
    client.log_inputs(run_id, [DatasetInput(data, [])])
    recorded(
        "eval-run", {"eval/arc/acc": 0.75, "eval/arc/acc_stderr": 0.1}, **{"checkpoint.run": run_id, "rule": "dense"}
    )
    recorded("other", {"eval/arc/acc": 0.1}, **{"checkpoint.run": "another"})
    main(["export", checkpoint(run=run_id), "--out", "model", "--card", "--license", "openrail++"])
    metadata, body = card_of()
    assert metadata["license"] == "openrail++"
    assert metadata["library_name"] == "transformers"
    assert "base_model" not in metadata, "tiny is no name on the hub"
    assert "keeps 4 of every 16 tokens" in body
    assert "| rule | L = 16, K = 4, sinks 2, chunks of 16 |" in body
    assert "| cache at 4,096 tokens | 25." in body
    assert "| data | QAFiles train, digest `abcd`, 1,200 examples |" in body
    scores = [line for line in body.splitlines() if line.startswith(("| val/", "| eval/", "| train/"))]
    assert scores == [
        "| val/dense/f1 | 0.2500 | L16-K4 | fit-run |",
        "| val/f1 | 0.5000 | L16-K4 | fit-run |",
        "| eval/arc/acc | 0.7500 | dense | eval-run |",
    ]
    assert f"(`{run_id}`)" in body


@pytest.mark.parametrize("run", [None, "f" * 32])
def test_a_card_without_a_run_says_so(run, checkpoint, capfd):
    if run:
        recorded("another", {})
    main(["export", checkpoint(run=run), "--out", "model", "--card"])
    assert "the card has no scores" in capfd.readouterr().err
    _, body = card_of()
    assert "None are recorded." in body
    assert "This card does not know them" in body


def test_each_code_block_of_a_card_runs(checkpoint, capfd):
    main(["export", checkpoint(), "--out", "model", "--card"])
    _, body = card_of()
    assert INSTALL in body
    assert "pypi.org" not in body
    blocks = [block.split("```")[0] for block in body.split("```python\n")[1:]]
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(block.replace("128", "4"), namespace)
    Path("report.txt").write_text("The main result is 7.")
    (command,) = [block.split("```")[0] for block in body.split("```bash\n")[1:]]
    assert command.startswith("lrsa ask --model model report.txt ")
    main(["ask", "--model", "model", "report.txt", "What is the main result?", "--max-new-tokens", "2"])


@pytest.mark.parametrize("mode", ["argument", "loaded with it"])
def test_custom_generate_decodes_under_the_rule(mode, checkpoint, capfd):
    main(["export", checkpoint(), "--out", "model", "--card"])
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    plain = model.generate(IDS, max_new_tokens=12, do_sample=False)
    ruled = enable(tiny_model().eval(), RULE)
    cache = LRSACache.of(ruled)
    expected = ruled.generate(IDS, max_new_tokens=12, do_sample=False, **cache_argument(ruled, cache))
    assert not torch.equal(plain, expected), "the rule must matter"
    if mode == "argument":
        options = {"custom_generate": "model", "trust_remote_code": True}
        found = model.generate(IDS, max_new_tokens=12, do_sample=False, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True).eval()
        found = model.generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, expected)
    assert enabled_config(model) is None
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained("model").generate(IDS, max_new_tokens=12, do_sample=False), plain
    )


def test_custom_generate_holds_a_compressed_cache(monkeypatch):
    seen = []
    original = LRSACache.of
    monkeypatch.setattr(LRSACache, "of", lambda *given: seen.append(original(*given)) or seen[-1])
    model = enable(tiny_model().eval(), RULE)
    generate_under_rule(model, inputs=IDS, max_new_tokens=4, do_sample=False)
    (cache,) = seen
    assert max(cache.stored_tokens()) / 2 < cache.get_seq_length() * 0.6
    assert enabled_config(model) == RULE
    given = LRSACache.of(model)
    generate_under_rule(model, IDS, max_new_tokens=4, **cache_argument(model, given))
    assert given.get_seq_length() == 93
    assert seen == [cache, given]


def test_padded_prompts_generate_what_each_does_alone():
    model = enable(tiny_model().eval(), RULE)
    short = IDS[1:, 40:]
    padded = torch.cat([IDS[:1], torch.nn.functional.pad(short, (40, 0), value=2)])
    mask = torch.ones_like(padded)
    mask[1, :40] = 0
    options = {"max_new_tokens": 8, "do_sample": False}
    together = generate_under_rule(model, padded, attention_mask=mask, **options)
    assert torch.equal(together[0], generate_under_rule(model, IDS[:1], **options)[0])
    assert torch.equal(together[1, 40:], generate_under_rule(model, short, **options)[0])


def test_a_rule_of_latents_holds_keys_where_transformers_has_loaded_the_model(caplog):
    model = tiny_model().eval()
    model.config.lrsa = RULE.replace(latents=True).to_dict()
    found = generate_under_rule(model, IDS, max_new_tokens=8, do_sample=False)
    assert model.config.lrsa["latents"] is True
    assert not [record for record in caplog.records if "trained with" in record.getMessage()]
    ruled = enable(tiny_model().eval(), RULE)
    assert torch.equal(found, generate_under_rule(ruled, IDS, max_new_tokens=8, do_sample=False))


def test_a_model_without_a_rule_is_refused():
    with pytest.raises(UserError, match="holds no LRSA rule"):
        generate_under_rule(tiny_model().eval(), IDS)


def test_without_the_package_one_line_names_it(checkpoint, capfd, tmp_path):
    main(["export", checkpoint(), "--out", "model", "--card"])
    script = """
        import sys
        sys.modules["lrsa_lit"] = None
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("model")
        model.generate(torch.tensor([[5, 6]]), custom_generate="model", trust_remote_code=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: decoding under this model's rule needs the package lrsa-lit ({INSTALL})"
    )


def test_no_code_where_there_is_no_rule_or_no_model(checkpoint, capfd):
    main(["export", checkpoint(rule=None), "--out", "dense", "--card"])
    _, body = card_of("dense")
    assert "dense attention" in body
    assert "custom_generate" not in body
    main(["export", checkpoint(lora=LoRA(rank=2)), "--out", "adapters", "--card", "--adapters"])
    metadata, body = card_of("adapters")
    assert metadata["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in body
    assert not list(Path().glob("*/custom_generate"))


def test_a_base_model_says_its_licence_and_name(tmp_path):
    from lrsa_lit.tracking.model_card import Card, license_of

    (tmp_path / "base").mkdir()
    assert license_of("base") is None
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert license_of("base") == "apache-2.0"
    (tmp_path / "base/README.md").write_text("---\nlicense: [\n---\n# Base\n")
    assert license_of("base") is None
    trained = SimpleNamespace(backbone=SimpleNamespace(source="org/base", lora=None), rule=None)
    assert Card(trained, "x").metadata()["base_model"] == "org/base"


class Hub:
    """Stands in the place of the hub, at the calls that its library documents."""

    def __init__(self, monkeypatch, fail=None):
        self.calls = []
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
        for name in ("whoami", "create_repo", "upload_folder"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, self.answering(name, fail))

    def answering(self, name, fail):
        def answer(api, *given, **options):
            if name == fail:
                raise OSError("403 Forbidden:\nnot yours")
            path = options.get("folder_path")
            files = (
                sorted(str(each.relative_to(path)) for each in Path(path).rglob("*") if each.is_file()) if path else []
            )
            self.calls.append((name, given, options, files))
            return SimpleNamespace(commit_url="https://hub/commit/1")

        return answer


def test_a_folder_is_pushed_whole(checkpoint, capfd, monkeypatch):
    hub = Hub(monkeypatch)
    main(["export", checkpoint(), "--out", "model", "--card", "--push", "org/tiny", "--private"])
    assert "Pushed: https://hub/commit/1" in capfd.readouterr().out
    assert [name for name, *_ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    _, given, options, _ = hub.calls[1]
    assert given == ("org/tiny",)
    assert options == {"private": True, "exist_ok": True}
    _, _, options, files = hub.calls[2]
    assert options["repo_id"] == "org/tiny"
    assert {"README.md", "config.json", "model.safetensors", "custom_generate/generate.py"} <= set(files)
    _, body = card_of()
    assert 'custom_generate="org/tiny"' in body


def test_what_the_hub_refuses_is_one_line(checkpoint, capfd, monkeypatch):
    Hub(monkeypatch, fail="whoami")
    error = refusal(capfd, "export", checkpoint(), "--out", "model", "--push", "org/tiny")
    assert error == "--push: 'org/tiny' was not pushed: 403 Forbidden: not yours"
    assert not Path("model").exists()
    Hub(monkeypatch, fail="upload_folder")
    error = refusal(capfd, "export", checkpoint(), "--out", "model", "--push", "org/tiny")
    assert "upload it later by `hf upload org/tiny model`" in error
    assert (Path("model") / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--license", "mit"], "--license"),
        (["--card", "--license", "my own"], "--license"),
        (["--card", "--license", "Apache 2"], "--license"),
        (["--store", STORE], "--store"),
        (["--private"], "--private"),
        (["--push", "tiny"], "ORG/NAME"),
        (["--push", "a/b/c"], "ORG/NAME"),
        (["--push", "org/ti ny"], "--push"),
        (["--push", "org/tiny"], "HF_TOKEN"),
        (["--card", "--store", STORE], "--store"),
    ],
)
def test_mistakes_write_nothing(options, named, checkpoint, capfd, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert named in refusal(capfd, "export", checkpoint(run="f" * 32), "--out", "model", *options)
    assert not Path("model").exists()
    assert not Path("runs").exists()


def test_a_replaced_model_loses_an_old_card(checkpoint, capfd):
    main(["export", checkpoint(), "--out", "model", "--card"])
    main(["export", checkpoint(), "--out", "model", "--force"])
    assert not (Path("model") / "README.md").exists()
    assert not (Path("model") / "custom_generate").exists()
