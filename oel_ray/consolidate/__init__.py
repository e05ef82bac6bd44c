"""Consolidation: trains the policy towards its own knowledge-conditioned self. Server side, without an environment.

`stage` starts a Ray Train group from the driver, `worker` is what runs in it; the other modules are its parts.
"""
