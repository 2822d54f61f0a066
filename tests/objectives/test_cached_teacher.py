"""A teacher whose most likely tokens are on the disk teaches what it would teach when it runs, and nobody else."""

import contextlib
import functools

import lightning
import numpy as np
import pytest
import torch
from data_helpers import Words
from helpers import quiet_trainer, refused
from objective_helpers import RULE, losses

from lrsa_lit.attention import enable
from lrsa_lit.cli.estimate import Layers, _shortened
from lrsa_lit.data.mixture import Mixture
from lrsa_lit.data.policies import Packed
from lrsa_lit.models import Backbone
from lrsa_lit.models.identity import digest_of
from lrsa_lit.models.sources import trained_model
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.objectives import AnswerLoss, Distillation, Sum, teacher_cache
from lrsa_lit.objectives.cached_teacher import CachedPass
from lrsa_lit.tasks import LongContextQA

VOCABULARY = tiny_model().config.vocab_size
MADE = {"padded": {"batch_size": 3}, "packed": {"packing": Packed(400)}, "alone": {}}


def save(folder, seed):
    # Random weights of this size say much the same everywhere.
    model = tiny_model(seed=seed)
    model.lm_head.weight.data *= 20
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    return save(tmp_path / "teacher", 5)


def words(**options):
    return opened(Words(tokenizer=tiny_tokenizer(), max_tokens=1024, **options))


def opened(data):
    data.prepare_data("fit")
    data.setup("fit")
    return data


def distillation(teacher, **options):
    return Distillation(teacher, **{"positions": 40, "top_n": 6, "teacher_dtype": "float32", **options})


def write(objective, data):
    return objective.as_cached().write(data, VOCABULARY, torch.device("cpu"), contextlib.nullcontext)


def cached(teacher, data, **options):
    objective = distillation(teacher, cached=True, **options)
    objective.teacher.open(data.training_fingerprint, VOCABULARY)
    return objective


def assert_taught_alike(one, other, batches):
    """The same losses and gradients up to what float16 holds."""
    model = enable(tiny_model().double(), RULE)
    for batch in batches:
        values, gradients = [], []
        for objective in (one, other):
            (value,) = losses(model, objective, batch)
            values.append(value.item())
            found = torch.autograd.grad(value, list(model.parameters()))
            gradients.append(torch.cat([each.flatten() for each in found]))
        assert values[0] == pytest.approx(values[1], rel=1e-3)
        assert values[0] > 1
        assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[1].norm()


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_it_teaches_what_the_running_teacher_does(teacher, made):
    data = words(**made)
    options = {"temperature": 2.5} if made else {"direction": "reverse"}
    write(distillation(teacher, **options), data)
    assert_taught_alike(cached(teacher, data, **options), distillation(teacher, **options), data.train_dataloader())


def test_all_data_sets_of_a_mixture_are_found(teacher):
    parts = {name: Words(word=name) for name in ("a", "b", "unused")}
    options = {"tokenizer": tiny_tokenizer(), "max_tokens": 1024, "batch_size": 2}
    data = opened(Mixture(parts, {"a": 3, "b": 1, "unused": 0}, **options))
    write(distillation(teacher), data)
    assert_taught_alike(cached(teacher, data), distillation(teacher), data.train_dataloader())
    other = Mixture(parts, {"a": 1, "b": 9, "unused": 0}, **options)
    cached(teacher, other), "shares are no matter"
    with refused("teacher", teacher, reason="other data"):
        cached(teacher, Mixture(parts, {"a": 1, "b": 1, "unused": 1}, **options))


def test_fewer_tokens_than_are_kept_are_enough(teacher, monkeypatch):
    data = words()
    monkeypatch.setattr(teacher_cache, "_dtype_of", lambda _: np.dtype(np.int32))
    write(distillation(teacher, top_n=1000), data)
    for top_n in (1, 6):
        one, other = cached(teacher, data, top_n=top_n), distillation(teacher, top_n=top_n)
        assert_taught_alike(one, other, list(data.train_dataloader())[:1])
    # All tokens, and a rest of nothing.
    assert_taught_alike(cached(teacher, data, top_n=VOCABULARY), distillation(teacher, top_n=None),
                        list(data.train_dataloader())[:1])  # fmt: skip


def test_tokens_of_large_vocabularies_keep_their_numbers():
    numbers = np.array([[65535, 40000, 0], [1, 32768, 32767]])
    logs = torch.tensor([[-1.0, -2.0, -3.0, -4.0]] * 2, dtype=torch.float16)
    for stored in (numbers.astype(np.uint16).view(np.int16), numbers.astype(np.int32)):
        taught = CachedPass(torch.from_numpy(stored), logs, 65536, {})
        found = taught.distributions(None, 1.0, 2)(65536, *taught.rows(torch.tensor([1, 0])))
        assert found.tokens.tolist() == numbers[::-1, :2].tolist()
        torch.testing.assert_close(found.logs.exp().sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_fit_of_accumulated_batches_does_the_same(teacher, made, monkeypatch):
    data = words(**made)
    write(distillation(teacher), data)

    def trained(**options):
        lightning.seed_everything(3, verbose=False)
        objective = Sum([AnswerLoss(), distillation(teacher, **options)])
        task = LongContextQA(Backbone("tiny"), RULE, functools.partial(torch.optim.SGD, lr=0.1), objective=objective)
        task.configure_model()
        before = torch.cat([each.detach().flatten() for each in task.parameters()])
        trainer = quiet_trainer(max_steps=2, accumulate_grad_batches=2, limit_val_batches=0)
        trainer.fit(task, datamodule=Words(tokenizer=tiny_tokenizer(), max_tokens=1024, **made))
        return torch.cat([each.detach().flatten() for each in task.parameters()]) - before

    expected = trained()
    with monkeypatch.context() as patch:
        patch.setattr("lrsa_lit.objectives.teachers.Loaded.run", None)
        found = trained(cached=True)
    assert (found - expected).norm() < 2e-3 * expected.norm()


def test_what_is_not_kept_is_refused(teacher, tmp_path):
    data = words()
    with refused("teacher", teacher, reason="is not cached"):
        cached(teacher, data)
    folder = write(distillation(teacher), data)
    assert folder.parents[1] == data.folder("train").parent, "beside the data"
    with refused("top_n", 7, "at most 6"):
        cached(teacher, data, top_n=7)
    with refused("temperature", 2.0, "1.0"):
        cached(teacher, data, temperature=2.0)
    with refused("teacher", teacher, reason="other data"):
        cached(teacher, words(word="z"))
    with refused("teacher", teacher, reason="another vocabulary size"):
        distillation(teacher, cached=True).teacher.open(data.training_fingerprint, VOCABULARY + 1)
    other = save(tmp_path / "other", 6)
    with refused("teacher", other, reason="not the teacher that is cached"):
        cached(other, data)
    with refused("teacher", teacher, reason="not the teacher that is cached"):
        cached(teacher, data, teacher_dtype="bfloat16")
    save(teacher, 6)
    with refused("teacher", teacher, reason="not the teacher that is cached"):
        cached(teacher, data)


def test_a_damaged_cache_is_refused_and_made_again(teacher):
    data, objective = words(), distillation(teacher)
    folder = write(objective, data)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    logs = folder / "logs.bin"
    logs.write_bytes(logs.read_bytes()[:-4] + b"\0\0\0\0")
    with refused("teacher", folder, reason="damaged"):
        cached(teacher, data)
    assert write(objective, data) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_teacher_that_breaks_off_leaves_nothing(teacher, monkeypatch):
    data, seen = words(), []

    def stops(*arguments):
        seen.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_cache.Distribution, "most_likely", stops)
    with pytest.raises(KeyboardInterrupt):
        write(distillation(teacher), data)
    assert len(seen) == 1
    assert not list((data.folder("train").parent / "teachers").iterdir())


def test_batches_of_other_data_are_refused(teacher):
    data = words()
    write(distillation(teacher), data)
    objective = cached(teacher, data)
    (batch,) = words(word="zz", batch_size=10).train_dataloader()
    with refused("teacher", reason="other data"):
        losses(enable(tiny_model(), RULE), objective, batch)
    with refused("teacher", teacher, reason="has not been opened"):
        losses(enable(tiny_model(), RULE), distillation(teacher, cached=True), batch)


def test_an_estimate_needs_no_cache(teacher):
    (batch,) = words(batch_size=10).train_dataloader()
    task = LongContextQA(Backbone("tiny"), RULE, objective=distillation(teacher, cached=True))
    short = _shortened(task, Layers(dense=1, sparse=1))
    assert all(value.isfinite() for value in losses(enable(tiny_model(), RULE), short.objective, batch))
    with refused("teacher", teacher, reason="has not been opened"):
        losses(enable(tiny_model(), RULE), task.objective, batch)


@pytest.mark.parametrize(
    ("options", "field"), [({"teacher": "self", "top_n": 4}, "teacher"), ({"teacher": "folder"}, "top_n")]
)
def test_what_cannot_be_kept(options, field):
    with refused(field):
        Distillation(cached=True, **options)


def test_a_model_is_known_by_its_files(tmp_path):
    def digest(source, dtype="float32"):
        return digest_of(str(source), trained_model(str(source), dtype))

    one = digest(save(tmp_path / "one", 5))
    assert digest(save(tmp_path / "moved", 5)) == one
    others = {digest(save(tmp_path / "two", 6)), digest(tmp_path / "one", "bfloat16"), digest("tiny")}
    (tmp_path / "moved" / "README.md").write_text("text")
    assert digest(tmp_path / "moved") == one
    (tmp_path / "moved" / "config.json").write_text((tmp_path / "moved/config.json").read_text() + " ")
    assert len(others | {one, digest(tmp_path / "moved")}) == 5
