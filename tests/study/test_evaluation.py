"""Greedy answers in the memory of the prompt before: the same as with a cache of their own."""

import pytest
import torch
from scripted import scripted_model

from lrsa_lit.attention import LRSACache, enable
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.ops.sparse_attention import (
    LRSAConfig,
    MeanPool,
    RandomTokens,
    Recency,
    Strided,
    ValueRelative,
)
from lrsa_lit.study.evaluation import Answers, Greedy, alike, dense_rule, evaluate, survival

RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3)
LENGTHS = (30, 61, 18, 75, 44)


def prompts(rows: int = 1) -> list:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 259, (rows, length), generator=generator) for length in LENGTHS]


def until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


@pytest.mark.parametrize(
    "change",
    [{}, {"chunk_size": 20}, {"top_k": 0}, {"dense_layers": (1,)}, {"compressor": MeanPool()},
     *({"compressor": made} for made in (RandomTokens(3), Recency(), Strided(), ValueRelative())), None],
    ids=["rule", "chunk", "none", "layer", "mean", "random", "recent", "strided", "values", "dense"],
)  # fmt: skip
def test_answers_are_those_of_generate_in_one_memory(change, monkeypatch):
    model = tiny_model().eval()
    enable(model, dense_rule(model) if change is None else RULE.replace(**change))
    greedy = Greedy(model, 20, max(LENGTHS))
    for number, prompt in enumerate(prompts()):
        options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 2, "pad_token_id": 2}
        mask = torch.ones_like(prompt)
        whole = model.generate(prompt, attention_mask=mask, past_key_values=LRSACache.of(model), **options)
        assert greedy(prompt, [2]) == [until(whole[0, prompt.shape[1] :].tolist(), 2)]
        if number == 0:
            # Once prepared, the one graph must do.
            monkeypatch.setattr(greedy.memories[1].decoder, "_prepare", None)


@pytest.mark.parametrize("change", [{}, {"compressor": RandomTokens(3)}, None], ids=["rule", "random", "dense"])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_answers_do_not_depend_on_who_else_is_answered(change, rows):
    model = tiny_model().eval()
    enable(model, dense_rule(model) if change is None else RULE.replace(**change))
    greedy, alone = Greedy(model, 20, max(LENGTHS)), Greedy(model, 20, max(LENGTHS))
    for batch in prompts(rows):
        # An end that some rows reach before others.
        (stop, *_) = alone(batch[:1], [])[0][7:]
        assert greedy(batch, [stop]) == [alone(prompt[None], [stop])[0] for prompt in batch]
    assert list(greedy.memories) == [1 << (rows - 1).bit_length()]


def test_an_answer_ends_before_the_end_of_message():
    model = enable(tiny_model().eval(), RULE)
    (prompt, *_) = prompts()
    (answer,) = Greedy(model, 12, prompt.shape[1])(prompt, [])
    assert len(answer) == 12
    stop = answer[5]
    assert Greedy(model, 12, prompt.shape[1])(prompt, [stop]) == [until(answer, stop)]
    assert len(Greedy(model, 1, prompt.shape[1])(prompt, [])[0]) == 1


@pytest.mark.parametrize("rule", [RULE, None], ids=["rule", "dense"])
def test_an_answer_ends_at_its_first_special_token(rule):
    tokenizer = tiny_tokenizer()
    model = enable(scripted_model("?Paris<|im_start|>junk", "!Metz<|im_end|>by", "#Gold<|endoftext|>y"), RULE)
    (prompt, *_) = prompts()
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
