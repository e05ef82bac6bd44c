"""Define, read and check the configuration: its schema, its sources, its token budgets."""
