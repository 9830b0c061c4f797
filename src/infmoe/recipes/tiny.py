"""A size that trains on a laptop's CPU in minutes: the demo, and the trial of every change."""

from infmoe.recipes.variants import fields
from infmoe.train.config import (
    CheckpointConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)


def tiny(variant: str) -> RunConfig:
    """Four layers of width 128 over a vocabulary of 2048, 2.5M tokens."""
    return RunConfig(
        name=f"tiny/{variant}",
        steps=600,
        batch_tokens=4096,  # 32 rows of 128
        micro_batch_size=32,
        precision="bf16",
        model={
            "vocab_size": 2048,
            "max_position_embeddings": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_size": 128,
            **fields(variant, d_ff=512, z_dim=64),
        },
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=50, min_lr_ratio=0.0),
        eval=EvalConfig(every=100, windows=64),
        checkpoint=CheckpointConfig(every=100),
    )
