"""Which settings of a run shape what it computes."""

# Where it reads, writes and computes, which is not what it computes.
WITHOUT_EFFECT = (
    *("runs_dir", "data_dir", "cache_dir", "wandb", "device", "resume", "task.workers"),
    *("budget", "launcher", "logger", "plugins", "strategy", "sequence_parallel"),
)
OF_PRETRAINING = ("objective", "pixel_loss", "pretraining")
OF_FINE_TUNING = (
    *("finetuning", "tuning", "lora", "ladder", "pretrain", "recipe", "n_test"),
    *("model.pooling", "model.head"),
)
