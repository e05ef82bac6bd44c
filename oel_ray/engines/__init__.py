"""The engine pool: vLLM replicas as Ray actors, routing, and the weights they get. vLLM is touched here alone."""
