"""The `oel` command: reads what was typed, and says in one line what was wrong. Runs where it is typed."""
