import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import BARE, LENGTHS, Words, built, ids
from helpers import refused
from lightning import LightningModule, Trainer
from torch import Tensor

import lrsa_lit.data
from lrsa_lit.data.module import QADataModule, Split
from lrsa_lit.data.prompts import TooLong
from lrsa_lit.data.records import QARecord
from lrsa_lit.models.tiny import tiny_tokenizer


def test_every_record_becomes_an_example_in_order(tokenizer):
    data = built(tokenizer=tokenizer, eval_batch_size=2)
    assert ids(data.val_dataloader()) == ["val0", "val10", "val20"]
    assert ids(data.test_dataloader()) == ids(data.predict_dataloader()) == [f"test{n}" for n in LENGTHS["test"]]
    assert sorted(ids(data.train_dataloader())) == sorted(f"train{n}" for n in LENGTHS["train"])
    assert [len(batch["id"]) for batch in data.val_dataloader()] == [2, 1]


def test_the_seed_of_the_run_decides_the_order_of_training(tokenizer):
    loaders = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loaders.append(built(tokenizer=tokenizer).train_dataloader())
    first, second, other = loaders
    epochs = [ids(first), ids(first)]
    assert epochs == [ids(second), ids(second)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != ids(other)


def test_what_does_not_fit_is_left_out_and_said(tokenizer, caplog):
    with caplog.at_level(logging.INFO, "lrsa_lit.data"):
        data = built(tokenizer=tokenizer, max_tokens=BARE + 20)
    assert data.report["train"] == {"kept": 3, "too_long": 7, "shortest_too_long": BARE + 30}
    assert data.report["val"] == {"kept": 3}
    assert f"Words train (at most {BARE + 20} tokens): kept 3, shortest_too_long {BARE + 30}, too_long 7" in caplog.text
    assert ids(data.test_dataloader()) == ["test0", "test10", "test20"]


def test_the_report_is_there_when_the_cache_is_used(tokenizer):
    first = built(tokenizer=tokenizer, max_tokens=BARE + 20)
    second = built(tokenizer=tokenizer, max_tokens=BARE + 20)
    assert second.asked == []
    assert second.report == first.report


def test_a_build_counts_from_zero(tokenizer):
    data = Words(tokenizer=tokenizer)
    data.exclude("train", TooLong(5), records=3)
    data.prepare_data()
    assert data.report["train"] == {"kept": 10}


def test_a_limit_stops_reading(tokenizer):
    data = built(tokenizer=tokenizer, limit={"train": 2})
    assert data.report["train"]["kept"] == 2
    assert [name for name in data.asked if name.startswith("train")] == ["train0", "train10"]
    assert data.report["val"]["kept"] == 3


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 1000}, {"seed": 1}, {"limit": {"val": 2}}, {"word": "y"}, {"tokenizer": "other"}],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_examples_decides_the_fingerprint(change):
    other = tiny_tokenizer()
    other.chat_template += "\n"
    same = Words(tokenizer=tiny_tokenizer(), batch_size=4, eval_batch_size=2, num_workers=1)
    if "tokenizer" in change:
        change = {"tokenizer": other}
    assert Words(tokenizer=tiny_tokenizer()).fingerprint == same.fingerprint
    assert Words(**{"tokenizer": tiny_tokenizer(), **change}).fingerprint != same.fingerprint


def test_sources_and_class_decide_the_fingerprint(tokenizer):
    class Others(Words):
        def sources(self) -> dict[str, str]:
            return {"sha256": self.word}

    class Namesake(Words):
        pass

    plain = Words(tokenizer=tokenizer).fingerprint
    assert plain.startswith("Words-")
    assert len({plain, Others(tokenizer=tokenizer).fingerprint, Namesake(tokenizer=tokenizer).fingerprint}) == 3


RIDDLES = """
from lrsa_lit.data.module import QADataModule
from lrsa_lit.data.records import Passage, QARecord

class Riddles(QADataModule):
    def records(self, split):
        yield QARecord(split, (Passage("T", TEXT),), "Q?", ("a",))

class More(Riddles):
    pass

TEXT = "one"
"""


def defined(path: Path, text: str) -> Any:
    """The module of a file, as a process that starts now would have it."""
    path.write_text(RIDDLES.replace("one", text))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def texts(data: QADataModule) -> list[str]:
    data.prepare_data()
    return [data.tokenizer.decode(example["input_ids"]) for example in data.open_split("train")]


def test_an_edited_data_set_is_tokenised_again(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("Riddles", "More"):
        first = getattr(defined(tmp_path / "riddles.py", "one"), name)(tokenizer=tokenizer)
        assert "one" in texts(first)[0]
        second = getattr(defined(tmp_path / "riddles.py", "two"), name)(tokenizer=tokenizer)
        assert "two" in texts(second)[0]
        again = getattr(defined(tmp_path / "riddles.py", "one"), name)(tokenizer=tokenizer)
        assert again.fingerprint == first.fingerprint
    del sys.modules["riddles"]


def test_what_counts_is_the_code_that_runs_not_the_file_as_it_is_by_now(tmp_path, tokenizer):
    module = defined(tmp_path / "riddles.py", "one")
    before = module.Riddles(tokenizer=tokenizer).fingerprint
    (tmp_path / "riddles.py").write_text("")
    assert module.Riddles(tokenizer=tokenizer).fingerprint == before
    del sys.modules["riddles"]


def test_a_class_of_no_file_is_never_taken_for_another(tokenizer, caplog):
    for text in ("one", "two"):
        names: dict[str, Any] = {"__name__": "notebook"}
        exec(RIDDLES.replace("one", text), names)
        data = names["Riddles"](tokenizer=tokenizer)
        assert data.fingerprint == names["Riddles"](tokenizer=tokenizer).fingerprint
        assert text in texts(data)[0]
    assert "Riddles is not defined in a file" in caplog.text


def test_a_process_imports_what_is_asked_for_and_keeps_no_examples_of_a_class_of_no_file(cache):
    """In one process, as it takes seconds to import it all."""
    code = (
        "import sys, lrsa_lit.data as d; assert not {'torch', 'datasets', 'lightning'} & set(sys.modules);"
        "assert d.HotpotQA.__name__ == 'HotpotQA' and 'lightning' in sys.modules;"
        "assert not [m for m in sys.modules if m.startswith(('lrsa_lit.models', 'lrsa_lit.tasks'))]\n"
        f"{RIDDLES}"
        "from lrsa_lit.models.tiny import tiny_tokenizer\n"
        "data = Riddles(tokenizer=tiny_tokenizer()); data.prepare_data(); print(data.folder('train').is_dir())"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "True\n"
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_damaged_cache_is_made_again(tokenizer, caplog):
    whole = texts(Words(tokenizer=tokenizer))
    path = Words(tokenizer=tokenizer).folder("train") / "examples.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)
    assert texts(Words(tokenizer=tokenizer)) == whole
    assert [record.message for record in caplog.records if "damaged" in record.message]


def test_a_parameter_that_is_not_stored_is_noticed(tokenizer):
    class Forgetful(QADataModule):
        def __init__(self, colour: str = "red", **kwargs: Any) -> None:
            super().__init__(**kwargs)

    with pytest.raises(AttributeError, match="colour"):
        _ = Forgetful(tokenizer=tokenizer).fingerprint


@pytest.mark.parametrize(
    ("parameters", "field", "value"),
    [
        ({"max_tokens": True}, "max_tokens", True),
        ({"max_tokens": 0}, "max_tokens", 0),
        ({"batch_size": 0}, "batch_size", 0),
        ({"eval_batch_size": -1}, "eval_batch_size", -1),
        ({"num_workers": -1}, "num_workers", -1),
        ({"limit": {"dev": 3}}, "limit", "dev"),
        ({"limit": {"val": 0}}, "limit.val", 0),
    ],
)
def test_a_bad_parameter_is_refused_at_once(parameters, field, value):
    with refused(field, value):
        Words(**parameters)


def test_a_split_that_nothing_fits_says_what_would(tokenizer, cache):
    class Long(Words):
        def records(self, split: Split) -> Iterable[QARecord]:
            return list(super().records(split))[1:]

    data = Long(tokenizer=tokenizer, max_tokens=BARE)
    with refused("max_tokens", BARE, f"{BARE + 10} or more", reason="'train'"):
        data.prepare_data()
    assert not list(cache.rglob("*.arrow"))


def test_a_split_without_records_is_refused(tokenizer):
    class Nothing(QADataModule):
        def records(self, split: Split) -> Iterable[QARecord]:
            return []

    with refused("Nothing", reason="'train'"):
        Nothing(tokenizer=tokenizer).prepare_data()


def test_an_unusable_tokenizer_is_refused():
    with refused("tokenizer"):
        Words().prepare_data()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with refused("tokenizer", reason="chat_template"):
        Words(tokenizer=tokenizer).prepare_data()


def test_an_unwritable_cache_is_the_users_to_mend(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "file"))
    with refused("LRSA_CACHE_DIR", reason="file/data/Words-"):
        Words(tokenizer=tokenizer).prepare_data()


def test_a_loader_before_setup_is_a_mistake_of_the_caller(tokenizer):
    with pytest.raises(RuntimeError, match="val split is not open"):
        Words(tokenizer=tokenizer).val_dataloader()


class Recorder(LightningModule):
    """Keeps the ids it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def test_step(self, batch: dict[str, Any]) -> None:
        assert isinstance(batch["input_ids"], Tensor)
        self.seen += batch["id"]


def test_a_trainer_builds_only_what_its_stage_needs(tokenizer, cache):
    data, model = Words(tokenizer=tokenizer, num_workers=1), Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", **quiet).test(model, data, verbose=False)
    assert model.seen == [f"test{n}" for n in LENGTHS["test"]]
    assert [path.name for path in (cache / "data" / data.fingerprint).iterdir()] == ["test"]


def test_every_export_is_there_and_others_are_not():
    assert all(issubclass(getattr(lrsa_lit.data, name), QADataModule) for name in lrsa_lit.data.__all__)
    with pytest.raises(AttributeError, match="Nope"):
        _ = lrsa_lit.data.Nope
