"""Compute one optimizer step of on-policy context distillation on one rank. Uses torch and DeepSpeed; needs no Ray."""
