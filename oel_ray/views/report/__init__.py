"""One page that shows whether a run has learned, and what. Reads the run folder alone."""
