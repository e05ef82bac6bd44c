"""The configuration: its schema, how it is read, and how many tokens it leaves room for."""
