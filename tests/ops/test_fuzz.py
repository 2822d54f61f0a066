"""The random configurations of benchmarks/fuzz_operator.py, a few of them at each run."""

import fuzz_operator
import pytest

from lrsa_lit.ops.sparse_attention import api, compressors


@pytest.mark.parametrize(("impl", "cases"), [("eager", 150), ("triton", 8)])
def test_random_configurations_give_what_the_definition_says(impl, cases, capsys):
    assert fuzz_operator.main(["--impl", impl, "--cases", str(cases)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["order", "output"])
def test_a_wrong_operator_is_found_and_its_seeds_are_named(wrong, monkeypatch, capsys):
    if wrong == "order":
        ranking = compressors.weighted_ranking
        monkeypatch.setattr(
            compressors, "weighted_ranking", lambda *args: ranking(*args)._replace(order=-ranking(*args).order)
        )
    else:
        forward = api.eager.forward
        monkeypatch.setattr(api.eager, "forward", lambda *args, **options: 1.001 * forward(*args, **options))
    assert fuzz_operator.main(["--cases", "40"]) == 1
    out = capsys.readouterr().out
    seed = int(out.split("seed ")[1].split(":")[0])
    assert fuzz_operator.main(["--first", str(seed), "--cases", "1"]) == 1
    assert f"seed {seed}: " in capsys.readouterr().out
