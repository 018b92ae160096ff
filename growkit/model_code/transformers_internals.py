# SPDX-License-Identifier: Apache-2.0
"""What growkit uses of transformers beyond its documented interface, and where it was checked.

One list, so that a new release is looked through once: ``tests/test_transformers_internals.py``
holds every entry against the installed transformers, and CI runs it with the oldest, the pinned and
the newest version that pyproject.toml admits. No torch.
"""

from __future__ import annotations

# The versions that the tests ran with; pyproject.toml admits no newer minor release.
CHECKED_VERSIONS = ("5.16.0", "5.23.0", "5.24.0")

# Private methods and hooks of transformers.Trainer that growkit.training overrides or calls, with
# their arguments after self.
TRAINER_METHODS: dict[str, tuple[str, ...]] = {
    "_move_model_to_device": ("model", "device"),
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_init_training_state": (
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_get_train_sampler": ("train_dataset",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "create_optimizer": ("model",),
    "create_scheduler": ("num_training_steps", "optimizer"),
    "log": ("logs", "start_time"),
}

# Overridden where it exists: name -> a version that has it (5.16 has not).
NEWER_TRAINER_METHODS = {"_defer_fsdp_gradient_reduction": "5.23"}

# Attributes of a running Trainer that are read or set.
TRAINER_ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged")

# Names that our models take from transformers' own: module under transformers -> names.
MODEL_NAMES: dict[str, tuple[str, ...]] = {
    "activations": ("ACT2FN",),
    "cache_utils": ("Cache", "EncoderDecoderCache"),
    "configuration_utils": ("PreTrainedConfig",),
    "conversion_mapping": ("get_checkpoint_conversion_mapping",),
    "initialization": ("constant_", "normal_", "zeros_"),
    "modeling_layers": ("GradientCheckpointingLayer",),
    "modeling_utils": ("ALL_ATTENTION_FUNCTIONS", "PreTrainedModel"),
    "models.llama.modeling_llama": (
        "LlamaAttention",
        "LlamaForCausalLM",
        "LlamaModel",
        "LlamaRMSNorm",
        "LlamaRotaryEmbedding",
        "apply_rotary_pos_emb",
        "eager_attention_forward",
        "repeat_kv",
    ),
    "models.t5.configuration_t5": ("T5Config",),
    "models.t5.modeling_t5": (
        "T5Attention",
        "T5ForConditionalGeneration",
        "T5Model",
        "T5PreTrainedModel",
        "T5Stack",
    ),
}
