"""DeepSpeed configuration as a pure function of the spec and the adapter's size."""

from __future__ import annotations

from typing import Any

from tune.config.run_spec import TrainSpec


def deepspeed_config(spec: TrainSpec, *, adapter_numel: int, largest_tensor: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for one engine.

    Args:
        spec: the fine-tuning; learning rate, betas, epsilon and weight decay are set per fine-tuning on the live
            optimizer and only have placeholders here.
        adapter_numel: number of trainable entries. Only these have gradients, so DeepSpeed's buckets are cut to it
            (its default of 5e8 entries would allocate 2 GB per worker for an adapter of a few MB).
        largest_tensor: entries of the largest trainable tensor. Under ZeRO-3 smaller tensors stay gathered: the
            adapter is needed in every forward and costs little, the base weights are partitioned.
    """
    zero: dict[str, Any] = {
        "stage": spec.zero_stage,
        "reduce_bucket_size": max(adapter_numel, 1),
        "allgather_bucket_size": max(adapter_numel, 1),
    }
    if spec.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = largest_tensor + 1
    if spec.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if spec.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": spec.per_device_train_batch_size,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "gradient_clipping": spec.max_grad_norm,
        "bf16": {"enabled": spec.bf16},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 2**31 - 1,
    }
    if spec.optimizer == "adamw":
        # torch's own AdamW needs no compiler on the cluster and is the same code on CPU and GPU.
        config["optimizer"] = {"type": "AdamW", "params": {"lr": spec.learning_rate, "torch_adam": True}}
    else:
        # It is handed over; which stages it can do is our own rule (`tune.config.train.optimizers`).
        config["zero_allow_untested_optimizer"] = True
    return config
