"""Two processes train with the callback; each writes what it saw to a file. Run by test_distributed.py.

Arguments: package, folder, mode (with, without or per_rank), strategy (ddp, fsdp or model_parallel), accelerator.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

from longctx.engine import timing
from longctx.training import (
    BenchmarkCallback,
    BenchmarkConfig,
    LongContextLM,
    SyntheticTextDataModule,
    ThroughputCallback,
)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A weight that lies in parts on two processes, put together."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def main(package_name: str, folder: str, mode: str, strategy: str, accelerator: str) -> None:
    package = importlib.import_module(package_name)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    timing.MIN_WARM_S, timing.MAX_WARM_S = dict.fromkeys(("cpu", "cuda"), 0.0), dict.fromkeys(("cpu", "cuda"), 0.01)
    config = BenchmarkConfig(
        sequence_lengths=[16], warmup_runs=1, benchmark_runs=2, results_dir=folder, output_file="run.json"
    )
    callback = BenchmarkCallback(config, 2, per_rank=mode == "per_rank")
    throughput = ThroughputCallback(2)
    torch.manual_seed(3)
    model = LongContextLM("DPASSM", vocab_size=16, d_model=16, n_heads=2, block_options={"window_size": 8})
    strategies = {
        "ddp": lambda: "ddp",
        "fsdp": lambda: package.strategies.FSDPStrategy(auto_wrap_policy=model.fsdp_wrap_policy()),
        "model_parallel": lambda: package.strategies.ModelParallelStrategy(),
    }
    trainer = package.Trainer(
        accelerator=accelerator,
        devices=2,
        strategy=strategies[strategy](),
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[throughput] if mode == "without" else [callback, throughput],
    )
    data = SyntheticTextDataModule(vocab_size=16, sequence_length=16, batch_size=2, train_sequences=32, val_sequences=0)
    losses = []

    class Losses(package.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

        def on_train_end(self, trainer, pl_module):
            # Flat parameters of FSDP are compared as they lie; others whole.
            seen["weights"] = [float(whole(p.detach()).double().sum()) for p in pl_module.parameters()]

    seen: dict = {}
    trainer.callbacks.append(Losses())
    trainer.fit(model, data)
    seen |= {
        "rows": [[row.block_name, row.training_step, row.status] for row in callback.benchmark_results],
        "errors": [row.error for row in callback.benchmark_results if row.error],
        "losses": losses,
        "world_size": trainer.world_size,
        "tokens_per_step": [w.tokens_per_s * w.step_time_s for w in throughput.history],
    }
    Path(folder, f"{mode}-{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
