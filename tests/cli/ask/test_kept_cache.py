"""``lrsa ask --cache``: a text is read once; a file that is not of this model, rule and text is refused."""

import json
import re

import pytest
from ask_helpers import ASK, FIRST, FLAGS, NEW, RULE, SECOND, counts, saved
from cli_helpers import refusal

import lrsa_lit.cli.ask.reader

CACHE = ["--cache", "text.lrsa", "--json"]


@pytest.fixture
def counted(monkeypatch):
    """The number of tokens of each call of the model, a list."""
    fed, feed = [], lrsa_lit.cli.ask.reader.Reader._feed
    monkeypatch.setattr(
        lrsa_lit.cli.ask.reader.Reader,
        "_feed",
        lambda self, ids, *rest: (fed.append(len(ids)), feed(self, ids, *rest))[1],
    )
    return fed


def answers(shown):
    return [{name: line[name] for name in ("answer", "tokens_seen", "tokens_kept")} for line in map(json.loads, shown)]


def test_a_kept_text_is_not_read_again(ask, counted):
    fresh = answers(ask(*FLAGS, "--json", "text.txt", FIRST, SECOND).out.splitlines())
    text = counted[0]
    assert answers(ask(*FLAGS, *CACHE, "text.txt", FIRST, SECOND).out.splitlines()) == fresh
    assert counted.count(text) == 2
    for given in (["text.txt"], []):
        assert answers(ask(*FLAGS, *CACHE, *given, FIRST, SECOND).out.splitlines()) == fresh
    assert counted.count(text) == 2, "the text was read again"


def test_the_last_line_tells_restored_tokens_from_tokens_read(ask, counted):
    kept = ["--cache", "text.lrsa", "text.txt", FIRST, SECOND]
    fresh = counts(ask(*FLAGS, *kept).out)
    text = counted[0]
    counted.clear()
    shown = ask(*FLAGS, *kept).out
    restored = re.findall(r"^([\d,]+) tokens restored, ([\d,]+) read, ", shown, flags=re.MULTILINE)
    pairs = [tuple(int(number.replace(",", "")) for number in line) for line in restored]
    assert pairs == [(text, seen - text) for seen, _, _ in fresh]
    assert json.loads(ask(*FLAGS, *CACHE, "text.txt", FIRST).out)["tokens_restored"] == text


def mistakes(folder):
    given = [*CACHE, FIRST]
    yield "rule", [*ASK, "--top-k", "9", *FLAGS[:2], *FLAGS[4:], *given], ["--cache", "text.lrsa", "'top_k': 8"]
    model = ["--model", saved(folder / "other", RULE, hidden_size=32)]
    yield "model", ["ask", *model, "--max-new-tokens", str(NEW), *given], ["--cache", "another model"]
    yield "text", [*ASK, *FLAGS, *CACHE, "other.txt", FIRST], ["--cache", "another text"]
    yield "mistyped file", [*ASK, *FLAGS, *CACHE, "txt.txt", FIRST], ["FILE", "txt.txt"]
    yield "dense", [*ASK, *given, "--dense"], ["--cache", "--dense"]
    yield "altered", [*ASK, *FLAGS, "--cache", "altered.lrsa", FIRST], ["--cache", "altered.lrsa"]
    yield "no cache", [*ASK, *FLAGS, "--cache", "other.txt", FIRST], ["--cache", "other.txt"]
    yield "no file yet", [*ASK, *FLAGS, "--cache", "none.lrsa"], ["FILE", "required"]
    yield "folder", [*ASK, *FLAGS, "--cache", ".", "text.txt", FIRST], ["--cache"]


def test_what_is_not_of_this_model_rule_and_text_is_refused(ask, tmp_path, capfd):
    ask(*FLAGS, *CACHE, "text.txt", FIRST)
    (tmp_path / "other.txt").write_text("Another text.")
    content = bytearray((tmp_path / "text.lrsa").read_bytes())
    content[-3] ^= 1
    (tmp_path / "altered.lrsa").write_bytes(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, arguments, told in mistakes(tmp_path):
        line = refusal(capfd, *arguments)
        assert all(word in line for word in told), (name, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "other"])
