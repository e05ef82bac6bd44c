"""Extract experiential knowledge from trajectories. Server side: reads trajectories, never an environment.

`items` and `chain` are the algorithm and run in extraction workers. `stage` starts those from the driver.
"""
