"""Rounds out of what agents did. Nothing is here yet; it will drive extraction and consolidation as the loop does."""
