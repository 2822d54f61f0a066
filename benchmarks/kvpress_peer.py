"""What kvpress keeps of prompts, and what a model says behind them, in an environment of its own.

Run by ``kvpress_agreement.py`` as ``python kvpress_peer.py JOB OUT``; imports nothing of this project. JOB is a JSON
file: the model's folder, its dtype, the tokens of a text, the number of tokens behind each prompt, and cases (name,
press or null, length of the prompt). OUT is an .npz: ``NAME/kept`` (layers, H, T) bool says which positions stay,
``NAME/scores`` (layers, H, T) what tokens were worth, ``NAME/logits`` (answer, V) are those of the tokens behind the
prompt, fed one at a time.
"""

from __future__ import annotations

import contextlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


def main(job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"], attn_implementation="sdpa").eval()
    dense = {tokens: _dense_keys(model, job["ids"][:tokens]) for tokens in {case["tokens"] for case in job["cases"]}}
    arrays: dict[str, Any] = {"versions": [f"{name} {version(name)}" for name in ("kvpress", "transformers", "torch")]}
    for case in job["cases"]:
        found = _run(model, job["ids"], job["answer"], case, dense[case["tokens"]])
        arrays |= {f"{case['name']}/{name}": array for name, array in found.items()}
        print(case["name"], flush=True)
    np.savez(out, **arrays)


def _press(spec: dict[str, Any]) -> Any:
    """Made of its class and arguments, presses within presses too."""
    arguments = {name: _press(value) if isinstance(value, dict) else value for name, value in spec["init"].items()}
    return getattr(kvpress, spec["class"])(**arguments)


@torch.no_grad()
def _dense_keys(model: Any, ids: list[int]) -> list[Tensor]:
    cache = DynamicCache()
    model.model(torch.tensor([ids]), past_key_values=cache)
    return [layer.keys[0] for layer in cache.layers]


def _note_scores(press: Any, noted: list[Any]) -> None:
    """Have the press that scores, which may be within another, leave a copy of each layer's scores."""
    if isinstance(press, kvpress.KVzipPress):
        cut = press.compress_post

        def noting_all(model: Any) -> None:
            cut(model)
            noted.extend(press.score_val[:, 0].double().numpy())

        press.compress_post = noting_all
        return
    scorer = getattr(press, "press", press)
    score = scorer.score

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        scores: Tensor = score(*args, **kwargs)
        noted.append(scores[0].double().numpy().copy())
        return scores

    scorer.score = noting


@torch.no_grad()
def _run(model: Any, ids: list[int], answer: int, case: dict[str, Any], dense: list[Tensor]) -> dict[str, Any]:
    tokens, cache, scores = case["tokens"], DynamicCache(), []
    cutting = contextlib.nullcontext()
    if case["press"] is not None:
        press = _press(case["press"])
        _note_scores(press, scores)
        cutting = press(model)
    with cutting:
        model.model(input_ids=torch.tensor([ids[:tokens]]), past_key_values=cache)
    attentions = [layer.self_attn for layer in model.model.layers]
    masked = [getattr(attention, "masked_key_indices", None) for attention in attentions]
    kept = [_kept(*layer) for layer in zip((each.keys[0] for each in cache.layers), dense, masked, strict=True)]
    logits = []
    # One at a time: kvpress hides pairs behind a key that is found anew for each call's queries.
    for place in range(tokens, tokens + answer):
        at = {"position_ids": torch.tensor([[place]]), "past_key_values": cache}
        logits.append(model(torch.tensor([ids[place : place + 1]]), **at).logits[0, -1])
    scored = np.array(scores) if scores else np.zeros((len(kept), *kept[0].shape))
    return {"kept": np.stack(kept), "scores": scored, "logits": torch.stack(logits).numpy()}


def _kept(held: Tensor, dense: Tensor, masked: tuple[Tensor, ...] | None) -> Any:
    """(H, T) bool: which of the dense keys a layer's cache holds, less those that kvpress hides."""
    kept = np.zeros(dense.shape[:2], dtype=bool)
    for head, (some, every) in enumerate(zip(held, dense, strict=True)):
        places = {key.numpy().tobytes(): place for place, key in enumerate(every)}
        kept[head, [places[key.numpy().tobytes()] for key in some]] = True
    if masked is not None:
        kept[masked[1].numpy(), masked[2].numpy()] = False
    return kept


if __name__ == "__main__":
    main(*sys.argv[1:])
