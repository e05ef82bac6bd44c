"""What a run tells while it works: metrics, trackers, the progress line."""
