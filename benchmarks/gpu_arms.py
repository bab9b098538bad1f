"""One arm of `benchmarks.gpu_recovery`: a few steps of one tool at one setting, as a process."""

import json
import sys
import time
from pathlib import Path
from typing import Any

RANK = 64
RATE = 1e-5


def peak_memory(device: str) -> int:
    """Return the most bytes that the device's allocator, or on a CPU the process, has held."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rows_of(told: dict[str, Any]) -> list[list[int]]:
    """Return as many rows as the run takes, of the ids of the tokenizer that the text has."""
    import random

    shape = told["shape"]
    draw = random.Random(0)
    count = (told["steps"] + told["warm"]) * shape["rows"]
    return [[draw.randrange(1024) for _ in range(shape["context"])] for _ in range(count)]


def surgery(told: dict[str, Any]) -> list[float]:
    """Train by the loop of `surgery recover`; return the seconds of every step."""
    from surgery.recover.ask import Ask, check_ask
    from surgery.recover.distributed import joined
    from surgery.recover.interrupts import listening
    from surgery.recover.loop import Loop
    from surgery.recover.session import opened
    from surgery.recover.settings import Settings
    from surgery.recover.sources import Source

    shape = told["shape"]
    whole = shape["rows"] * shape["context"]
    settings = Settings(
        train=shape["train"], rank=RANK, losses={"ce": 1.0}, context=shape["context"],
        tokens=whole * (told["steps"] + told["warm"]), batch_tokens=whole, lr=RATE,
        micro_tokens=told["rows"] * shape["context"], schedule="constant", save_seconds=0.0,
        checkpointing=told["checkpointing"], compile=told["compile"], precision="bfloat16",
        kernels="liger" if told["liger"] else None,
    )  # fmt: skip
    ask = Ask(
        student=told["model"], data=(Source(f"{told['model']}/text.txt"),),
        out=Path(told["out"]) / "healed", settings=settings, device=told["device"],
    )  # fmt: skip
    check_ask(ask)
    seconds: list[float] = []
    with joined(ask.device) as world, listening() as asked, opened(ask, world) as session:
        Loop(session, asked, lambda step: seconds.append(step["seconds"])).run()
    return seconds


class Clock:
    """Seconds of every step of a Trainer, the device waited for at both ends."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.since = device, list[float](), 0.0

    def now(self) -> float:
        """Return the time when the device is done."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def callback(self) -> Any:  # noqa: ANN401 - of transformers
        """Return what a Trainer calls."""
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):
            def on_step_begin(self, *_: object, **__: object) -> None:
                clock.since = clock.now()

            def on_step_end(self, *_: object, **__: object) -> None:
                clock.seconds.append(clock.now() - clock.since)

        return Steps()


def arguments(told: dict[str, Any]) -> dict[str, Any]:
    """Return what Trainer and TRL are both given."""
    shape = told["shape"]
    return {
        "output_dir": f"{told['out']}/trainer",
        "per_device_train_batch_size": told["rows"],
        "gradient_accumulation_steps": shape["rows"] // told["rows"],
        "max_steps": told["steps"] + told["warm"],
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "adam_beta2": 0.95,
        "bf16": True,
        "use_cpu": told["device"] == "cpu",
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": told["checkpointing"],
        "torch_compile": told["compile"],
        "use_liger_kernel": told["liger"],
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def adapters() -> Any:  # noqa: ANN401 - of peft
    """Return the same LoRA as ours; norms stay as they are."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def load(told: dict[str, Any]) -> Any:  # noqa: ANN401 - of transformers
    """Return the model: frozen weights in bfloat16, those that train whole in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    lora = told["shape"]["train"] == "lora"
    dtype = torch.bfloat16 if lora else torch.float32
    return AutoModelForCausalLM.from_pretrained(told["model"], dtype=dtype, use_cache=False)


def trainer(told: dict[str, Any]) -> list[float]:
    """Train by Hugging Face Trainer, with peft for LoRA; return the seconds of every step."""
    import torch
    from transformers import Trainer, TrainingArguments

    model = load(told)
    if told["shape"]["train"] == "lora":
        from peft import get_peft_model

        if told["checkpointing"]:
            model.enable_input_require_grads()
        model = get_peft_model(model, adapters())
    rows = [{"input_ids": row, "labels": row} for row in rows_of(told)]
    clock = Clock(told["device"])
    found = Trainer(
        model=model,
        args=TrainingArguments(**arguments(told)),
        train_dataset=rows,
        data_collator=lambda many: {
            key: torch.tensor([one[key] for one in many]) for key in ("input_ids", "labels")
        },
        callbacks=[clock.callback()],
    )
    found.train()
    return clock.seconds


def trl(told: dict[str, Any]) -> list[float]:
    """Train by TRL's SFTTrainer on full rows; return the seconds of every step."""
    from datasets import IterableDataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    lora = told["shape"]["train"] == "lora"
    rows = [{"input_ids": row, "labels": row} for row in rows_of(told)]
    clock = Clock(told["device"])
    found = SFTTrainer(
        model=load(told),
        args=SFTConfig(
            **arguments(told),
            max_length=told["shape"]["context"],
            dataset_kwargs={"skip_prepare_dataset": True},  # rows are full already
        ),
        train_dataset=IterableDataset.from_generator(lambda: rows),
        processing_class=AutoTokenizer.from_pretrained(told["model"], pad_token="<pad>"),
        peft_config=adapters() if lora else None,
        callbacks=[clock.callback()],
    )
    found.train()
    return clock.seconds


def main(text: str) -> None:
    """Run an arm, and print what it came to as the last line."""
    told = json.loads(text)
    seconds = {"surgery": surgery, "trainer": trainer, "trl": trl}[told["tool"]](told)
    if len(seconds) != told["steps"] + told["warm"]:
        sys.exit(f"Error: took {len(seconds)} steps")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(told["model"]))
    embedding = model.get_input_embeddings().weight
    looked_up = 0 if told["shape"]["tied"] else embedding.numel()
    print(json.dumps({
        "seconds": seconds[told["warm"]:],
        "warm_seconds": seconds[: told["warm"]],
        "peak_bytes": peak_memory(told["device"]),
        "parameters": sum(p.numel() for p in model.parameters()) - looked_up,
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
