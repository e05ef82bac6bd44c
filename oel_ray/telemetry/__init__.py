"""Report on a run while it works: metrics, trackers, the progress line."""
