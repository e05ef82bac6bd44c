"""The engine pool: vLLM replicas as Ray actors, routing, and the weights that reach them. vLLM is touched here alone."""
