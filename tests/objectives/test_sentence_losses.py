"""CPC's losses, held to recorded numbers, to an oracle in float64 and to finite differences."""

import json
import math

import pytest
import torch
from helpers import VECTORS

from lrsa_lit.objectives.sentence_losses import contrastive_loss, masked, predicting

RECORDED = json.loads((VECTORS / "systems/cpc.json").read_text())


def recorded(dtype):
    parts = RECORDED["contrastive"]
    query, positive, negative = (torch.tensor(parts[name], dtype=dtype) for name in ("query", "positive", "negative"))
    return query, torch.cat([positive, negative])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("scale", "name"), [(20.0, "loss"), (1.0, "loss_scale_1")])
def test_recorded_losses(dtype, tolerance, scale, name):
    assert float(contrastive_loss(*recorded(dtype), scale)) == pytest.approx(
        RECORDED["contrastive"][name], abs=tolerance
    )


def oracle(questions, candidates, scale, others):
    """The mean over questions of log-sum-exp less the positive's score, by loops."""
    total = 0.0
    for i, question in enumerate(questions.tolist()):
        scores = []
        for j, candidate in enumerate(candidates.tolist()):
            if others[i][j]:
                continue
            dot = sum(a * b for a, b in zip(question, candidate, strict=True))
            score = scale * dot / (math.hypot(*question) * math.hypot(*candidate))
            scores.append(score)
        own = scale * sum(a * b for a, b in zip(question, candidates[i].tolist(), strict=True))
        own /= math.hypot(*question) * math.hypot(*candidates[i].tolist())
        total += math.log(sum(math.exp(score - own) for score in scores))
    return total / len(questions)


@pytest.mark.parametrize(("rows", "negatives"), [(1, 0), (1, 2), (3, 1), (5, 2)])
def test_oracle_and_gradients(rows, negatives):
    generator = torch.Generator().manual_seed(rows)
    questions = torch.randn(rows, 7, dtype=torch.float64, generator=generator)
    candidates = torch.randn(rows * (1 + negatives), 7, dtype=torch.float64, generator=generator, requires_grad=True)
    others = torch.rand(rows, len(candidates), generator=generator) < 0.3
    others[range(rows), range(rows)] = False
    loss = contrastive_loss(questions, candidates, 20.0, others)
    assert loss.item() == pytest.approx(oracle(questions, candidates.detach(), 20.0, others.tolist()), abs=1e-12)
    assert torch.autograd.gradcheck(lambda given: contrastive_loss(questions, given, 20.0, others), candidates)


def test_what_supports_a_question_too_is_no_negative_of_it():
    questions, candidates = recorded(torch.float64)
    others = torch.zeros(3, 9, dtype=torch.bool)
    others[0, 4] = True
    candidates.requires_grad_()
    others_of_all = torch.ones(3, 9, dtype=torch.bool).fill_diagonal_(fill_value=False)
    contrastive_loss(questions[:1], candidates, 20.0, others[:1]).backward()
    assert candidates.grad[4].abs().max() == 0
    assert candidates.grad[3].abs().max() > 0
    assert float(contrastive_loss(questions, candidates, 20.0, others_of_all)) == 0


def test_loss_of_low_precision_is_computed_in_float32():
    questions, candidates = recorded(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(questions, candidates)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(contrastive_loss(questions.double(), candidates.double())), abs=1e-5)


def test_recorded_labels_and_where_they_are_predicted():
    ids = torch.tensor([RECORDED["mntp"]["ids"]])
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[0, RECORDED["mntp"]["masked_positions"]] = True
    labels = ids.masked_fill(~hidden, -100)
    assert labels[0].tolist() == RECORDED["mntp"]["labels"]
    where, wanted = predicting(labels)
    assert where[0].nonzero()[:, 0].tolist() == RECORDED["mntp"]["predicted_from_positions"]
    assert wanted.tolist() == [6, 8]


def test_a_first_token_is_predicted_from_nowhere():
    where, wanted = predicting(torch.tensor([[5, -100, 7], [-100, -100, -100]]))
    assert where.tolist() == [[False, True, False], [False, False, False]]
    assert wanted.tolist() == [7]


def test_masked_contexts():
    ids = torch.arange(10, 4010).reshape(2, 2000)
    mask = torch.ones_like(ids)
    mask[1, 500:] = 0
    read, labels = masked(ids, mask, mask_id=3, share=0.8)
    hidden = read == 3
    assert torch.equal(labels, torch.where(hidden, ids, -100))
    assert torch.equal(read[~hidden], ids[~hidden])
    assert not hidden[mask == 0].any()
    assert abs(float(hidden[mask == 1].double().mean()) - 0.8) < 0.03


def test_masks_are_drawn_from_the_runs_random_numbers():
    ids = torch.arange(100).reshape(1, 100)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(masked(ids, torch.ones_like(ids), 0)[1])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
