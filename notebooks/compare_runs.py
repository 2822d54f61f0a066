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
# # Which run was better, and is it luck?
#
# Runs of one experiment, grouped by model and rule; runs of a group differ in their seed. Intervals resample seeds and
# questions, and differences compare rules on the same questions.

# %%
# %matplotlib inline
from lrsa_lit.analysis import plots, runs

# %% [markdown]
# The store is `MLFLOW_TRACKING_URI`, else `runs/mlflow.db` in this folder or one above. The experiment is the latest one
# with a validated run: put the name of another in its place.

# %%
store = runs.open_store()
experiment = runs.latest_experiment(store)
table = runs.table(store, experiment)
table

# %% [markdown]
# ## F1 of each rule
#
# On the questions that all these runs answered.

# %%
answers = runs.questions(store, table.index)
scores = runs.shared_scores(answers)
rules = runs.by_rule(table, scores)
rules

# %%
plots.f1_against(rules, "kept_share", "K/L, kept share of a partition")

# %%
plots.f1_against(rules, "peak_memory_gib", "peak memory, GiB")

# %%
plots.f1_against(rules, "step_seconds", "optimizer step, s")

# %% [markdown]
# ## Differences on the same questions
#
# An interval that reaches over 0 may be chance.

# %%
differences = runs.differences(table, scores)
differences

# %%
plots.differences(differences)

# %% [markdown]
# ## Questions that one run answers and the other does not
#
# The oldest and the latest run; put other run ids in their place. A question is answered from an F1 of 0.5 on.

# %%
first, second = table.index[-1], table.index[0]
table.loc[[first, second], ["name", "f1"]]

# %%
runs.answered_by_one(answers, first, second)
