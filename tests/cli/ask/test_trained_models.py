"""``lrsa ask``: the rule, the positions, the template and the weights of the model that answers."""

import json
import re

import pytest
import torch
from ask_helpers import FIRST, FLAGS, NEW, RULE, TEXT, counts, ids_of, prompt_of, saved
from chat_templates import with_template
from cli_helpers import DEBUG, NO_LOGGER, refusal

from lrsa_lit.attention import LRSACache, LRSAConfig, enable
from lrsa_lit.chat_template import render
from lrsa_lit.cli.ask.reader import kept_tokens
from lrsa_lit.cli.main import main
from lrsa_lit.data.prompts import INSTRUCTION
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.folder import save_folder
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention import stored_size
from lrsa_lit.systems import FreqKV

TRIMMING = (
    "{{ mood }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)


def test_scaled_positions_take_the_text_that_did_not_fit(ask, capfd, tmp_path):
    model = saved(tmp_path / "model", max_positions=len(prompt_of(FIRST)) // 2)
    with pytest.raises(SystemExit):
        ask(*FLAGS, "--model", model, "text.txt", FIRST)
    suggested = re.search(r"--rope-scaling yarn:\d+", capfd.readouterr().err)[0].split()
    ((seen, _, _),) = counts(ask(*FLAGS, "--model", model, *suggested, "text.txt", FIRST).out)
    assert seen > len(prompt_of(FIRST)) - 1


def test_the_models_own_rule_is_the_default(ask, tmp_path):
    model = saved(tmp_path / "model", RULE.replace(top_k=4))
    shown = ask("--model", model, "text.txt", FIRST)
    ((seen, kept, _),) = counts(shown.out)
    assert kept == stored_size(seen, RULE.replace(top_k=4).rule)
    assert "never trained" not in shown.err
    ((seen, kept, _),) = counts(ask("--model", model, "--top-k", "16", "text.txt", FIRST).out)
    assert kept == stored_size(seen, RULE.replace(top_k=16).rule)


def test_a_model_of_a_system_has_no_k(ask, tmp_path, capfd):
    model = saved(tmp_path / "model", LRSAConfig(system=FreqKV(capacity=40, sink_size=2)))
    ((_, kept, _),) = counts(ask("--model", model, "text.txt", FIRST).out)
    assert kept <= 40
    with pytest.raises(SystemExit):
        ask("--model", model, "--top-k", "16", "text.txt", FIRST)
    assert "--top-k: 16 is not read by the system FreqKV" in capfd.readouterr().err


def test_an_untrained_model_keeps_a_quarter(ask):
    ((seen, kept, _),) = counts(ask("--lag-size", "64", "text.txt", FIRST).out)
    assert kept == stored_size(seen, LRSAConfig(lag_size=64, top_k=16).rule)


def test_dense_layers_are_averaged():
    rule = RULE.replace(dense_layers=(0,))
    model, cache = enable(tiny_model().eval(), rule), LRSACache(rule, 2)
    model(torch.tensor([prompt_of(FIRST)]), past_key_values=cache)
    seen = len(prompt_of(FIRST))
    assert kept_tokens(cache) == round((seen + stored_size(seen, RULE.rule)) / 2)


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
