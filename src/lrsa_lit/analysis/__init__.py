"""What the attention kept, and which run was better: records, metrics, plots and tables for the notebooks.

``record``, ``metrics``, ``plots`` and ``runs`` need neither PyTorch nor the model; ``capture`` and ``callback`` make
the records. ``ablation`` ranks the layers by what their dense attention is worth. Nothing of the package imports this
part: YAML names its callbacks.
"""
