"""The model folder among a run's artifacts gives the logits of the best checkpoint."""

import pytest
import torch
from cli_helpers import DEBUG, recorded_runs
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrsa_lit.cli.main import main
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.folder import save_folder
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.tracking import model as logging_model

FIT = ["fit", *DEBUG, "--validate_first", "false", "--model.optimizer.lr", "0.01"]
IDS = torch.arange(200)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def best(elsewhere):
    (path,) = [path for path in (elsewhere / "runs").rglob("*.ckpt") if path.name != "last.ckpt"]
    return load_trained(path).build()


def test_all_weights(elsewhere):
    # The best checkpoint is that of the first validation: the weights go on to change.
    main([*FIT, "--trainer.val_check_interval", "2"])
    (folder,) = (elsewhere / "runs/artifacts").rglob("model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(best(elsewhere)))
    assert not torch.equal(logits(loaded), logits(tiny_model()))
    assert loaded.config.lrsa["lag_size"] == 32
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert len(list(elsewhere.rglob("*.safetensors"))) == 1, "the weights stand once"


def test_adapters(elsewhere):
    from peft import AutoPeftModelForCausalLM

    save_folder(tiny_model(), tiny_tokenizer(), elsewhere / "base")
    lora = ["--model.backbone.source", "./base", "--model.backbone.lora", "{rank: 4}"]
    main([*FIT, *lora, "--trainer.callbacks+=lrsa_lit.tracking.LogModel", "--trainer.callbacks.what", "adapters"])
    (folder,) = (elsewhere / "runs/artifacts").rglob("model")
    trained = logits(best(elsewhere))
    assert not torch.equal(trained, logits(tiny_model()))
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), AutoPeftModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(logits(loaded), trained)
    assert {path.name for path in folder.glob("*.safetensors")} == {"adapter_model.safetensors"}


def test_adapters_of_scaled_positions_are_left_to_their_checkpoint(elsewhere, caplog):
    """Whoever loaded the folder would get the base model's positions."""
    lora = ["--model.backbone.lora", "{rank: 4}", "--model.backbone.rope_scaling", "{rope_type: yarn, factor: 2}"]
    main([*FIT, *lora, "--trainer.max_steps", "1"])
    assert not list(elsewhere.rglob("adapter_config.json"))
    assert any("rope_scaling" in message for message in caplog.messages)


@pytest.mark.parametrize("what", ["none", "adapters"])
def test_switched_off(elsewhere, what):
    callback = f"[{{class_path: lrsa_lit.tracking.LogModel, init_args: {{what: {what}}}}}]"
    main([*FIT, "--trainer.max_steps", "1", "--trainer.callbacks", callback])
    assert recorded_runs(elsewhere / "runs/mlflow.db", "debug")
    assert not list(elsewhere.rglob("*.safetensors"))


def test_a_full_disk_costs_the_folder_alone(elsewhere, monkeypatch, caplog):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logging_model, "save_folder", full)
    main([*FIT, "--trainer.max_steps", "1"])
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "debug")
    assert run.info.status == "FINISHED"
    (said,) = [record.message for record in caplog.records if "model folder" in record.message]
    assert said == "The model folder was not logged: No space left on device"
