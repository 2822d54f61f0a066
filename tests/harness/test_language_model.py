"""A model under a rule or a system, as lm-evaluation-harness asks it: held to what its own calls give."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import make_table  # noqa: E402

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, enable, end_prompt  # noqa: E402
from lrsa_lit.errors import UserError  # noqa: E402
from lrsa_lit.harness.language_model import RuledLM  # noqa: E402
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer  # noqa: E402

TASKS = ["local_choice", "local_text", "local_answer"]
RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=2)
RULES = {
    "rule": RULE,
    "chunks": RULE.replace(chunk_size=3),
    "dense layer": RULE.replace(dense_layers=(0,)),
    "drawn": RULE.replace(compressor="RandomTokens"),
    "means": RULE.replace(compressor="MeanPool"),
    "heads": RULE.replace(head_top_k=[[8, 2], [0, 4]]),
    "FreqKV": LRSAConfig(system={"class_path": "FreqKV", "init_args": {"capacity": 24, "sink_size": 2}}),
}
SYSTEMS = {
    name: LRSAConfig(system={"class_path": name, "init_args": arguments})
    for name, arguments in {
        "SnapKV": {"kept": 0.3, "window": 4, "question": True},
        "StreamingLLM": {"kept": 0.3, "question": True},
        "KVzip": {"kept": 0.3, "question": True},
        "SqueezedAttention": {"observed": 8, "clusters": 0.5, "question": True},
        "Cascade": {"window": 8, "caches": 2, "sink_size": 2, "stride": 4},
    }.items()
}
PAIRS = [
    ("Ada has a red kite in Oslo. Bo has two keys in Lima. Cy has a drum in Rome. What does Bo have?", " two keys"),
    ("Dee has a cat in Quito. What does Dee have?", " a drum in Rome"),
    ("Eli has an old map in Oslo. Fay has a cat in Rome. What does Fay have?", " a"),
    ("Who is in Oslo?", " Ada has a red kite in Oslo."),
]


def asked(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


def language_model(rule=None, **options):
    model = tiny_model(seed=3).eval()
    return RuledLM(model if rule is None else enable(model, rule), tiny_tokenizer(), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that the harness loads by itself, and a place where the tasks find their file."""
    place = tmp_path_factory.mktemp("harness")
    tiny_model(seed=3).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    shutil.copytree(Path(__file__).parent / "tasks", place / "tasks")
    return place


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat template"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_dense_scores_are_those_of_the_harness_to_the_last_digit(batch_size, chat, folder, monkeypatch):
    monkeypatch.chdir(folder)
    # It takes seconds to list what is installed.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    manager = TaskManager(include_path="tasks", include_defaults=False)
    options = {
        "tasks": TASKS, "task_manager": manager, "batch_size": batch_size, "num_fewshot": 1, "limit": 6,
        "bootstrap_iters": 100, "apply_chat_template": chat,
    }  # fmt: skip
    theirs = lm_eval.simple_evaluate(model="hf", model_args={"pretrained": "model"}, device="cpu", **options)
    ours = lm_eval.simple_evaluate(language_model(batch_size=batch_size), **options)
    assert make_table(ours) == make_table(theirs)
    for task in TASKS:
        given, expected = ([each["resps"] for each in found["samples"][task]] for found in (ours, theirs))
        assert given == expected


def token_by_token(model, context, continuation=None):
    """Yields scores (V,) of each next token behind a prompt in a cache; the likeliest go on where nothing else does."""
    cache = LRSACache.of(model)
    prompt = torch.tensor([context])
    logits = model(prompt, use_cache=True, **cache_argument(model, cache)).logits
    end_prompt(model, cache, prompt, encode=lambda text: tiny_tokenizer().encode(text, add_special_tokens=False))
    for index in itertools.count():
        scores = logits[0, -1].log_softmax(-1)
        yield scores
        token = scores.argmax().item() if continuation is None else continuation[index]
        logits = model(torch.tensor([[token]]), use_cache=True, **cache_argument(model, cache)).logits


def continued(model, context, continuation):
    """Log-likelihood of a continuation, and whether it is the likeliest tokens."""
    scores = list(itertools.islice(token_by_token(model, context, continuation), len(continuation)))
    total = sum(each[token].item() for each, token in zip(scores, continuation, strict=True))
    return total, all(each.argmax() == token for each, token in zip(scores, continuation, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", [*RULES, *SYSTEMS])
@torch.no_grad()
def test_likelihoods_are_those_of_a_cache_token_by_token(name, batch_size):
    asking = language_model({**RULES, **SYSTEMS}[name], batch_size=batch_size)
    found = asking.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    dense = language_model().loglikelihood(asked(*PAIRS), disable_tqdm=True)
    for (context, continuation), (total, likeliest) in zip(PAIRS, found, strict=True):
        tokens = (asking.tok_encode(text) for text in (context, continuation))
        expected = continued(asking.model, *tokens)
        assert total == pytest.approx(expected[0], abs=2e-4)
        assert likeliest == expected[1]
    assert abs(found[0][0] - dense[0][0]) > 1e-3, "the attention must matter for this text"


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_the_likeliest_continuation_of_a_system_is_said_to_be_it(name):
    asking = language_model(SYSTEMS[name])
    context = asking.tok_encode(PAIRS[0][0])
    best = [scores.argmax().item() for scores in itertools.islice(token_by_token(asking.model, context), 4)]
    found = asking._behind_prompts([(context, best), (context, [*best[:-1], best[-1] ^ 1]), (context, best[:1])])
    assert [likeliest for _, likeliest in found] == [True, False, True]


@pytest.mark.parametrize("name", RULES)
def test_perplexity_is_the_sum_over_a_cache(name):
    asking = language_model(RULES[name], batch_size=2)
    texts = [context for context, _ in PAIRS]
    found = asking.loglikelihood_rolling(asked(*((text,) for text in texts)), disable_tqdm=True)
    for text, total in zip(texts, found, strict=True):
        with torch.no_grad():
            expected, _ = continued(asking.model, [asking.prefix_token_id], asking.tok_encode(text))
        assert total == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", [*RULES, *(name for name in SYSTEMS if name != "KVzip")])
def test_texts_are_those_of_each_prompt_alone(name, batch_size):
    asking = language_model({**RULES, **SYSTEMS}[name], batch_size=batch_size)
    options = {"until": ["\n"], "max_gen_toks": 10}
    found = asking.generate_until(asked(*((context, options) for context, _ in PAIRS)), disable_tqdm=True)
    for (context, _), text in zip(PAIRS, found, strict=True):
        ids = torch.tensor([asking.tok_encode(context)])
        cache = LRSACache.of(asking.model)
        given = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 2}
        with torch.no_grad():
            alone = asking.model.generate(ids, **given, **cache_argument(asking.model, cache))[0, ids.shape[1] :]
        assert text == tiny_tokenizer().decode(alone, skip_special_tokens=True).split("\n")[0]
        assert max(cache.stored_tokens()) < ids.shape[1] + 10 or ids.shape[1] < 30


def test_texts_come_from_a_compressed_cache(monkeypatch):
    seen = []
    original = LRSACache.of
    monkeypatch.setattr(LRSACache, "of", lambda *given: seen.append(original(*given)) or seen[-1])
    language_model(RULE).generate_until(asked((PAIRS[0][0], {"max_gen_toks": 4})), disable_tqdm=True)
    (cache,) = seen
    assert max(cache.stored_tokens()) < cache.get_seq_length() / 2


def test_long_requests_lose_their_beginnings_as_in_the_harness():
    whole, short = language_model(SYSTEMS["SnapKV"], max_length=30), language_model(RULE, max_length=30)
    context, continuation = (whole.tok_encode(text) for text in PAIRS[0])
    kept = (context + continuation)[-31:]
    given, wanted = whole._fitting(context, continuation)
    assert [*given.tolist(), *wanted.tolist()] == kept
    for asking in (whole, short):
        (found,) = asking.loglikelihood(asked(PAIRS[0]), disable_tqdm=True)
        with torch.no_grad():
            expected, _ = continued(asking.model, kept[: -len(continuation)], continuation)
        assert found[0] == pytest.approx(expected, abs=2e-4)
    with pytest.raises(UserError, match="max_length"):
        whole._fitting(context[:3], continuation * 5)


def test_the_harness_finds_the_batch_size():
    asking, alone = language_model(RULE, batch_size="auto", max_length=160), language_model(RULE, max_length=160)
    for ask, given in (
        ("loglikelihood", PAIRS),
        ("generate_until", [(text, {"max_gen_toks": 4}) for text, _ in PAIRS]),
    ):
        found, expected = (getattr(each, ask)(asked(*given), disable_tqdm=True) for each in (asking, alone))
        if ask == "loglikelihood":
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-5)
        else:
            assert found == expected
    texts = [(text,) for text, _ in PAIRS]
    sums = asking.loglikelihood_rolling(asked(*texts), disable_tqdm=True)
    assert sums == pytest.approx(alone.loglikelihood_rolling(asked(*texts), disable_tqdm=True), abs=1e-3)


def test_a_length_without_room_for_prompts_is_named():
    with pytest.raises(UserError, match="max_length: 12 leaves no room"):
        language_model(RULE, max_length=12).generate_until(asked((PAIRS[0][0], {"max_gen_toks": 12})))


def test_systems_that_cannot_be_asked_so_are_named():
    unseen = LRSAConfig(system={"class_path": "SnapKV", "init_args": {"kept": 0.3}})
    with pytest.raises(UserError, match=r"SnapKV cuts after the context.*question: true"):
        language_model(unseen)
    with pytest.raises(UserError, match="batch_size: 'auto'"):
        language_model(SYSTEMS["SnapKV"], batch_size="auto")
    with pytest.raises(UserError, match="SnapKV answers after a prompt"):
        language_model(SYSTEMS["SnapKV"]).loglikelihood_rolling(asked(("text",)), disable_tqdm=True)
    with pytest.raises(UserError, match="KVzip reads prompts twice"):
        language_model(SYSTEMS["KVzip"]).generate_until(asked((PAIRS[0][0], {})), disable_tqdm=True)
