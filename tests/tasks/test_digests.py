"""Digests in the place of contexts: what the LLM is given, what is learnt in both stages, and what it takes."""

import functools

import pytest
import torch
from helpers import quiet_trainer, refused
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lrsa_lit.attention import Greedy, LRSAConfig, shares, using
from lrsa_lit.data.collate import ExampleSize, collate, collate_packed, collate_training
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.objectives import AnswerLoss, LanguageModelLoss
from lrsa_lit.ops.sparse_attention import MeanPool
from lrsa_lit.systems import SnapKV
from lrsa_lit.tasks import Digests, LongContextQA, SampledTopK

END = 2
COUNT, CHUNK = 3, 8


def example(before, context, after, answer, name="a"):
    """Random tokens; of all prompts' tokens those of the context are digested."""
    ids = torch.randint(3, 259, (before + context + after + answer,), generator=torch.Generator().manual_seed(context))
    empty = {"gold_spans": [], "answer_spans": [], "answers": ["x"], "match": "any"}
    length = before + context + after
    return {"id": name, "input_ids": ids.tolist(), "prompt_length": length, "context_length": before + context,
            "context_span": (before, before + context), **empty}  # fmt: skip


EXAMPLES = [example(2, 19, 5, 4, "a"), example(3, 0, 6, 2, "b"), example(1, 5, 4, 3, "c"), example(2, 8, 3, 2, "d")]
"""Three chunks, none, one that is short, and a whole one."""


def digests(stage="answer", **changes):
    return Digests(**{"stage": stage, "count": COUNT, "chunk": CHUNK, "layers": 2, "init": "normal"} | changes)


def task(stage="answer", *, rate=1e-2, options=(), **changes):
    torch.manual_seed(0)
    made = LongContextQA(Backbone("tiny", **dict(options)), digests=digests(stage, **changes),
                         optimizer=functools.partial(torch.optim.AdamW, lr=rate, weight_decay=0.0),
                         generate_answers=stage == "answer", max_new_tokens=12)  # fmt: skip
    with torch.no_grad():
        for weight in (made.digests.ae, made.digests.ft):
            weight.normal_(generator=torch.Generator().manual_seed(5))
    return made


def trained(made, batches, **options):
    for batch in batches:
        batch["step_sizes"] = [each for other in batches for each in other["sizes"]]
    steps = {"max_steps": 1, "accumulate_grad_batches": len(batches), "gradient_clip_val": 0.0} | options
    quiet_trainer(**steps).fit(made, DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]))
    return made


def given(made, model, each, stage, start=0):
    """Embeddings and labels of one example, written out, by the reader alone."""
    embed, ids = model.get_input_embeddings(), torch.tensor(each["input_ids"])
    first, last = each["context_span"]
    context = ids[first:last]
    if stage == "repeat":
        context = context[start : start + CHUNK]
    parts = []
    for one, other in made.digests.system.spans(len(context)):
        parts.append(made.digests.reader(embed(context[one:other])[None], torch.tensor([other - one]))[0])
    if stage == "repeat":
        wanted = torch.cat([context, torch.tensor([END])])
        inputs = [*parts, made.digests.ae[None], embed(wanted)]
    else:
        wanted = ids[each["prompt_length"] :]
        inputs = [embed(ids[:first]), *parts, made.digests.ft[None], embed(ids[last:])]
    return torch.cat(inputs)[None], wanted


def plain_losses(made, model, stage, start=0):
    """The summed loss and the tokens of each example, by the model of transformers alone."""
    found = []
    for each in EXAMPLES:
        inputs, wanted = given(made, model, each, stage, start)
        logits = model(inputs_embeds=inputs).logits[0, -len(wanted) - 1 : -1]
        found.append((cross_entropy(logits, wanted, reduction="sum"), len(wanted)))
    return found


@pytest.fixture
def exact():
    return Backbone("tiny").build().double().requires_grad_(False)


@pytest.mark.parametrize("stage", ["repeat", "answer"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["kept", "checkpointed"])
def test_losses_and_gradients_are_those_of_inputs_written_out(stage, options, exact):
    made = task(stage, options=options)
    made.configure_model()
    batch = collate(EXAMPLES, END)
    model, read = made.digests.read(made.model, batch)
    loss = made.summed_losses(read, 0, model)[0]
    weights = {name: weight for name, weight in made.named_parameters() if weight.requires_grad}
    slopes = torch.autograd.grad(loss, list(weights.values()))
    assert read["sizes"] == [made.digests.size_of(size)._replace(context=None) for size in batch["sizes"]]
    assert read["step_sizes"] == read["sizes"]

    made.double()
    found = plain_losses(made, exact, stage)
    total = sum(each for each, _ in found)
    torch.testing.assert_close(loss.detach().double(), total.detach(), rtol=1e-5, atol=0)
    assert [count for _, count in found] == [size.answer for size in read["sizes"]]
    exact_slopes = torch.autograd.grad(total, [dict(made.named_parameters())[name] for name in weights])
    for name, slope, wanted in zip(weights, slopes, exact_slopes, strict=True):
        assert (slope.double() - wanted).norm() <= 1e-4 * wanted.norm() + 1e-8, name


def test_contexts_in_chunks_make_the_rows_that_the_model_is_given(exact):
    made = task()
    made.configure_model()
    batch = collate(EXAMPLES, END)
    model, read = made.digests.read(made.model, batch)
    rows = model.embedded(read["input_ids"])
    prompts = model.embedded(read["prompt_ids"])
    for row, each in enumerate(EXAMPLES):
        wanted, answer = given(made, made.model, each, "answer")
        length, prompt = wanted.shape[1], wanted.shape[1] - len(answer)
        assert read["attention_mask"][row].sum() == length == read["sizes"][row].tokens
        assert read["prompt_length"][row] == read["prompt_mask"][row].sum() == prompt
        torch.testing.assert_close(rows[row, :length], wanted[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(prompts[row, -prompt:], wanted[0, :prompt], rtol=0, atol=1e-5)
        assert read["labels"][row][read["labels"][row] != -100].tolist() == answer.tolist()
    predicting = (read["labels"][:, 1:] != -100).any(dim=0).nonzero()[:, 0]
    assert read["label_columns"].equal(predicting)


def test_windows_of_long_contexts_are_drawn_anew_in_each_step():
    made = task("repeat")
    made.configure_model()
    batch, seen = collate_training([example(2, 60, 1, 1)], END), set()
    context = batch["input_ids"][0, 2:62].tolist()
    for step in range(120):
        _, read = made.digests.read(made.model, batch, seed=3, step=step)
        assert made.digests.read(made.model, batch, seed=3, step=step)[1]["labels"].equal(read["labels"])
        *window, last = read["labels"][0][read["labels"][0] != -100].tolist()
        (start,) = (at for at in range(60 - CHUNK + 1) if context[at : at + CHUNK] == window)
        assert last == END
        seen.add(start)
    assert {0, 60 - CHUNK} <= seen
    assert len(seen) > 20
    _, first = made.digests.read(made.model, batch)
    assert first["input_ids"][0, COUNT + 1 : -1].tolist() == context[:CHUNK]


def test_without_digests_the_window_alone_is_repeated(exact):
    made = task("repeat")
    made.configure_model()
    batch = collate(EXAMPLES[:1], END)
    losses, tokens = made.losses(batch, None)
    window = torch.tensor([[*EXAMPLES[0]["input_ids"][2 : 2 + CHUNK], END]])
    logits = exact(window).logits[0, :-1]
    assert tokens.tolist() == [CHUNK]
    torch.testing.assert_close(losses[0], cross_entropy(logits, window[0, 1:], reduction="sum"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", ["repeat", "answer"])
def test_a_step_is_a_mean_over_all_tokens_however_it_is_cut(stage, precision):
    found = []
    for batches in ([collate(EXAMPLES, END)], [collate(EXAMPLES[:1], END), collate(EXAMPLES[1:], END)]):
        made = task(stage)
        made.make_optimizer = functools.partial(torch.optim.SGD, lr=1.0)
        before = {name: weight.detach().clone() for name, weight in made.digests.named_parameters()}
        trained(made, batches, precision=precision)
        found.append({name: weight.detach() - before[name] for name, weight in made.digests.named_parameters()})
    error = 1e-4 if precision == "32-true" else 0.1
    for name, step in found[0].items():
        assert (step - found[1][name]).norm() <= error * step.norm(), name
    assert [name for name, step in found[0].items() if not step.any()] == [{"repeat": "ft", "answer": "ae"}[stage]]


TEXTS = [example(0, 24, 0, 0, "one"), example(0, 17, 0, 0, "two")]


def test_two_texts_that_were_overfitted_are_repeated():
    made, steps = task("repeat", count=16, chunk=24), 150
    made.make_scheduler = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=5e-3, total_steps=steps)
    trained(made, [collate(TEXTS, END)] * 2, max_steps=steps, accumulate_grad_batches=1)
    model, read = made.digests.read(made.model, collate(TEXTS, END))
    assert repeated(made, model, read) == [each["input_ids"] for each in TEXTS]
    # The digests of the other text say nothing of this one.
    model.vectors = torch.cat([model.vectors[:2], model.vectors[2:].roll(16, dims=0)])
    of_other = repeated(made, model, read)
    assert all(found != each["input_ids"] for found, each in zip(of_other, TEXTS, strict=True))


def repeated(made, model, read):
    """Token ids of greedy answers."""
    with using(made.model, made.lrsa):
        answering = Greedy(model, {END}, max_new_tokens=30)
        return answering(read["prompt_ids"], read["prompt_mask"])


def test_answers_are_those_of_inputs_written_out():
    made = task()
    made.configure_model()
    batch = collate(EXAMPLES, END)
    texts, lengths = made.generate(batch, made.lrsa)
    for each, text, length in zip(EXAMPLES, texts, lengths, strict=True):
        inputs, answer = given(made, made.model, each, "answer")
        inputs, ids = inputs[:, : inputs.shape[1] - len(answer)], []
        while len(ids) < made.max_new_tokens:
            following = made.model(inputs_embeds=inputs).logits[0, -1].argmax()
            if int(following) in made.tokenizer.all_special_ids:
                break
            ids.append(int(following))
            inputs = torch.cat([inputs, made.model.get_input_embeddings()(following)[None, None]], dim=1)
        assert (made.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids)) == (text, length)


def test_an_evaluation_measures_bytes_of_the_tokens_that_there_were():
    made = task()
    made.attentions["dense"] = None
    made.configure_model()
    batch = collate(EXAMPLES, END)
    made.generate(batch, made.lrsa)
    rows = made._answering(made.lrsa).usage.rows
    pair = 2 * 2 * 16 * 4  # key and value, heads, channels, bytes
    for row, each in zip(rows, EXAMPLES, strict=True):
        start, end = each["context_span"]
        spans = [stop - first for first, stop in made.digests.system.spans(end - start)]
        stays = each["prompt_length"] - (end - start) + 1 + COUNT * len(spans)
        assert (row.held, row.peak, row.read, row.stored) == (*[2 * stays * pair] * 3, 2 * stays)
        assert (row.dense, row.tokens) == (2 * each["prompt_length"] * pair, 2 * each["prompt_length"])
        read = 2 * sum(COUNT * length + COUNT * (COUNT + 1) // 2 for length in spans)  # in two layers of the reader
        assert row.pairs == stays * (stays + 1) + read
        assert row.dense_pairs == each["prompt_length"] * (each["prompt_length"] + 1)
    made.generate(batch, None)
    dense = shares([made._answering(made._dense).usage])
    assert (dense["cache"], dense["pairs"], dense["kept"]) == (1.0, 1.0, 1.0)


def test_other_attentions_see_the_whole_prompt():
    made, plain = task(), LongContextQA(Backbone("tiny"), max_new_tokens=12)
    batch = collate(EXAMPLES, END)
    for each in (made, plain):
        each.configure_model()
    rule = LRSAConfig(sink_size=2, lag_size=4, top_k=2)
    for attention in (None, rule):
        assert made.losses(batch, attention)[0].equal(plain.losses(batch, attention)[0])
        assert made.generate(batch, attention) == plain.generate(batch, attention)
    assert not made.losses(batch, made.lrsa)[0].equal(plain.losses(batch, None)[0])


@pytest.mark.parametrize("stage", ["repeat", "answer"])
def test_without_any_context_each_weight_has_a_gradient_all_the_same(stage):
    made = task(stage)
    made.configure_model()
    model, read = made.digests.read(made.model, collate(EXAMPLES[1:2], END))
    assert (read["input_ids"] < 0).sum() == 1  # AE or FT
    made.summed_losses(read, 0, model).sum().backward()
    for name, weight in made.digests.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad
        assert weight.grad is None or weight.grad.any() == (name in ("ae", "ft"))


def saved(made, path):
    made.configure_model()
    checkpoint = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return checkpoint


def test_a_checkpoint_holds_digests_alone_and_begins_the_second_stage(tmp_path):
    first = task("repeat")
    checkpoint = saved(first, tmp_path / "first.ckpt")
    assert {name.partition(".")[0] for name in checkpoint["state_dict"]} == {"digests"}
    assert {"digests.ae", "digests.ft", "digests.reader.initial"} < checkpoint["state_dict"].keys()
    torch.manual_seed(1)
    second = LongContextQA(Backbone("tiny"), digests=digests(), start_from=str(tmp_path / "first.ckpt"))
    second.configure_model()
    for name, weight in first.digests.named_parameters():
        assert second.digests.get_parameter(name).equal(weight)
    assert not any(weight.requires_grad for weight in second.model.parameters())
    assert [name for name, weight in second.digests.named_parameters() if not weight.requires_grad] == ["ae"]
    with refused("model", reason="holds digests and no weights"):
        load_trained(tmp_path / "first.ckpt")


def test_digests_of_another_model_or_shape_are_refused(tmp_path):
    checkpoint = saved(task("repeat"), tmp_path / "first.ckpt")
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    Backbone("tiny").tokenizer.save_pretrained(tmp_path / "other")
    other = LongContextQA(Backbone(str(tmp_path / "other")), digests=digests(), start_from=str(tmp_path / "first.ckpt"))
    with refused("start_from", reason="trained for another base model, 'tiny'"):
        other.start()
    other.trainer = quiet_trainer()
    with refused("ckpt_path", reason="trained for another base model, 'tiny'"):
        other.on_load_checkpoint(checkpoint)
    for changes in ({"count": 4}, {"layers": 1}):
        made = LongContextQA(Backbone("tiny"), digests=digests(**changes), start_from=str(tmp_path / "first.ckpt"))
        with refused("start_from", reason="whose shape does not fit"):
            made.start()
    plain = LongContextQA(Backbone("tiny"))
    saved(plain, tmp_path / "weights.ckpt")
    made = LongContextQA(Backbone("tiny"), digests=digests(), start_from=str(tmp_path / "weights.ckpt"))
    with refused("start_from", reason="holds no digests"):
        made.start()
    made.start_from = str(tmp_path / "nowhere.ckpt")
    with refused("start_from", reason="does not exist"):
        made.start()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"objective": LanguageModelLoss()}, "objective"),
        ({"train_attention": {"top_k": 3}}, "train_attention"),
        ({"train_top_k": SampledTopK([4, 8])}, "train_top_k"),
        ({"backbone": Backbone("tiny", lora=LoRA(rank=2))}, "backbone.lora"),
        ({"lrsa": LRSAConfig(dense_layers=(0,))}, "lrsa.dense_layers"),
        ({"lrsa": LRSAConfig(head_top_k=[3, 4])}, "lrsa.head_top_k"),
        ({"lrsa": LRSAConfig(system=SnapKV(kept=0.5))}, "lrsa.system"),
        ({"lrsa": LRSAConfig(compressor=MeanPool())}, "lrsa.compressor"),
        ({"lrsa": LRSAConfig(latents=True)}, "lrsa.latents"),
        ({"digests": digests("repeat"), "generate_answers": True}, "generate_answers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_else_would_be_trained_or_evaluated_is_refused(options, field):
    with refused(field, reason="with digests"):
        LongContextQA(**{"backbone": Backbone("tiny"), "digests": digests()} | options)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"count": 0}, "count"), ({"count": 9}, "count"), ({"chunk": 0}, "chunk"), ({"layers": 0}, "layers"),
     ({"stage": "both"}, "stage"), ({"init": "ones"}, "init")],
)  # fmt: skip
def test_sizes_out_of_bounds_are_refused(changes, field):
    with refused(field):
        digests(**changes)


def test_examples_that_cannot_be_digested_are_refused():
    made = task(count=8)
    made.configure_model()
    with refused("packing", reason="with digests"):
        made.digests.read(made.model, collate_packed(EXAMPLES))
    untold = {name: value for name, value in EXAMPLES[0].items() if name != "context_span"}
    with refused("data", reason="nothing to digest"):
        made.digests.read(made.model, collate([untold], END))
    with refused("data", reason="use the stage repeat for texts"):
        made.digests.read(made.model, collate([EXAMPLES[0] | {"prompt_length": 5}], END))
    long = ExampleSize(8184, 0, context=8184)
    made.digests.check_size(long, 7)
    with refused("backbone", reason="has 8192 positions, but an example of 8184 tokens needs 8193"):
        made.digests.check_size(long, 8)


def test_what_digests_make_is_no_system_of_its_own():
    system = task().lrsa.system
    for options in ({"lrsa": LRSAConfig(system=system)}, {"evaluate": {"x": {"system": system}}}):
        with refused("lrsa.system" if "lrsa" in options else "evaluate.x.system", reason="is created by digests"):
            LongContextQA(Backbone("tiny"), **options)
    assert (system.held(20), system.attended_pairs(20)) == (9, 45)
    assert (system.held(0), system.attended_pairs(0)) == (0, 0)


def test_each_answer_may_count_the_same():
    made = LongContextQA(Backbone("tiny"), digests=digests(), objective=AnswerLoss(per="answer"))
    made.configure_model()
    batch = collate(EXAMPLES, END)
    model, read = made.digests.read(made.model, batch)
    losses, tokens = made.losses(batch, made.lrsa)
    found = made.summed_losses(read, 0, model)[0].detach().double()
    torch.testing.assert_close(found, (losses / tokens).sum(), rtol=1e-5, atol=0)
    assert sum(map(made.objective.count, read["step_sizes"])) == len(EXAMPLES)
