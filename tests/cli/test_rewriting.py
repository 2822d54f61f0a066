"""``lrsa preference-pairs``, a fit on its pairs, ``lrsa summarise``, and a test with the summaries, on a tiny model."""

import json
import shlex
import signal

import pytest
from cli_helpers import NO_LOGGER, WHOLE, interruptible, refusal

from lrsa_lit.cli.main import main
from lrsa_lit.data.growing_file import GrowingFile

QUICK = [*WHOLE, "--data.init_args.eval_batch_size", "8", "--max-new-tokens", "6"]
PAIRS = ["preference-pairs", "--judge", "tiny", "--to", "pairs", "--pairs", "4", *QUICK]
SUMMARISE = ["summarise", "--writer", "tiny", "--to", "s.jsonl", "--splits", "val", *QUICK]


def said(captured, *arguments):
    """What a command says in the end, by the words before the colon."""
    captured.readouterr()
    main([*arguments])
    return dict(line.split(": ", 1) for line in captured.readouterr().out.splitlines() if ": " in line)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_command_ends_with_the_next_one(tmp_path, capfd):
    found = said(capfd, *PAIRS)
    assert not [*tmp_path.glob("runs/**/*")], "no run"
    train, held = lines(tmp_path / "pairs/train.jsonl"), lines(tmp_path / "pairs/val.jsonl")
    assert len(train) + len(held) == 4
    assert not {row["passage"] for row in train} & {row["passage"] for row in held}
    assert found["Pairs"].startswith("4; chosen: ")
    fit = shlex.split(found["Train a summariser"])
    steps = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1"]
    found = said(capfd, *fit[1:], *steps, *NO_LOGGER)
    summarise = shlex.split(found["Summarise passages with it"])
    assert summarise[-2:] == ["--config", "configs/data/hotpotqa.yaml"]
    found = said(capfd, *summarise[1:-2], *QUICK, "--splits", "test")
    summaries = lines(tmp_path / "summaries.jsonl")
    assert len({row["passage"] for row in summaries}) == len(summaries) > 10
    use = shlex.split(found["Use them"])
    assert use[-2:] == ["--ckpt_path", "CHECKPOINT"]
    main([*use[1:-2], *NO_LOGGER])
    (report,) = tmp_path.glob("cache/data/QAFiles-*/test/report.json")
    counts = json.loads(report.read_text())
    assert counts["passages"] > 10
    assert counts["passages without a summary"] == 0
    assert counts["context tokens left"] < counts["context tokens"]


class Killed(BaseException):
    """Ends a process in whatever it does."""


def killed_after(monkeypatch, count, path):
    """The next command is killed in the middle of a line, after so many whole ones."""
    add, left = GrowingFile.add, [count]

    def adding(self, line):
        if not left[0]:
            with path.open("ab") as file:
                file.write(json.dumps(line).encode()[:20])
            raise Killed
        left[0] -= 1
        add(self, line)

    monkeypatch.setattr(GrowingFile, "add", adding)


@pytest.mark.parametrize(("command", "name"), [(SUMMARISE, "s.jsonl"), (PAIRS, "pairs/candidates.jsonl")])
def test_a_command_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch, capfd, command, name):
    main(command)
    path = tmp_path / name
    whole = path.read_bytes()
    path.unlink()
    killed_after(monkeypatch, 2, path)
    with pytest.raises(Killed):
        main(command)
    assert path.read_bytes().count(b"\n") == 2
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    added = []
    monkeypatch.setattr(GrowingFile, "add", recorded(added))
    main(command)
    assert path.read_bytes() == whole
    assert len(added) == whole.count(b"\n") - 2
    # Nothing is left to do.
    main(command)
    assert len(added) == whole.count(b"\n") - 2


def recorded(added, add=GrowingFile.add):
    def adding(self, line):
        added.append(line)
        add(self, line)

    return adding


def test_ctrl_c_says_that_the_command_goes_on(monkeypatch, capfd):
    monkeypatch.setattr(GrowingFile, "add", lambda *_: signal.raise_signal(signal.SIGINT))
    with interruptible(), pytest.raises(SystemExit) as stop:
        main(SUMMARISE)
    assert stop.value.code == 130
    assert "lrsa: s.jsonl keeps finished work; run the same command to continue" in capfd.readouterr().err


def test_summaries_of_another_model_are_refused(tmp_path, capfd):
    (tmp_path / "s.jsonl").write_text(json.dumps({"passage": "a", "by": "b", "summary": "c"}) + "\n")
    line = refusal(capfd, *SUMMARISE)
    assert line.startswith("s.jsonl, line 1: by: is another model, or other settings; use a separate file")
    assert (tmp_path / "s.jsonl").read_text().count("\n") == 1


BARE = '{"id": "1", "passages": [{"title": "T", "text": "It rains."}], "question": "Q?", "answers": ["a"]}\n'
MISTAKES = [
    (["preference-pairs", "--to", "p", *QUICK], "--judge: is required"),
    (["preference-pairs", "--judge", "tiny", *QUICK], "--to: is required"),
    ([*PAIRS, "--judge", "./no"], "--judge: './no' is not a folder"),
    ([*PAIRS, "--pairs", "1"], "--pairs: '1' is not allowed"),
    ([*PAIRS, "--estimate"], "--estimate: it is not allowed for preference-pairs"),
    ([*PAIRS, "--jugde", "x"], "jugde: no such setting; the nearest are judge"),
    ([*PAIRS, "--data.init_args.train", "bare.jsonl"], "--to: none of 1 questions has supporting_titles"),
    (["summarise", "--to", "s", *QUICK], "--writer: is required"),
    (["summarise", "--writer", "tiny", *QUICK], "--to: is required"),
    ([*SUMMARISE, "--to", "."], "--to: . is a folder; it must be a file"),
    ([*SUMMARISE, "--estimate"], "--estimate: it is not allowed for summarise"),
    ([*SUMMARISE, "--splits", "dev"], "--splits: invalid choice: 'dev'"),
    ([*SUMMARISE, "--data.init_args.val", "null"], "--splits: 'val' is not allowed; it must be one of train, test"),
    ([*SUMMARISE, "--splits", "train", "--data.init_args.max_tokens", "330"], "--splits: no question fits into"),
    ([*SUMMARISE, "--data", "ChatFiles", "--data.train", "data/sample-chats.jsonl", "--splits", "train"],
     "data: 'ChatFiles' is not allowed; it must be a data set of questions about passages"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=[told for _, told in MISTAKES])
def test_mistakes_are_one_line(tmp_path, capfd, arguments, told):
    (tmp_path / "bare.jsonl").write_text(BARE)
    assert told in refusal(capfd, *arguments)
