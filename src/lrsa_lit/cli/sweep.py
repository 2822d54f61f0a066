"""``lrsa sweep``: a fit for each point of a grid of settings, each in its own process and MLflow run."""

from __future__ import annotations

from collections.abc import Sequence

from lrsa_lit.cli.arguments import Parser, add_executor, resumable
from lrsa_lit.cli.main import prepared
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.sweep import FLAG, Sweep, parse, points
from lrsa_lit.experiments.sweep_results import show

EPILOG = f"""\
All other options are those of `lrsa fit`. Values are YAML, so {FLAG} 'data.init_args.limit={{train: 8}},{{train: 64}}'
has two. Run the same command again to continue unfinished fits from their last checkpoints.

example:
  lrsa sweep --config configs/model/smollm2.yaml --config configs/data/hotpotqa.yaml \\
             {FLAG} model.lrsa.top_k=16,32,64 {FLAG} model.lrsa.lag_size=128,256
"""


def run(arguments: Sequence[str]) -> None:
    """Run what follows ``lrsa sweep``.

    Raises:
        UserError: a mistake in the arguments, before anything has run.
        SystemExit: code 1 if a point failed, 130 after Ctrl-C.
    """
    parser = Parser("lrsa sweep", description="Fit once for each point of a grid of settings.", epilog=EPILOG)
    of_grid = "values of a setting; repeat it to span a grid"
    parser.add_argument(FLAG, metavar="KEY=V1,V2", action="append", default=[], help=of_grid)
    add_executor(parser)
    options, rest = parser.parse_known_args(arguments)
    if printing := [option for option in rest if option.startswith("--print_")]:
        raise UserError(printing[0], reason="it is not allowed in a sweep; use it with lrsa fit")
    grid = parse(options.grid)
    first = [f"--{key}={values[0]}" for key, values in grid.items()]
    # Sweep refuses any checkpoint below and says why, so do not check here whether it exists.
    if not any(each.startswith("--ckpt_path") for each in (*first, *rest)):
        prepared("fit", [*rest, *first])
    from lrsa_lit.cli.fit_settings import FitSettings
    from lrsa_lit.experiments.on_ray import executor

    todo = points(grid, rest, FitSettings())
    with executor(options.on, jobs=options.jobs) as runs:
        sweep = Sweep(todo, grid)
        try:
            with resumable():
                well = sweep.run(runs)
        finally:
            show(sweep.outcomes, len(todo))
    if not well:
        raise SystemExit(1)
