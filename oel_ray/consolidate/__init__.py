"""Train the policy towards its own knowledge-conditioned self. Server side, without an environment.

`stage` starts a Ray Train group from the driver, and `worker` runs in it. The other modules are its parts.
"""
