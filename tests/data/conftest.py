import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.models.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token is a byte."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def record() -> QARecord:
    return QARecord(
        id="r1",
        passages=(
            Passage("Isk", "The Isk is 212 kilometres long."),
            Passage("Café Grün", "Le café naît à Tesmar: TESMAR, not Tesmarville."),
            Passage("", "Nobody lives in Tesmar."),
        ),
        question="Where is the café?",
        answers=("Tesmar", "in Tesmar"),
        supporting_titles=("Café Grün",),
    )


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Twelve records that need different numbers of tokens."""
    lines = []
    for number in range(12):
        passages = [{"title": f"Town {number}", "text": f"Town {number} has {number} wells. " + "Rain fell. " * number}]
        lines.append(
            {
                "id": f"r{number}",
                "passages": passages,
                "question": f"How many wells has Town {number}?",
                "answers": [str(number)],
                "supporting_titles": [f"Town {number}"],
            }
        )
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path
