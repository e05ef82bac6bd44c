"""Consolidation: trains the policy towards its own knowledge-conditioned self. Server side, without an environment."""
