"""Run the engine pool: vLLM replicas as Ray actors, and the routing of requests to them."""
