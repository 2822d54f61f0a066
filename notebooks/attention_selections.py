# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What the attention kept
#
# Each layer and key-value head keeps `top_k` of the `lag_size` tokens of a partition. This notebook shows which ones, for
# some validation samples of one run, before and after training. Record them with
#
#     lrsa fit … --config configs/experiment/selections.yaml
#
# All heads see the sinks and the raw window, so no head chooses among them: they are grey, and no number counts them.

# %%
# %matplotlib inline
import pandas as pd
from IPython.display import HTML

from lrsa_lit.analysis import metrics, plots, runs

# %% [markdown]
# The store is `MLFLOW_TRACKING_URI`, else `runs/mlflow.db` in this folder or one above. The experiment is the latest one
# with selections: put the name of another in its place. `runs.find_run(store, experiment, name)` takes another run than
# the latest.

# %%
store = runs.open_store()
experiment = runs.latest_experiment(store, with_selections=True)
run = runs.latest_with_selections(store, experiment)
records = runs.selections(store, run)
before, after = records[0], records[-1]
run.info.run_name, [record.step for record in records]

# %% [markdown]
# ## A text as the heads see it
#
# White means kept by no head, darker by more heads of all layers; point at a token for the number. Another sample: change
# the 0.

# %%
HTML(plots.context_html(after, 0))

# %% [markdown]
# Layer by layer: do early and late layers keep other places, and do they keep the evidence?

# %%
plots.positions(after, 0)

# %% [markdown]
# ## Does the evidence survive?
#
# The share of the gold passages' and the answers' tokens that were kept, of those in compressed partitions. A head that
# chooses at random keeps K/L of them, and N layers of H heads together miss a token with probability (1 - K/L)^(N H).

# %%
plots.survival_by_layer([before, after])

# %%
pd.DataFrame(
    {
        (f"step {record.step}", evidence): {
            "tokens": found.tokens,
            "kept, mean of heads": found.mean,
            "by chance": found.chance,
            "kept by any head": found.anywhere,
            "any, by chance": found.chance_anywhere,
        }
        for record in (before, after)
        for evidence in ("gold", "answer")
        for found in [metrics.survival(record, evidence)]
    }
)

# %% [markdown]
# ## Does the place matter?
#
# The score is taken of rotated keys, whose distance to the next partition is part of what it sees. Where the line falls,
# the beginning of a partition is kept for its place. The band is from the least to the most of the layers.

# %%
plots.by_place([before, after])

# %% [markdown]
# ## Which kinds of tokens are kept?
#
# Judged by the word that a token belongs to. A rare word stands once in its text; a name starts with a capital inside a
# sentence. A token may be of several kinds.

# %%
plots.kinds([before, after])

# %% [markdown]
# ## Do layers and heads keep the same?
#
# Cohen's kappa is 1 where two heads keep the same tokens and 0 where they agree as often as chance makes them.

# %%
plots.agreement(after)

# %% [markdown]
# ## What did training change?

# %%
plots.change(before, after)
