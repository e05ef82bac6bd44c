"""Find, check and load model folders, and tell what a model supports."""
