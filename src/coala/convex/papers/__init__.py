"""The papers' own methods: CRONOS (ADMM), the interior point, pattern generation, and two phases with their losses.

`fit` takes the pairwise path beside this folder unless ``method="two-phase"`` asks for what is here.
"""
