"""Server side: trains the policy towards its own behaviour with experiential knowledge in the prompt."""
