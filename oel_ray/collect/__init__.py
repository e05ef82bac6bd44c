"""Collecting trajectories: players, on the user's side. Runs in player actors."""
