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
# With Lag-Relative Sparse Attention, a long prompt is split into partitions of `lag_size` tokens. Every key-value head
# keeps only the `top_k` best tokens of each partition and discards the rest. This notebook shows which tokens the heads
# of one run keep, for eight validation questions, before and after training:
#
# 1. one text as the heads see it
# 2. whether the passages that answer the question survive
# 3. whether the place in the partition or the kind of word decides
# 4. whether heads and layers agree, and what training changed
#
# The outputs below are from the quickstart: SmolLM2-135M, trained for 32 steps on HotpotQA texts of at most 768 tokens,
# on two CPU cores. That is enough to see the tools work, but too little for conclusions about the method. Paragraphs
# that begin with *This run* are true of that run only. To record your own:
#
#     lrsa fit … --config configs/experiment/selections.yaml
#
# The sinks (the first tokens) and the raw window (the last ones) are visible to all heads. They are grey in the
# pictures, and all numbers leave them out.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import pandas as pd
from IPython.display import HTML

from lrsa_lit.analysis import metrics, plots, runs

# %% [markdown]
# ## Choose a run
#
# The store is `MLFLOW_TRACKING_URI`, or else `runs/mlflow.db` in this folder or in one above it. The default is the
# latest run that recorded selections. For another experiment, replace `experiment` by its name; for another run, use
# `runs.find_run(store, experiment, name)`.

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
# The darker a token, the more heads of all layers keep it; no head keeps a white one. Boxes mark the passages that
# support the answer, and the answer. Point at a token to see how many heads keep it. Replace the 0 for another question.

# %%
HTML(plots.context_html(after, 0))

# %% [markdown]
# *This run:* of the 640 tokens that may be discarded, only three are kept by no head, and none is kept by all 90. Digits
# and parts of rare names are the most popular, with up to 86 % of the heads. "The" and "the" are the least popular. The
# answer, "number five", occurs twice; 19 to 29 % of the heads keep its tokens, and 25 % would by chance.
#
# The same text by layer. A column is a token that all layers keep. A row that differs from its neighbours is a layer
# that chooses by other features.

# %%
plots.positions(after, 0)

# %% [markdown]
# *This run:* dark columns go through many layers, so layers share their favourite tokens. Layer 0 differs from the layers
# next to it. From layer 23 on, a layer's three heads mostly agree: 65 to 81 % of the tokens are kept by all or by none.
#
# ## Does the evidence survive?
#
# These lines show the share of the tokens of gold passages and of answers that a layer's heads keep on average. A head
# that chooses at random keeps K/L of them, the dotted line. Lines above it mean that the score finds the evidence.

# %%
plots.survival_by_layer([before, after])

# %% [markdown]
# *This run:* the gold passages are kept as often as chance, in every layer (24 to 25 % of 1,980 tokens). The answers vary
# more, from 15 % in layer 2 to 33 % in layer 18, but they are only 38 tokens. Training moved neither curve much.
#
# The table has the means over all layers and heads. It also counts the tokens that at least one head keeps. With N
# layers of H heads, random heads would lose a token everywhere with probability (1 - K/L)^(N H), so almost every token
# survives somewhere by chance alone.

# %%
pd.DataFrame.from_dict(
    {
        (record.step, evidence): {
            "tokens": found.tokens,
            "kept (mean of heads)": found.mean,
            "kept by chance": found.chance,
            "kept by any head": found.anywhere,
            "by any head, by chance": found.chance_anywhere,
        }
        for record in (before, after)
        for evidence in ("gold", "answer")
        for found in [metrics.survival(record, evidence)]
    },
    orient="index",
).rename_axis(["step", "evidence"]).round(3)

# %% [markdown]
# *This run:* heads keep 25 % of the gold passages and 24 % of the answers, as by chance. At least one of the 90 heads keeps
# 99 % of the former and all of the latter.
#
# ## Does the place in the partition matter?
#
# The score compares keys after rotation, so the distance to the next partition is part of what it sees. A flat line
# means that the place does not matter. A falling line means that the beginning of a partition is preferred.

# %%
plots.by_place([before, after])

# %% [markdown]
# *This run:* the line falls. Heads keep 36 % of the first quarter of a partition and 14 % of the last one. Training did not
# change that.
#
# ## Which kinds of words are kept?
#
# Each token is judged by the word that it belongs to. A rare word occurs once in its text; a name starts with a capital
# letter inside a sentence. A kind is preferred if its coloured bars are higher than its black bar.

# %%
plots.kinds([before, after])

# %% [markdown]
# *This run:* rare words, names and numbers are preferred. Rare words are 35 % of all tokens and 44 % of the kept ones.
# Punctuation is 13 % of all tokens and 8 % of the kept ones. Training changed nothing that can be seen here.
#
# ## Do layers and heads keep the same tokens?
#
# Cohen's kappa is 1 where two heads keep the same tokens, and 0 where they agree as often as chance. The diagonal
# compares the heads of one layer. Bright blocks are groups of layers that choose alike.

# %%
plots.agreement(after)

# %% [markdown]
# *This run:* the last seven layers choose most alike, with a kappa of 0.28 to 0.62 between them. The mean over all pairs of
# different layers is 0.15. Layer 0 agrees with the others no more than chance does (at most 0.06).
#
# ## What did training change?
#
# Each point compares the tokens that a head keeps before training with those that it keeps after it. At 1, training
# changed nothing.

# %%
plots.change(before, after)

# %% [markdown]
# *This run:* 32 steps changed little; the mean kappa is 0.91. The first five layers changed least (above 0.95), and layers
# 12 to 22 most (0.85 to 0.90).
