"""Extraction: from trajectories to experiential knowledge. Server side: reads trajectories, never an environment.

`items` and `chain` are the algorithm, `stage` spreads its K accumulations over Ray actors.
"""
