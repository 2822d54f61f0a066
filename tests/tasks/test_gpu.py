"""The training step on a GPU: ``make test-gpu``."""

import itertools

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import masking_utils

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.attention.decoding import decoder
from lrsa_lit.data.collate import ExampleSize, TrainBatch, collate
from lrsa_lit.models import Backbone, head
from lrsa_lit.tasks import Digests, LongContextQA, question_answering

pytestmark = pytest.mark.gpu

RULE = LRSAConfig(sink_size=16, lag_size=64, top_k=16)


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with torch.device("cuda"):
        yield


def batch(boundaries):
    """One row of 1,000 tokens, as the trainer hands it over: tensors on the device, integers on the host."""
    ids = torch.randint(3, 259, (1, 1000))
    labels = torch.full_like(ids, -100)
    lengths = [1000] if boundaries is None else [stop - start for start, stop in itertools.pairwise(boundaries)]
    sizes = [ExampleSize(length, 40) for length in lengths]
    columns = torch.cat([torch.arange(end - 41, end - 1) for end in itertools.accumulate(lengths)])
    labels[:, columns + 1] = ids[:, columns + 1]
    positions = None
    if boundaries is not None:
        pieces = [torch.arange(stop - start) for start, stop in itertools.pairwise(boundaries)]
        positions = torch.cat(pieces)[None]
    return TrainBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        label_columns=columns,
        position_ids=positions,
        boundaries=boundaries,
        id=["0"] if boundaries is None else ["0", "1"],
        sizes=sizes,
        step_sizes=sizes,
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("boundaries", [None, [0, 400, 1000]], ids=["one", "packed"])
def test_a_step_never_waits_for_the_device(boundaries, compiled, checkpointing):
    options = {"compile_layers": compiled, "gradient_checkpointing": checkpointing}
    task = LongContextQA(Backbone("tiny", dtype="bfloat16", **options), RULE)
    task.configure_model()
    task.cuda()
    rows = batch(boundaries)
    never_waits(lambda: task.summed_losses(rows, 0))


def never_waits(step):
    for _ in range(2):
        step().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def asked(context, answer):
    ids = torch.randint(3, 259, (context + 40 + answer,), device="cpu").tolist()
    empty = {"gold_spans": [], "answer_spans": [], "answers": ["x"], "match": "any"}
    return {"id": str(context), "input_ids": ids, "prompt_length": context + 40, "context_span": (20, 20 + context),
            **empty}  # fmt: skip


def digesting(stage, dtype):
    task = LongContextQA(Backbone("tiny", dtype=dtype), digests=Digests(stage, 8, 32, init="normal"),
                         generate_answers=stage == "answer", max_new_tokens=60)  # fmt: skip
    task.configure_model()
    return task.cuda(), move_data_to_device(collate([asked(300, 5), asked(70, 9), asked(0, 2)], 2), "cuda")


@pytest.mark.parametrize("stage", ["repeat", "answer"])
def test_a_step_with_digests_never_waits_for_the_device(stage, monkeypatch):
    # Once in each dense forward, transformers waits to learn whether rows are packed.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    task, rows = digesting(stage, "bfloat16")

    def step():
        model, read = task.digests.read(task.model, rows, step=0)
        return task.summed_losses(read, 0, model)

    never_waits(step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_answers_from_digests_what_launches_do(dtype, monkeypatch):
    task, rows = digesting("answer", dtype)
    monkeypatch.setattr(question_answering, "stop_tokens", lambda tokenizer: [])
    answers = []
    for warm_up in (3, 1000):
        monkeypatch.setattr(decoder, "_WARM_UP", warm_up)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=dtype == "float32"):
            answers.append([task.generate(rows, rule) for rule in (task.lrsa, None)])
        task._greedy.clear()
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_the_fused_loss_is_as_exact_as_float32_logits(monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(head, "ROWS", 0)
    states, weight = torch.randn(300, 128), torch.randn(5000, 128) / 8
    targets = torch.randint(5000, (300,)).index_fill(0, torch.arange(0, 300, 7), -100)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [part.to(torch.bfloat16).to(dtype).requires_grad_() for part in (states, weight)]
        if dtype == torch.bfloat16:
            layer = torch.nn.Linear(128, 5000, bias=False)
            layer.weight = torch.nn.Parameter(leaves[1].detach())
            leaves[1] = layer.weight
            loss = head.Head(layer).cross_entropy(leaves[0], targets)
        else:
            logits = leaves[0] @ leaves[1].T
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        results.append([loss.detach().double(), *(part.double() for part in torch.autograd.grad(loss, leaves))])
    for got, truth in zip(*results, strict=True):
        assert (got - truth).norm() <= 0.02 * truth.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_answers_what_launches_do(dtype, monkeypatch):
    """As an evaluation does: in inference mode, float32 weights under autocast, batch after batch."""
    task = LongContextQA(Backbone("tiny", dtype=dtype), RULE, max_new_tokens=60)
    task.configure_model()
    task.cuda().eval()
    monkeypatch.setattr(question_answering, "stop_tokens", lambda tokenizer: [])
    mask = torch.ones(3, 400, dtype=torch.int64)
    mask[1, :250], mask[2, :30] = 0, 0
    prompts = [{"prompt_ids": torch.randint(3, 259, (3, 400)), "prompt_mask": mask} for _ in range(2)]
    answers = []
    for warm_up in (3, 1000):
        # The same kernels, replayed and launched.
        monkeypatch.setattr(decoder, "_WARM_UP", warm_up)
        for prompt in prompts:
            autocast = torch.autocast("cuda", torch.bfloat16, enabled=dtype == "float32")
            with torch.inference_mode(), autocast:
                answers.append(task.generate(prompt, RULE)[:2])
        task._greedy.clear()
    assert answers[:2] == answers[2:]
    assert all(length == 60 for _, lengths in answers for length in lengths)
