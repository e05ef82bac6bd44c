"""Translate our configuration into DeepSpeed's. Runs in the training ranks."""

from typing import Any

from oel_ray.config.schema import ConsolidateConfig


def deepspeed_config(config: ConsolidateConfig, world_size: int, device: str) -> dict[str, Any]:
    """Build DeepSpeed's configuration. `device` is "cpu" or "cuda".

    The caller decides how many micro-batches make a step, so DeepSpeed's own batch sizes are a formality. An offloaded
    optimizer is torch's as well. DeepSpeed insists on its own only in place of an optimizer object from the caller.
    """
    stage = config.zero_stage
    if config.precision == "bfloat16":
        # Stage 0 would accumulate bfloat16 gradients in bfloat16; stage 1 is the first to accumulate them in float32.
        stage = max(stage, 1)
    settings: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.grad_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": config.weight_decay,
                # torch's own kernels, because DeepSpeed's would be compiled at run time on every machine.
                "torch_adam": True,
                "fused": device == "cuda",
            },
        },
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "steps_per_print": 2**31,
    }
    if config.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    if config.precision == "bfloat16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings
