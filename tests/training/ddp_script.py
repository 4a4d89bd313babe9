"""Two processes train with the callback; each writes what it saw to a file. Run by test_distributed.py.

Arguments: package, folder, mode: with, without or per_rank.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

from longctx.engine import timing
from longctx.training import BenchmarkCallback, BenchmarkConfig, LongContextLM, SyntheticTextDataModule


def main(package_name: str, folder: str, mode: str) -> None:
    package = importlib.import_module(package_name)
    torch.set_num_threads(1)
    timing.MIN_WARM_S, timing.MAX_WARM_S = {"cpu": 0.0}, {"cpu": 0.01}
    config = BenchmarkConfig(
        sequence_lengths=[16], warmup_runs=1, benchmark_runs=2, results_dir=folder, output_file="ddp.json"
    )
    callback = BenchmarkCallback(config, 2, per_rank=mode == "per_rank")
    torch.manual_seed(3)
    model = LongContextLM("DPASSM", vocab_size=16, d_model=16, n_heads=2, block_options={"window_size": 8})
    trainer = package.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if mode == "without" else [callback],
    )
    data = SyntheticTextDataModule(vocab_size=16, sequence_length=16, batch_size=2, train_sequences=32, val_sequences=0)
    trainer.fit(model, data)
    seen = {
        "rows": [[row.block_name, row.training_step, row.status] for row in callback.benchmark_results],
        "weights": [float(p.double().sum()) for p in model.parameters()],
        "world_size": trainer.world_size,
    }
    Path(folder, f"{mode}-{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
