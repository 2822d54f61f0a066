"""Answers of an evaluation, in the order of their questions, and what survives of the texts."""

import pytest
import torch
from scripted import scripted_model

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention import MeanPool
from lrsa_lit.study.evaluation import Answers, alike, dense_rule, evaluate, survival

RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3)


@pytest.mark.parametrize("rule", [RULE, None], ids=["rule", "dense"])
def test_an_answer_ends_at_its_first_special_token(rule):
    tokenizer = tiny_tokenizer()
    model = enable(scripted_model("?Paris<|im_start|>junk", "!Metz<|im_end|>by", "#Gold<|endoftext|>y"), RULE)
    prompt = torch.randint(3, 259, (1, 30), generator=torch.Generator().manual_seed(0))
    answers = {"?": "Paris", "!": "Metz", "#": "Gold"}
    examples = [
        {
            "id": answer,
            "input_ids": [*prompt[0].tolist(), *tokenizer(start + answer)["input_ids"]],
            "prompt_length": prompt.shape[1] + 1,
            "gold_spans": [],
            "answer_spans": [],
            "answers": [answer],
            "match": "any",
        }
        for start, answer in answers.items()
    ]
    found = evaluate(model, tokenizer, examples, rule, max_new_tokens=12)
    assert found.text == ["Paris", "Metz", "Gold"]
    assert found.f1 == found.em == found.recall == [1, 1, 1]


def test_prompts_of_one_length_come_together():
    assert alike([5, 3, 5, 4, 5, 3], 2) == [[1, 5], [3], [0, 2], [4]]
    assert alike([], 8) == []


def test_answers_are_put_in_the_order_of_the_questions():
    found = Answers(loss=[0.2, 0.0, 0.1], text=["c", "a", "b"]).placed([2, 0, 1])
    assert found == Answers(loss=[0.0, 0.1, 0.2], text=["a", "b", "c"])


def test_survival_is_of_what_selects(data):
    from lrsa_lit.models.tiny import tiny_tokenizer
    from lrsa_lit.study import tokens

    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    examples = tokens.read(tokens.path_of(data, "plain", "test")).examples
    everything = survival(model, tokenizer, examples, RULE.replace(top_k=8))
    # The answers do not stand in these texts.
    assert everything == {"gold": 1.0, "answer": None, "chance": 1.0, "quarters": [1.0] * 4}
    some = survival(model, tokenizer, examples, RULE)
    assert 0 < some["gold"] < 1
    assert sum(some["quarters"]) / 4 == pytest.approx(some["chance"], abs=1e-3)
    short = survival(model, tokenizer, [dict(examples[0], input_ids=examples[0]["input_ids"][:5])], RULE)
    assert short["quarters"] == [None] * 4
    assert survival(model, tokenizer, examples, RULE.replace(top_k=0))["gold"] == 0
    for rule in (None, dense_rule(model), RULE.replace(compressor=MeanPool())):
        assert survival(model, tokenizer, examples, rule) is None
