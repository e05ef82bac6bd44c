"""Evaluation: how well a policy plays held-out maps. Runs in the driver and feeds nothing back into training."""
