"""Prompts, and the chat format that turns them into token ids."""
