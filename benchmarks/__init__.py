"""What the project promises about speed and memory, measured. See RESULTS.md; the package does not import any of it."""
