"""Register our weight-transfer backends (entry point `vllm.general_plugins`). Runs in every vLLM process.

vLLM loads plug-ins in the front end, in EngineCore and in each Worker, and may do so twice in one process.
"""

GLOO, NCCL = "oel_gloo", "oel_nccl"


def register() -> None:
    """Register the worker side and the trainer side of `oel_gloo` and `oel_nccl`; calling it again does nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    worker, trainer = "oel_ray.weights.receive", "oel_ray.weights.send"
    if GLOO in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(GLOO, worker, "GlooReceiver")
    WeightTransferEngineFactory.register_engine(NCCL, worker, "NcclReceiver")
    WeightTransferTrainerFactory.register_engine(GLOO, trainer, "GlooSender")
    WeightTransferTrainerFactory.register_engine(NCCL, trainer, "NcclSender")
