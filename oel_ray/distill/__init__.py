"""One optimizer step of on-policy context distillation, on one rank. Knows torch and DeepSpeed; needs no Ray."""
