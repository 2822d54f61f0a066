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
# # Do models trained with LRSA keep their answers under compression?
#
# The results of a study, as `lrsa study run` writes them. `lrsa study report` makes the same tables with all intervals.

# %%
# %matplotlib inline
from IPython.display import display_png

from lrsa_lit.cli.study import open_study
from lrsa_lit.experiments.report import evidence, places, result_plots, tables
from lrsa_lit.experiments.report.bars import Bars, table_of
from lrsa_lit.experiments.report.cells import Cells, Table, measure_of
from lrsa_lit.experiments.report.document import results_of
from lrsa_lit.paths import nearest

# %% [markdown]
# Files are looked for in this folder and in those above it.

# %%
results = "study/results.jsonl"
study = open_study(str(nearest("configs/experiment/robustness.yaml")))
cells = Cells(study, results_of(study, nearest(results)))
print(f"Results of {nearest(results).absolute()}")
list(study.parts)

# %% [markdown]
# ## Trained one way, used another
#
# Rows were trained, columns are the attention at inference. Another part: change its name.

# %%
part = "main"
table = Table(cells, part, study.parts[part]["sets"][0])
tables.matrix(table).frame(intervals=False)

# %% [markdown]
# Each cell with its interval, its share of dense training with dense inference, and its gain over dense training under the
# same attention.

# %%
tables.full(table).frame()

# %%
result_plots.against_share(table.entries, table.measure, f"{part}: {table.data_set}")

# %% [markdown]
# What was to be reached, and what was:

# %%
table_of(Bars(cells).verdicts()).frame()

# %% [markdown]
# ## Which layers matter
#
# What the answer loss falls by where one more layer is dense, for each part that has asked for losses alone.

# %%
asked = [(name, data_set) for name in study.parts for data_set in study.parts[name]["sets"]]
for name, data_set in asked:
    if measure_of(study, data_set, name) == "loss" and (gains := evidence.layers(Table(cells, name, data_set))):
        display_png(result_plots.layers(gains, f"{name}: {data_set}"))

# %% [markdown]
# ## Training
#
# The rows of that part, a line for each seed.

# %%
result_plots.training_curves([line for line in cells.lines if line["row"] in study.parts[part]["rows"]])

# %% [markdown]
# ## Is the evidence kept?
#
# The share of the supporting passages' tokens that a head keeps: a head that chooses at random keeps K/L of them.

# %%
evidence.survival(cells).frame()

# %%
result_plots.survival(evidence.pairs(cells))

# %% [markdown]
# Plain text, without a question:

# %%
result_plots.perplexity(evidence.texts(cells))

# %% [markdown]
# ## Where the answer stands
#
# Scores by the place of the answer: among what all see; whole among the last K tokens of a partition, which the most
# recent ones keep; elsewhere; or not in the text. Questions are read from the data that `lrsa study data` has
# written.

# %%
named = next(name for name in study.parts if "against" in study.parts[name])
places.by_place(Table(cells, named, study.parts[named]["sets"][0]), nearest("study/data")).frame()

# %% [markdown]
# ## One question, all answers
#
# Pick a question.

# %%
number = 0
places.answers(table, number)

# %% [markdown]
# Its text, and the answers that count as right, are read from the data that `lrsa study data` has written.

# %%
places.question(table, number, "study/data")
