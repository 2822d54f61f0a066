"""Analysis of which tokens the attention kept and which run was better: records, metrics, plots and tables.

``record``, ``metrics``, ``plots`` and ``runs`` need neither PyTorch nor the model; ``capture`` and ``callback`` make
the records. ``ablation`` ranks layers by how much dense attention in them helps. YAML names the callbacks; no other
part of the package needs to import them.
"""
