"""Play games: player actors, and the evaluation games of a policy."""
