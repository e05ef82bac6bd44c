"""Carry weights from the trainer to the engines, and policies to folders."""
