"""The task alone, on a tiny model and batches made by hand."""

import pytest
import torch
from helpers import refused
from scripted import scripted_model

from lrsa_lit.attention import LRSACache, LRSAConfig, enabled_config, using
from lrsa_lit.data.collate import collate
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.generation import before_stop, stop_tokens
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.systems import AdaKV, Cascade, KVzip, SnapKV, StreamingLLM
from lrsa_lit.tasks import LongContextQA, question_answering

RULE = LRSAConfig(sink_size=4, lag_size=16, top_k=4)


def task(**options):
    made = LongContextQA(Backbone("tiny"), RULE, **options)
    made.configure_model()
    return made


def batch(*lengths, answer=5):
    torch.manual_seed(0)
    examples = [
        {
            "id": f"q{length}",
            "input_ids": torch.randint(3, 259, (length + answer,)).tolist(),
            "prompt_length": length,
            "gold_spans": [],
            "answer_spans": [],
            "answers": ["an answer"],
            "match": "any",
        }
        for length in lengths
    ]
    return collate(examples, pad_token_id=2)


def test_loss_is_the_answers_cross_entropy():
    made, rows = task(), batch(150, 90)
    (loss,) = made.summed_losses(rows, 0)
    logits = made.model(rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss / 10, expected)


def test_training_attention_stands_and_evaluation_restores_it():
    made = task(train_attention={"top_k": 8}, evaluate={"dense": None, "k2": {"top_k": 2}})
    assert enabled_config(made.model) == RULE.replace(top_k=8)
    made.validation_step(batch(100), 0)
    assert enabled_config(made.model) == RULE.replace(top_k=8)
    losses = {meter.means([meter.sums])["loss"] for meter in made.meters.values()}
    assert len(losses) == 3


def test_dense_training_leaves_the_models_own_attention():
    made = task(train_attention=None)
    assert enabled_config(made.model) is None


def test_batched_answers_equal_single_ones():
    made = task(max_new_tokens=12)
    made.eval()
    for rule in (RULE, None):
        together, _ = made.generate(batch(150, 40, 90), rule)
        rows = batch(150, 40, 90)
        for row, length in enumerate((150, 40, 90)):
            one = {
                "prompt_ids": rows["prompt_ids"][row : row + 1, -length:],
                "prompt_mask": rows["prompt_mask"][row : row + 1, -length:],
            }
            assert made.generate(one, rule)[0] == [together[row]]


@pytest.mark.parametrize("rule", [RULE, None], ids=["rule", "dense"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["all-weights", "adapters"])
def test_answers_are_those_of_generate(lora, rule):
    made = LongContextQA(Backbone("tiny", lora=lora), RULE, max_new_tokens=30)
    made.configure_model()
    made.model.eval()
    for rows in (batch(150, 40, 90), batch(60, 60, 60), batch(150, 40, 90)):
        cache = None if rule is None else LRSACache(rule, 2)
        with using(made.model, rule):
            whole = made.model.generate(input_ids=rows["prompt_ids"], attention_mask=rows["prompt_mask"],
                                        past_key_values=cache, max_new_tokens=30, do_sample=False,
                                        eos_token_id=stop_tokens(made.tokenizer), pad_token_id=2)  # fmt: skip
        answers = [
            before_stop(row, stop_tokens(made.tokenizer)) for row in whole[:, rows["prompt_ids"].shape[1] :].tolist()
        ]
        texts = [text.strip() for text in made.tokenizer.batch_decode(answers, skip_special_tokens=True)]
        assert made.generate(rows, rule)[:2] == (texts, list(map(len, answers)))


@pytest.mark.parametrize("rule", [RULE, None], ids=["rule", "dense"])
def test_an_answer_ends_at_its_first_special_token(rule):
    made = task(max_new_tokens=12)
    made.model = scripted_model("?Paris<|im_start|>junk", "!Metz<|im_end|>by", "#Gold<|endoftext|>y")
    rows = batch(60, 90, 75)
    rows["prompt_ids"][:, -1] = torch.tensor(tiny_tokenizer()("?!#")["input_ids"])
    texts, lengths = made.generate(rows, rule)
    assert texts == ["Paris", "Metz", "Gold"]
    assert lengths == [5, 4, 4]


def test_conversations_are_cut_behind_their_first_turn():
    made = task(max_new_tokens=4)
    made.model.double()
    rule, rows = RULE.replace(system=StreamingLLM(0.5)), batch(60, 40)
    rows["first_turn"] = [30, 40]
    made.generate(rows, rule)
    # In two layers: half of the first turn, and all that came later.
    assert [row.stored for row in made._answering(rule).usage.rows] == [2 * (15 + 30), 2 * 20]
    (found, _), _ = made.losses(rows, rule)
    ids = rows["input_ids"][:1, :65]
    with using(made.model, rule), torch.no_grad():
        cache = LRSACache.of(made.model)
        made.model(ids[:, :30], past_key_values=cache)
        cache.end_prompt()
        logits = made.model(ids[:, 30:], past_key_values=cache).logits[0, -6:-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 60:], reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("question", [False, True])
def test_a_context_is_cut_before_its_question_unless_that_is_to_be_seen(question):
    made = task(max_new_tokens=4)
    rule, rows = RULE.replace(system=StreamingLLM(0.5, question=question)), batch(60, 40)
    rows["context_length"] = [30, 40]
    made.generate(rows, rule)
    assert made._answering(rule).usage.rows[0].stored == 2 * (30 if question else 15 + 30)
    (found, _), _ = made.losses(rows, rule)
    rows["context_length"] = [60, 40]
    (behind_question, _), _ = made.losses(rows, rule)
    assert torch.equal(found, behind_question) is question


@pytest.mark.parametrize(
    "system",
    [StreamingLLM(0.5), AdaKV(0.5, scorer=SnapKV(window=8)), KVzip(0.5), Cascade(8)],
    ids=lambda it: it.__class__.__name__,
)
def test_losses_behind_the_prompts_that_are_answered_are_those_of_prompts_read_anew(system, monkeypatch):
    rule, rows = RULE.replace(system=system), batch(60, 40, 50)
    made = LongContextQA(Backbone("tiny", dtype="float64"), rule, train_attention=None, max_new_tokens=6)
    made.configure_model()
    rows["context_length"] = [30, 40, 45]
    expected, tokens = made.losses(rows, rule)
    texts, _ = made.generate(rows, rule)
    monkeypatch.delattr(question_answering, "losses_behind_prompts")
    found = made.validation_step(rows, 0)[""]
    assert found.loss == pytest.approx(expected.tolist(), rel=1e-9)
    assert (found.tokens, found.text) == (tokens.tolist(), texts)


def test_what_begins_another_message_does_not_cost_the_answer_its_score():
    made = task(max_new_tokens=12)
    made.model = scripted_model("?Paris<|im_start|>junk")
    rows = batch(60)
    rows["prompt_ids"][:, -1] = tiny_tokenizer()("?")["input_ids"][0]
    rows["answers"] = [["Paris"]]
    (line,) = made.predict_step(rows, 0)
    assert (line["prediction"], line["f1"], line["exact_match"], line["new_tokens"]) == ("Paris", 1, 1, 5)


def test_predictions_state_what_they_were_made_with():
    made = task(max_new_tokens=3)
    (line,) = made.predict_step(batch(60), 0)
    assert line["prompt_tokens"] == 60
    assert 0 <= line["new_tokens"] <= 3
    assert line["config"] == RULE.digest()


def test_evaluation_with_an_unknown_setting():
    with refused("evaluate.x.topk"):
        task(evaluate={"x": {"topk": 3}})


def test_a_row_that_counts_on_another_device_changes_no_score():
    made = task(max_new_tokens=3)
    alone, both = batch(60), batch(60, 90)
    both["repeated"] = [False, True]
    results = []
    for rows in (alone, both):
        meter = made.meters[""]
        meter.reset([])
        made.validation_step(rows, 0)
        found = meter.means([meter.sums])
        results.append((found["loss"], found["count"]))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0][1] == 1


def test_the_parts_of_an_evaluation_have_scores_of_their_own():
    made = task(max_new_tokens=3)
    rows = batch(60, 90, 75)
    rows["groups"] = [["a", "a/x"], ["b", "b/x"], ["a", "a/y"]]
    meter = made.meters[""]
    meter.reset(["a", "b", "a/x", "a/y"])
    made.validation_step(rows, 0)
    found = meter.means([meter.sums])
    counts = {name: value for name, value in found.items() if name.endswith("count")}
    assert counts == {"a/count": 2, "b/count": 1, "a/x/count": 1, "a/y/count": 1, "count": 3}


def test_a_float32_checkpoint_is_evaluated_in_bfloat16_but_for_its_rotary_frequencies():
    trained = task()
    for parameter in trained.model.parameters():
        parameter.data += 1e-3 * torch.randn_like(parameter)
    low = LongContextQA(Backbone("tiny", dtype="bfloat16"), RULE)
    low.configure_model()
    low.load_state_dict(trained.state_dict())
    for name, parameter in low.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.equal(trained.model.get_parameter(name).to(torch.bfloat16))
    frequencies = dict(trained.model.named_buffers())
    assert any("inv_freq" in name for name in frequencies)
    for name, buffer in low.model.named_buffers():
        assert buffer.dtype == torch.float32
        assert buffer.equal(frequencies[name])
