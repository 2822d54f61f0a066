"""Draw docs/figures/method.svg, the picture of the rule: ``python docs/draw_method.py``.

What it shows is what the operator does: which tokens are kept is asked of the code, with random keys and values.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from lrsa_lit import Rule
from lrsa_lit.ops.sparse_attention import select
from lrsa_lit.ops.sparse_attention.geometry import compressed_at, raw_start

PICTURE = Path(__file__).parent / "figures" / "method.svg"
RULE = Rule(sink_size=4, lag_size=12, top_k=3)
TOKENS = 69
CELL, LEFT, WIDTH, HEIGHT = 11.5, 116, 930, 318
# Colours that can be told apart on white and on black, and by people who see few colours.
STYLE = """
text { font: 13px sans-serif; fill: #1f2328 } .small { font-size: 12px; fill: #59636e }
.sink { fill: #b7791f } .kept { fill: #1a7f64 } .raw { fill: #3b6fd4 } .query { fill: #c2255c }
.even { fill: #9aa5b1 } .odd { fill: #c3cbd3 } .gone { fill: none; stroke: #b6bec7 }
.line { fill: none; stroke: #59636e; stroke-width: 1.3 } .tip { fill: #59636e }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9aa5b1 }
  .sink { fill: #e0a83c } .kept { fill: #3cc49c } .raw { fill: #79a5f7 } .query { fill: #f06595 }
  .even { fill: #768390 } .odd { fill: #4b5661 } .gone { stroke: #59636e }
  .line { stroke: #9aa5b1 } .tip { fill: #9aa5b1 }
}"""


def kinds() -> list[str]:
    """What each token is to the last query: sink, kept, gone, raw, or the query itself."""
    torch.manual_seed(1)
    key, value = torch.randn(1, 1, TOKENS, 8), torch.randn(1, 1, TOKENS, 8)
    partitions = compressed_at(TOKENS - 1, RULE)
    kept = set(select(key, value, RULE).indices[0, 0, :partitions].flatten().tolist())
    raw = raw_start(partitions, RULE)
    found = ["sink" if t < RULE.sink_size else "kept" if t in kept else "gone" for t in range(raw)]
    return [*found, *["raw"] * (TOKENS - raw - 1), "query"]


def drawn() -> str:
    """The picture as SVG."""
    lines = "\n".join(_shapes(kinds()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        "<title>Which past tokens a query sees under Lag-Relative Sparse Attention</title>\n"
        f"<style>{STYLE}\n</style>\n{lines}\n</svg>\n"
    )


def _shapes(found: list[str]) -> Iterator[str]:
    raw, size, sinks = found.index("raw"), RULE.lag_size, RULE.sink_size
    starts = range(sinks, raw, size)
    yield _text(0, 87, "all tokens")
    past = [("even", "odd")[(t - sinks) // size % 2] for t in range(sinks, raw)]
    yield from _row(74, [*found[:sinks], *past, *found[raw:]])
    yield _text(LEFT, 62, "sinks", "small")
    for number, start in enumerate(starts):
        middle = _x(start) + size * CELL / 2
        yield _text(middle, 62, f"partition {number}", "small", "middle")
        yield from _arrow(_x(start + size) + size * CELL / 2, middle)
    yield _text(_x(raw) + size * CELL / 2, 62, f"partition {len(starts)}", "small", "middle")
    yield _text(
        _x(sinks) + size * CELL, 14, f"the next {size} tokens judge which {RULE.top_k} of a partition stay", "small"
    )
    yield _text(0, 158, "kept tokens")
    yield from _row(145, found)
    yield _text(_x(raw), 185, "raw window: all of it", "small")
    yield _text(_x(TOKENS), 185, "query", "small", "end")
    yield _text(_x(sinks), 185, f"{RULE.top_k} of each {size}; each key-value head has its own choice", "small")
    held = [kind for kind in found if kind != "gone"]
    yield _text(0, 238, "the cache")
    yield from _row(225, held)
    share = len(held) / len(found)
    yield _text(
        _x(len(held)) + 14, 232, f"{len(held)} of {len(found)} tokens here ({share:.0%}); on long texts", "small"
    )
    yield _text(_x(len(held)) + 14, 248, f"it approaches {RULE.top_k} of {size} ({RULE.top_k / size:.0%})", "small")
    for number, (kind, what) in enumerate(
        [("sink", "first tokens"), ("kept", "kept by score"), ("raw", "recent tokens"), ("query", "the query")]
    ):
        yield f'<rect class="{kind}" x="{LEFT + number * 150}" y="279" width="11" height="11"/>'
        yield _text(LEFT + number * 150 + 18, 289, what, "small")


def _row(y: float, found: list[str]) -> Iterator[str]:
    for t, kind in enumerate(found):
        yield f'<rect class="{kind}" x="{_x(t):g}" y="{y}" width="{CELL - 1.5:g}" height="17"/>'


def _arrow(start: float, end: float) -> Iterator[str]:
    """An arc from the partition that judges to the one that is judged."""
    start, end = start - 12, end + 12
    yield f'<path class="line" d="M{start:g} 48 C{start - 20:g} 24 {end + 20:g} 24 {end:g} 44"/>'
    yield f'<path class="tip" d="M{end - 5:g} 41 L{end + 5:g} 40 L{end - 3:g} 50 Z"/>'


def _x(token: int) -> float:
    return LEFT + token * CELL


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(drawn(), encoding="utf-8")
