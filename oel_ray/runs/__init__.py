"""The run folder: its files, lock, journals and stages, and the order in which stages follow each other."""
