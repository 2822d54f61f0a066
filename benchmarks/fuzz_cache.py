"""Random sequences of calls on compressed caches, with exceptions thrown in: right in float64, or refused; never wrong.

    python benchmarks/fuzz_cache.py [--sequences 300] [--seed 0]

A sequence takes a tiny model of some family, a rule, and a cache for LRSA or stock attention, and draws steps: texts in
pieces, single tokens, rows with pads, rows repeated, selected and reordered, copies, the decoder of CUDA graphs (here
without a graph), ``reset``, and calls that an exception ends in some layer. Each call must return what each row alone
gets in one pass without a cache, over all the columns that the cache counts. After an exception a UserError may refuse
it instead. Prints counts, and exits with 1 if a step was silently wrong, refused without need, or ended by a traceback.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import pickle
import random
import sys
import time
import traceback
from collections import Counter
from typing import Any

import torch
import transformers
from torch import Tensor

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, enable, prefill
from lrsa_lit.attention.cache_layer import LRSACacheLayer
from lrsa_lit.attention.decoding import Decoder
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import (
    Centroids,
    FreqPartition,
    KeyValueStream,
    LagRelative,
    MeanPool,
    QueryAttention,
    QueryRuns,
    RandomTokens,
    Recency,
    TokenGate,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": None},
    # A key-value head for each query head, whatever its config says.
    "GPTNeoX": {"num_key_value_heads": 4},
    "SmolLM3": {"no_rope_layers": [0, 1, 0]},
    "Granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "Olmo2": {},
}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
OTHERS = [RandomTokens(3), Recency(), MeanPool(), FreqPartition()]
NOT_STOCK = [
    QueryAttention(window=2, kernel=3),
    QueryRuns(window=1, size=2, shared_heads=True),
    Centroids(2),
    TokenGate(),
]
TOLERANCE = 1e-5
"""Norms and rotations are float32 inside of transformers, whatever the dtype of the weights."""
THROWN_AT: list[tuple[type, str]] = [
    (LRSACacheLayer, "update"),
    (LRSACacheLayer, "attend"),
    (KeyValueStream, "attend"),
    (KeyValueStream, "extend"),
    (KeyValueStream, "_compress"),
    (LRSACacheLayer, "batch_select_indices"),
]


class Thrown(BaseException):
    """What stands for Ctrl-C: no ``except Exception`` catches it."""


class WrongLogitsError(Exception):
    """Logits that are not those of the pass without a cache, and no refusal."""


class Sequence:
    """One model, one cache, and the tokens that each row of it was fed.

    Args:
        seed: draws everything.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.family = self.random.choice(list(FAMILIES))
        self.stock = self.random.random() < 0.25
        self.rule = _rule(self.random, self.stock)
        torch.manual_seed(seed)
        config = getattr(transformers, f"{self.family}Config")(**SIZES | FAMILIES[self.family])
        if not self.stock:
            self.rule = _with_budgets(random.Random(f"budgets {seed}"), self.rule, config.num_key_value_heads)
        self.model = getattr(transformers, f"{self.family}ForCausalLM")(config).double().eval()
        self.oracle = enable(copy.deepcopy(self.model), self.rule)
        if not self.stock:
            enable(self.model, self.rule)
        self.cache = LRSACache.of(self.model, self.rule)
        self.counts: Counter[str] = Counter()
        self.reset()

    @torch.no_grad()
    def run(self, steps: int) -> Counter[str]:
        """Draw steps, and check each. Raises WrongLogitsError, or whatever a step raises that it must not."""
        for _ in range(steps):
            kinds = [self.piece, self.tokens, self.change_rows, self.duplicate, self.interrupt, self.reset]
            self.counts["steps"] += 1
            self.random.choices(kinds, [6, 6, 3, 1, 3, 1])[0]()
        return self.counts

    def reset(self) -> None:
        """Begin anew, with other rows."""
        self.cache.reset()
        self.rows: list[list[int]] = [[] for _ in range(self.random.randint(1, 3))]
        self.mask = torch.ones(len(self.rows), 0, dtype=torch.long)

    def piece(self) -> None:
        """Several new columns, of which some rows have pads in front or behind."""
        length = self.random.choice([2, 3, 7, 16, 40])
        spans = [(0, length)] * len(self.rows)
        if not self.stock and self.random.random() < 0.4:
            ends = [sorted(self.random.choices(range(length + 1), k=2)) for _ in self.rows]
            spans = [(start, stop) for start, stop in ends]
        self.call(length, spans)

    def tokens(self) -> None:
        """Some single tokens, by the model or by the decoder."""
        decoder = None if self.stock else Decoder(self.model, self.cache)
        for _ in range(self.random.randint(1, 12)):
            if decoder is not None:
                decoder.note_order()
            if decoder is None or self.random.random() < 0.5 or not decoder.ready(rows=len(self.rows)):
                self.call(1, [(0, 1)] * len(self.rows))
            else:
                self.counts["decoded"] += 1
                self.call(1, [(0, 1)] * len(self.rows), decoder)

    def call(self, length: int, spans: list[tuple[int, int]], decoder: Decoder | None = None) -> None:
        """Feed new columns, of which each row's span is real, and check the logits."""
        before = self.cache.get_seq_length()
        ids = torch.tensor([[self.random.randrange(3, 64) for _ in range(length)] for _ in spans])
        real = torch.tensor([[int(start <= column < stop) for column in range(length)] for start, stop in spans])
        mask = torch.cat([self.mask, real], dim=1)
        try:
            if decoder is not None:
                logits = decoder.step(ids)
            elif self.stock:
                logits = prefill(self.model, ids, self.cache)
            else:
                given = {"attention_mask": mask} if not bool(real.all()) or self.random.random() < 0.5 else {}
                logits = self.model(ids, **given, **cache_argument(self.model, self.cache)).logits
        finally:
            # An exception behind the last layer, or in a later call of prefill, leaves columns in the cache that count.
            taken = self.cache.get_seq_length() - before
            self.mask = mask[:, : before + taken]
            for row, (start, stop) in enumerate(spans):
                self.rows[row] += ids[row, start : min(stop, taken)].tolist()
        self.check(logits, spans)

    def check(self, logits: Tensor, spans: list[tuple[int, int]]) -> None:
        """Compare with each row alone in one pass."""
        self.counts["checked"] += 1
        for row, (start, stop) in enumerate(spans):
            # Stock attention was fed in calls of its own, of which the last column is known.
            new = logits[row] if self.stock else logits[row, start:stop]
            if start < stop:
                whole = self.oracle(torch.tensor([self.rows[row]]), use_cache=False).logits[0, -len(new) :]
                if not torch.allclose(new, whole, rtol=0, atol=TOLERANCE):
                    raise WrongLogitsError(f"row {row}: off by {(new - whole).abs().max().item():.1e}")

    def change_rows(self) -> None:
        """Repeat, select or reorder the rows."""
        count = len(self.rows)
        if self.cache.get_seq_length() == 0:
            return
        if count < 3 and self.random.random() < 0.3:
            picked = [row for row in range(count) for _ in range(2)]
            self.cache.batch_repeat_interleave(2)
        else:
            picked = [self.random.randrange(count) for _ in range(self.random.randint(1, 3))]
            self.random.choice([self.cache.reorder_cache, self.cache.batch_select_indices])(torch.tensor(picked))
        self.rows, self.mask = [list(self.rows[row]) for row in picked], self.mask[picked]

    def duplicate(self) -> None:
        """Go on with a copy; what the original then takes in must not reach it."""
        original = self.cache
        by_pickle = not self.stock and self.random.random() < 0.3
        self.cache = pickle.loads(pickle.dumps(original)) if by_pickle else copy.deepcopy(original)
        prefill(self.model, torch.full((len(self.rows), 3), 5), original)

    def interrupt(self) -> None:
        """A step that an exception ends somewhere. The next call must be right, or refused until the cache is reset."""
        owner, name = self.random.choice(THROWN_AT)
        own, thrown = getattr(owner, name), _throwing(self.random, getattr(owner, name))
        setattr(owner, name, thrown)
        try:
            self.random.choice([self.piece, self.tokens, self.change_rows])()
            return
        except Thrown:
            self.counts["interrupted"] += 1
        finally:
            setattr(owner, name, own)
        try:
            self.call(1, [(0, 1)] * len(self.rows))
        except UserError:
            self.counts["refused"] += 1
            self.reset()


def _throwing(draw: random.Random, own: Any) -> Any:
    """A method whose n-th call raises, before or after its work."""
    at, after, calls = draw.randint(1, 5), draw.random() < 0.5, itertools.count(1)

    def method(layer: Any, *args: Any, **kwargs: Any) -> Any:
        now = next(calls) == at
        if now and not after:
            raise Thrown
        result = own(layer, *args, **kwargs)
        if now:
            raise Thrown
        return result

    return method


def _rule(draw: random.Random, stock: bool) -> LRSAConfig:
    lag = draw.choice([2, 3, 5, 8])
    return LRSAConfig(
        sink_size=draw.randint(0, 4),
        lag_size=lag,
        top_k=draw.randint(0, lag),
        chunk_size=draw.choice([None, 1, 3, lag, 12]),
        value_weight=draw.choice([0.0, 0.5, 1.0]),
        dense_layers=() if stock else draw.choice([(), (), (1,), (0, 2)]),
        # Stock attention hands no queries to a cache, and adds no bias.
        compressor=draw.choice([LagRelative(), LagRelative(), *OTHERS, *([] if stock else NOT_STOCK)]),
    )


def _with_budgets(draw: random.Random, rule: LRSAConfig, heads: int) -> LRSAConfig:
    """The rule, or one time in three with K of each head."""
    if draw.random() < 2 / 3 or getattr(rule.compressor, "shared_heads", False):
        return rule
    lag, layers = rule.lag_size, range(SIZES["num_hidden_layers"])
    return rule.replace(
        head_top_k=[[draw.choice([0, lag, draw.randint(0, lag)]) for _ in range(heads)] for _ in layers]
    )


def run_sequence(seed: int, steps: int) -> Counter[str]:
    """The counts of one sequence; what went wrong is printed and counted, not raised."""
    sequence = Sequence(seed)
    try:
        sequence.run(steps)
    except Exception as error:
        kind = "silent" if isinstance(error, WrongLogitsError) else "tracebacks"
        sequence.counts[kind] += 1
        print(f"seed {seed}, {sequence.family}, stock {sequence.stock}, {sequence.rule}", file=sys.stderr)
        traceback.print_exc()
    return sequence.counts


def main() -> int:
    """Run the sequences; 1 if some step was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=300)
    parser.add_argument("--steps", type=int, default=12, help="steps of a sequence")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sequence")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    started, counts = time.perf_counter(), Counter[str]()
    for seed in range(arguments.seed, arguments.seed + arguments.sequences):
        counts += run_sequence(seed, arguments.steps)
    names = ("steps", "checked", "decoded", "interrupted", "refused", "silent", "tracebacks")
    parts = [f"{arguments.sequences} sequences", *(f"{name} {counts[name]}" for name in names)]
    print(", ".join(parts), f"in {time.perf_counter() - started:.0f} s")
    return int(counts["silent"] + counts["tracebacks"] > 0)


if __name__ == "__main__":
    sys.exit(main())
