"""Training and evaluation of CPC's encoder, held to computations of their own."""

import random

import pytest
import torch
from sentence_questions import written
from torch.nn.functional import cosine_similarity, cross_entropy

from lrsa_lit import UserError
from lrsa_lit.data.sentence_facts import Facts, draw, supports_too
from lrsa_lit.data.supporting_facts import SupportingFacts
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.objectives.sentence_losses import masked
from lrsa_lit.tasks import SentenceRetrieval
from lrsa_lit.tasks.sentence_recall import RecallMeter


@pytest.fixture
def task():
    found = SentenceRetrieval(Backbone("tiny"))
    found.configure_model()
    return found.double()


@pytest.fixture
def batch(task, tmp_path):
    data = SupportingFacts(tokenizer=task.tokenizer, max_tokens=4096, batch_size=3, **written(tmp_path / "q.json", 30))
    return next(iter(data.train_dataloader()))


def mean_state(task, sentences, number):
    """Of one sentence, read in its context without any batch."""
    ids = torch.tensor([[token for sentence in sentences for token in sentence]])
    hidden = task.model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[0]
    start = sum(map(len, sentences[:number]))
    return hidden[start : start + len(sentences[number])].mean(dim=0)


def test_contrastive_loss_of_a_batch(task, batch):
    torch.manual_seed(5)
    found = task.contrastive(batch)
    torch.manual_seed(5)
    rng = random.Random(int(torch.randint(2**62, ())))
    drawn = [draw(facts, 2, rng) for facts in batch["facts"]]
    candidates = [(row, positive) for row, (positive, _) in enumerate(drawn)]
    candidates += [(row, each) for row, (_, negatives) in enumerate(drawn) for each in negatives]
    others = supports_too(batch["facts"], candidates)
    vectors = [mean_state(task, batch["facts"][row].sentences, number) for row, number in candidates]
    losses = []
    for row, facts in enumerate(batch["facts"]):
        question = mean_state(task, [facts.question], 0)
        scores = [20 * cosine_similarity(question, each, dim=0) for each in vectors]
        allowed = [score for score, other in zip(scores, others[row], strict=True) if not other]
        losses.append(torch.stack(allowed).logsumexp(0) - scores[row])
    assert len(vectors) == 9
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-10, rtol=0)


def test_loss_of_masked_tokens(task, batch):
    torch.manual_seed(5)
    found = task.masked_tokens(batch)
    torch.manual_seed(5)
    read, labels = masked(batch["input_ids"], batch["mask"], task.tokenizer.encode("_")[0])
    logits = task.model(input_ids=read, attention_mask=batch["mask"], use_cache=False).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_questions_give_no_gradient(task, batch):
    task.contrastive(batch).backward()
    asked = {token for facts in batch["facts"] for token in facts.question}
    read = {token for facts in batch["facts"] for sentence in facts.sentences for token in sentence}
    weights = task.model.get_input_embeddings().weight
    assert asked - read
    assert weights.grad[list(asked - read)].eq(0).all()
    assert weights.grad[list(read)].ne(0).any(dim=1).all()


def test_adapters_alone_are_trained(tmp_path):
    task = SentenceRetrieval(Backbone("tiny", lora=LoRA(rank=2)))
    task.configure_model()
    data = SupportingFacts(tokenizer=task.tokenizer, max_tokens=4096, **written(tmp_path / "q.json"))
    batch = next(iter(data.train_dataloader()))
    (task.contrastive(batch) + task.masked_tokens(batch)).backward()
    trained = {name for name, each in task.named_parameters() if each.grad is not None and each.grad.abs().max() > 0}
    assert trained
    assert all("lora_B" in name for name in trained)
    assert all("lora" in name for name, each in task.named_parameters() if each.requires_grad)


def test_similarities(task, batch):
    task.eval()
    for facts, found in zip(batch["facts"], task.similarities(batch), strict=True):
        question = mean_state(task, [facts.question], 0)
        expected = [
            cosine_similarity(question, mean_state(task, facts.sentences, number), dim=0) for number in range(12)
        ]
        assert found[:12] == pytest.approx([float(each.detach()) for each in expected], abs=1e-10)


def test_recalls():
    # Titles of 2 tokens: of 4 * 10 + 2 * 2 tokens a budget of 30 % is 13, one sentence with its title.
    facts = Facts(
        "q", [1], [[1]] * 4, [("T", str(n)) for n in range(4)], [0, 0, 1, 1], [10] * 4, [2, 2], [0, 3], [0, 3, 1, 2]
    )
    meter = RecallMeter([0.3, 0.6], "strict")
    line = meter.update(facts, [0.1, 0.2, 0.3, 0.9])
    assert line["tokens"] == 44
    assert line["encoder"] == {"30": 1, "60": 1}
    assert line["bm25"] == {"30": 0, "60": 1}
    found = meter.recalls([dict(meter.sums), {"questions": 1, "supporting": 2, "/30": 2, "/60": 2}])
    assert (found["count"], found["recall_30"], found["recall_60"], found["recall"]) == (2, 0.75, 0.75, 0.75)
    assert (found["bm25/recall_30"], found["bm25/recall_60"]) == (0, 0.25)


def test_recalls_over_bm25():
    kept = [(2, 1), (1, 1), (2, 0), (2, 1), (1, 0), (2, 2)]
    lines = [{"supporting": 2, "encoder": {"30": own}, "bm25": {"30": other}} for own, other in kept]
    found = RecallMeter([0.3], "strict").over_bm25(lines)["30"]
    assert found.difference.value == pytest.approx((0.5 + 0 + 1 + 0.5 + 0.5 + 0) / 6)
    assert 0 < found.difference.low < found.difference.value < found.difference.high
    assert 0 < found.p_value < 0.3


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("negatives", -1), ("scale", -1.0), ("masked_share", 1.0), ("budgets", [0.0]), ("budgets", [])],
)
def test_arguments_out_of_range(name, value):
    with pytest.raises(UserError, match=name):
        SentenceRetrieval(Backbone("tiny"), **{name: value})


def test_a_mask_of_several_tokens():
    with pytest.raises(UserError, match="a text of one token of tiny; it has 3"):
        _ = SentenceRetrieval(Backbone("tiny"), mask="___").mask_id
