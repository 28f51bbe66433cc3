"""Train one step with Hugging Face's Trainer, as one of several processes.

usage: run_hf_trainer.py STORE MODEL OUTPUT CACHE METHOD MICRO_BATCH ACCUMULATION; rank 0 writes OUTPUT/log.json
"""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from stage2_train.hf import ScoreStore

    store_path, model_path, output, cache, method, micro_batch, accumulation = sys.argv[1:]
    arguments = TrainingArguments(
        output, remove_unused_columns=False, per_device_train_batch_size=int(micro_batch), max_steps=1,
        gradient_accumulation_steps=int(accumulation), logging_steps=1, save_strategy="no", report_to="none",
        max_grad_norm=1e9, use_cpu=True, dataloader_num_workers=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    store = ScoreStore(store_path, method=method, cache_dir=cache)
    trainer = Trainer(model, arguments, **store.trainer_arguments(model, arguments))
    trainer.train()
    if trainer.is_world_process_zero():
        Path(output).mkdir(parents=True, exist_ok=True)
        (Path(output) / "log.json").write_text(json.dumps(trainer.state.log_history))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
