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
# This notebook reads the results of a study, as `lrsa study run` writes them: every trained model was evaluated under
# several kinds of attention. It shows the scores, whether the targets were reached, and some reasons: which layers
# matter, what training minimised, and whether the evidence is kept. `lrsa study report` writes the same tables with all
# intervals.
#
# The outputs below are those of the repository's main study, `configs/experiment/robustness.yaml`. Paragraphs that
# begin with *This study* are true of its results only.

# %%
# %matplotlib inline
# %config InlineBackend.figure_formats = ["retina"]
import textwrap

import pandas as pd
from IPython.display import display_png

from lrsa_lit.cli.study import open_study
from lrsa_lit.experiments.report import evidence, places, result_plots, tables
from lrsa_lit.experiments.report.bars import Bars, table_of
from lrsa_lit.experiments.report.cells import Cells, Table, measure_of
from lrsa_lit.experiments.report.document import results_of
from lrsa_lit.paths import nearest

pd.options.display.max_colwidth = None

# %% [markdown]
# ## Choose a study
#
# Files are searched for in this folder and in its parent folders. The list names the parts of the study.

# %%
results = "study/results.jsonl"
study = open_study(str(nearest("configs/experiment/robustness.yaml")))
cells = Cells(study, results_of(study, nearest(results)))
print(f"Results of {nearest(results).absolute()}")
print(textwrap.fill(", ".join(study.parts), 90, break_on_hyphens=False))

# %% [markdown]
# ## Trained one way, used another
#
# Rows are models, by the attention they were trained with. Columns are kinds of attention at inference. Read along a
# row to see what compression costs that model, and down a column to see which training suits that compression. For
# another part, change its name.

# %%
part = "main"
table = Table(cells, part, study.parts[part]["sets"][0])
tables.matrix(table).frame(intervals=False).set_index("trained").round(3)

# %% [markdown]
# The full table adds the interval of each score, its share of dense training with dense inference, and the difference
# to dense training under the same attention.

# %%
tables.full(table).frame().set_index(["trained", "inference"]).round(3)

# %% [markdown]
# The plot has a line for each model. A flat line means that the model loses nothing when it attends to fewer pairs.

# %%
result_plots.against_share(table.entries, table.measure, f"{part}: {table.data_set}")

# %% [markdown]
# *This study:* with dense inference, the trained models are within 0.03 of each other (0.479 to 0.504). At 8x, dense
# training falls to 0.344, and training at 8x keeps 0.445. The base model scores at most 0.084, because it answers in
# sentences.
#
# ## Were the targets reached?
#
# A bar is a target that was set before the results were known. Its verdict says whether the score reaches it, and
# whether its interval does.

# %%
table_of(Bars(cells).verdicts()).frame().set_index("bar")[["verdict", "reached", "required"]]

# %% [markdown]
# *This study:* 13 of 35 bars are met, eight of them not significantly. One has no results yet, and 21 are missed. All ten
# comparisons with other selectors are missed, and so are ten of eleven gains on other tasks.
#
# ## Which layers matter?
#
# Each bar is a layer that is made dense while the others stay compressed. A high bar means that the layer needs tokens
# that compression discards.

# %%
asked = [(name, data_set) for name in study.parts for data_set in study.parts[name]["sets"]]
for name, data_set in asked:
    if measure_of(study, data_set, name) == "loss" and (gains := evidence.layers(Table(cells, name, data_set))):
        display_png(result_plots.layers(gains, f"{name}: {data_set}"))

# %% [markdown]
# *This study:* if all layers are compressed, layers 18 and 23 matter by far the most: making one of them dense lowers the
# loss by 0.51 and 0.27. Once both are dense, layers 7 and 20 matter most, with 0.07 and 0.05.
#
# ## Did all models learn equally well?
#
# The lines are the training losses of the models in the first table, each under the attention that it was trained with.
# Compare the heights at which they end.

# %%
rows = study.parts[part]["rows"]
result_plots.training_curves([line for line in cells.lines if line["row"] in rows])

# %% [markdown]
# *This study:* the stronger the compression, the higher the loss. Over the last 20 steps, its mean is 0.68 for dense
# training and 0.84 at 8x.
#
# ## Is the evidence kept?
#
# The table has the share of the supporting passages' and of the answers' tokens that a head keeps, before and after
# training, for the models of the first table. A head that chooses at random keeps the share in the column *chance*.

# %%
kept = evidence.survival(cells).frame().set_index(["questions", "trained", "inference"])
kept[kept.index.isin(rows, level="trained")].drop(columns="by quarter", errors="ignore").round(3)

# %% [markdown]
# The plot divides these shares by chance, for all models. Points to the right of the line keep more of the evidence than chance. If
# training taught heads to find evidence, diamonds would be to the right of circles.

# %%
result_plots.survival(evidence.pairs(cells))

# %% [markdown]
# *This study:* at the length of training, heads keep 5 to 13 % more of the evidence than chance before training, and 4 to
# 8 % more after it. At twice that length (`hotpotqa_8k`), they keep 6 to 14 % less than chance. So training did not teach
# heads to find evidence.
#
# ## Does the model still read plain text?
#
# Perplexity on text without a question shows what training on answers costs elsewhere. Lower is better.

# %%
result_plots.perplexity(evidence.texts(cells))

# %% [markdown]
# *This study:* training on answers raises the perplexity from 16 to between 19 and 26. Compression changes it by about 5 %
# at most.
#
# ## Where is the answer?
#
# If compression loses answers because it discards them, scores fall where the answer is in compressed text. The columns
# are places of the answer: in text that all heads see; within the last K tokens of a partition, which the most-recent
# baseline keeps; elsewhere; or not in the text. The questions are read from the data that `lrsa study data` wrote.

# %%
named = next(name for name in study.parts if "against" in study.parts[name])
by_place = places.by_place(Table(cells, named, study.parts[named]["sets"][0]), nearest("study/data"))
by_place.frame(intervals=False).set_index(["trained", "inference"]).round(3)

# %% [markdown]
# *This study:* which selector wins depends on the place. The most-recent baseline scores 0.485 on answers within the last
# K tokens and 0.107 elsewhere. Lag-relative selection, *4x*, scores 0.185 and 0.295. With nothing kept, both are about 0.1.
#
# ## One question, all answers
#
# The answers of every model and seed, under every attention, to one question. Pick a number.

# %%
number = 2
places.answers(table, number).pivot(index=["trained", "seed"], columns="inference", values="answer")

# %% [markdown]
# The question, and the answers that count as right:

# %%
places.question(table, number, "study/data")

# %% [markdown]
# *This study:* densely trained, no seed answers this question at 8x. Trained at 8x, all three seeds do.
