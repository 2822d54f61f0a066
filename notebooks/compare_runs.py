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
# This notebook compares the runs of one experiment: their scores, their cost, and their answers to single questions.
# Runs with the same model and rule are repetitions that differ in their seed. Intervals resample both seeds and
# questions, and differences compare rules on the same questions.
#
# The outputs below are from shortened quickstarts: SmolLM2-135M, trained for 16 steps on HotpotQA texts of at most 768
# tokens, on two CPU cores, and validated on 12 questions. So few questions prove nothing, and the intervals show that.
# Paragraphs that begin with *These runs* are true of those runs only.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
from lrsa_lit.analysis import plots, runs

# %% [markdown]
# ## Choose an experiment
#
# The store is `MLFLOW_TRACKING_URI`, or else `runs/mlflow.db` in this folder or in one above it. The default is the
# experiment of the latest validated run. For another one, replace `experiment` by its name.

# %%
store = runs.open_store()
experiment = runs.latest_experiment(store)
table = runs.table(store, experiment)
table.round(3)

# %% [markdown]
# *These runs:* three values of K, with two seeds each. All were compressed in every layer, with a lag of 64.
#
# ## What does a smaller cache cost?
#
# The table has one row per rule, and its F1 on the questions that all of these runs answered. `kept_share` is K/L, the
# share of a partition that a head keeps.

# %%
answers = runs.questions(store, table.index)
scores = runs.shared_scores(answers)
rules = runs.by_rule(table, scores)
rules.round(3)

# %% [markdown]
# If tokens matter, the line rises from left to right. Compare its slope with the length of the bars.

# %%
plots.f1_against(rules, "kept_share", "kept share of a partition (K/L)")

# %% [markdown]
# *These runs:* F1 is 0.17, 0.11 and 0.19 for K = 8, 16 and 32. The line is not monotonic and each bar reaches down to 0, so
# no effect of K can be seen.
#
# ## What do the rules cost?
#
# The best rule is at the upper left: a high F1 for little memory, and for little time.

# %%
plots.f1_against(rules, "peak_memory_gib", "peak memory (GiB)")

# %%
plots.f1_against(rules, "step_seconds", "time of an optimizer step (s)")

# %% [markdown]
# *These runs:* peak memory is 4.5 to 4.6 GiB for each K. Other programs used the machine too: the two runs of one K differ
# by more than a second per step, so the times do not rank the rules.
#
# ## Is the difference luck?
#
# Each row compares two rules on the same questions. If the interval includes 0, the difference may be chance.

# %%
differences = runs.differences(table, scores)
differences.round(3)

# %%
plots.differences(differences)

# %% [markdown]
# *These runs:* all three intervals include 0. Any of these differences may be luck.
#
# ## Questions that only one run answers
#
# Scores hide what changed. This table lists the questions that the oldest run answers and the latest one does not, or
# the reverse. A question counts as answered if its F1 is at least 0.5. Replace the run ids to compare other runs.

# %%
first, second = table.index[-1], table.index[0]
table.loc[[first, second], ["name", "f1"]]

# %%
only_one = runs.answered_by_one(answers, first, second)
# What is stored is the end of the prompt.
only_one["question"] = only_one["question"].str.rpartition("Question: ")[2].str.split("\n").str[0]
only_one.round(3)

# %% [markdown]
# *These runs:* the latest run (K = 32) answers two questions that the oldest one (K = 8) does not. No question is answered
# by the oldest one alone.
