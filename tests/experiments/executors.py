"""Stand-ins for where jobs run: in this process, or not at all."""

import json
from pathlib import Path

import pytest

from lrsa_lit.cli.main import main
from lrsa_lit.experiments.jobs import Executor, OutOfTimeError

LAYERS = 2
"""Of the tiny model."""


class InProcess(Executor):
    """Runs the commands in this process, where the libraries are loaded."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def start(self, job):
        return self.run(job), object()

    def wait(self, _):
        return [(handle, handle[0]) for handle in self._running]

    def stop(self, *_):
        """Nothing runs any more."""

    def run(self, job):
        arguments = job.command()
        self.ran.append(arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_RUN_CONTEXT", json.dumps(dict(job.tags)))
            for name, value in job.environment.items():
                patch.setenv(name, value)
            try:
                main(arguments)
            except SystemExit as stop:
                if stop.code == 143:
                    raise OutOfTimeError from None
                return stop.code
        return 0


class Fabricated(InProcess):
    """Runs nothing, but writes what the commands would, and ends those of some data set or command with a code."""

    def __init__(self, questions, weights="weights", fails=()):
        super().__init__()
        self.questions, self.weights, self.fails = questions, weights, fails

    def run(self, job):
        arguments = job.command()
        settings = [json.loads(Path(path).read_text()) for path in arguments if path.endswith(".yaml")]
        self.ran.append(arguments[0])
        if arguments[0] in self.fails:
            return 1
        (path,) = (Path(callback["init_args"]["path"]) for layer in settings
                   for callback in layer.get("trainer", {}).get("callbacks", ())
                   if "path" in callback.get("init_args", {}))  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "fit":
            self.train(path)
        else:
            self.evaluate(path, settings)
        return 0

    def train(self, path):
        about = {"losses": [3.0, 2.0], "tokens_per_second": 9.0, "peak_memory_bytes": None, "seconds": 1.0}
        path.write_text(json.dumps(about | {"weights": self.weights, "machine": {"device": "abacus"}}))
        checkpoint = path.with_name("checkpoints") / "last.ckpt"
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()

    def evaluate(self, path, settings):
        from lrsa_lit.attention import LRSAConfig

        model = {name: value for layer in settings for name, value in layer.get("model", {}).items()}
        rules = {"LRSA": model["lrsa"], **model["evaluate"]}
        data_set = "text" if "text.jsonl" in str(settings[2]["data"]) else "plain"
        facts = self.questions.facts(data_set, "test")
        found = {"loss": 2.0}
        if model["generate_answers"]:
            found |= {"prediction": "a0", "f1": 1.0, "exact_match": 1.0, "recall": 1.0}
        line = {"id": "q", "answer_tokens": 2} | dict.fromkeys(rules, found)
        path.write_text("".join(json.dumps(line) + "\n" for _ in range(facts.questions)))
        made = {name: rule and (LRSAConfig.from_dict(rule) if "compressor" in rule else LRSAConfig(**rule))
                for name, rule in rules.items()}  # fmt: skip
        digests = {name: "dense" if rule is None or len(rule.dense_layers) == LAYERS else rule.digest()
                   for name, rule in made.items()}  # fmt: skip
        about = {
            "machine": {"device": "abacus"},
            "layers": LAYERS,
            "max_new_tokens": model["max_new_tokens"],
            "dtype": "float32",
            "seconds": 3.0,
            "survival": {name: {"": None} for name in rules},
            "measured": {name: {"cache": 0.5, "first_token_seconds": 1.0, "token_seconds": 0.1} for name in rules},
            "attentions": {name: {"rule_digest": digest} for name, digest in digests.items()},
            "data_sets": {"": {"set_digest": facts.digest, "questions": facts.questions, "length": facts.length,
                               "contexts": facts.contexts, "kv_share": dict.fromkeys(rules, 0.5)}},
        }  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(about))
