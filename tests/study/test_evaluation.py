"""Greedy answers in the memory of the prompt before: the same as with a cache of their own."""

import pytest
import torch

from lrsa_lit.attention import LRSACache, enable
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import (
    LRSAConfig,
    MeanPool,
    RandomTokens,
    Recency,
    Strided,
    ValueRelative,
)
from lrsa_lit.study.evaluation import Greedy, dense_rule, survival

RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3)
LENGTHS = (30, 61, 18, 75, 44)


def prompts() -> list:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 259, (1, length), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize(
    "change",
    [{}, {"chunk_size": 20}, {"top_k": 0}, {"dense_layers": (1,)}, {"compressor": MeanPool()},
     *({"compressor": made} for made in (RandomTokens(3), Recency(), Strided(), ValueRelative())), None],
    ids=["rule", "chunk", "none", "layer", "mean", "random", "recent", "strided", "values", "dense"],
)  # fmt: skip
def test_answers_are_those_of_generate_in_one_memory(change):
    model = tiny_model().eval()
    enable(model, dense_rule(model) if change is None else RULE.replace(**change))
    greedy = Greedy(model, 20, max(LENGTHS))
    prepared, prepare = [], greedy.decoder._prepare
    greedy.decoder._prepare = lambda *given: (prepared.append(1), prepare(*given))[1]
    for prompt in prompts():
        options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 2, "pad_token_id": 2}
        mask = torch.ones_like(prompt)
        whole = model.generate(prompt, attention_mask=mask, past_key_values=LRSACache.of(model), **options)
        answer = whole[0, prompt.shape[1] :].tolist()
        assert greedy(prompt, 2) == (answer[: answer.index(2)] if 2 in answer else answer)
    assert len(prepared) == 1, "a graph would have been captured once"


def test_an_answer_ends_before_the_end_of_message():
    model = enable(tiny_model().eval(), RULE)
    (prompt, *_) = prompts()
    answer = Greedy(model, 12, prompt.shape[1])(prompt, -1)
    assert len(answer) == 12
    stop = answer[5]
    assert Greedy(model, 12, prompt.shape[1])(prompt, stop) == answer[: answer.index(stop)]
    assert len(Greedy(model, 1, prompt.shape[1])(prompt, -1)) == 1


def test_survival_is_of_what_selects(data):
    from lrsa_lit.models.tiny import tiny_tokenizer
    from lrsa_lit.study import tokens

    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    examples = tokens.read(tokens.path_of(data, "plain", "test")).examples
    everything = survival(model, tokenizer, examples, RULE.replace(top_k=8))
    # The answers do not stand in these texts.
    assert everything == {"gold": 1.0, "answer": None, "chance": 1.0}
    some = survival(model, tokenizer, examples, RULE)
    assert 0 < some["gold"] < 1
    assert survival(model, tokenizer, examples, RULE.replace(top_k=0))["gold"] == 0
    for rule in (None, dense_rule(model), RULE.replace(compressor=MeanPool())):
        assert survival(model, tokenizer, examples, rule) is None
