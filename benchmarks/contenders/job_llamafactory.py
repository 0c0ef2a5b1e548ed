"""LLaMA-Factory's command ``llamafactory-cli train``, which answers no samples."""

import json
from pathlib import Path

from contenders.llamafactory_sft import find_layers  # first: it lets the library be imported beside newer ones

from llamafactory.train import tuner  # isort: skip
from llamafactory.train.sft import workflow  # isort: skip
from transformers import Trainer

from contenders.job import Job
from contenders.phases import Phases
from contenders.task import TARGETS


def settings(job: Job) -> dict[str, object]:
    """Return the content of the command's file; without a template it takes the tokenizer's."""
    folder = Path(job.out) / "data"
    folder.mkdir()
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    sets = {
        name: {"file_name": path, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
        for name, path in (("train", job.train), ("val", job.val))
    }
    (folder / "dataset_info.json").write_text(json.dumps(sets))
    return {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "model_name_or_path": job.base,
        "dataset": "train", "eval_dataset": "val", "dataset_dir": str(folder), "cutoff_len": job.max_length,
        "lora_rank": job.r, "lora_alpha": job.alpha, "lora_dropout": job.dropout, "lora_target": ",".join(TARGETS),
        **job.trainer(job.steps()), "output_dir": f"{job.out}/adapter",
    }  # fmt: skip


if __name__ == "__main__":
    job = Job.ordered()
    phases = Phases("start", job.started)
    find_layers()
    phases.watch(workflow, "get_dataset", "tokenising")
    phases.watch(workflow, "load_model", "loading")
    phases.watch(Trainer, "train", "training")
    phases.watch(Trainer, "evaluate", "validation")
    phases.watch(Trainer, "_save_checkpoint", "checkpoint")
    phases.watch(Trainer, "save_model", "export")
    tuner.run_exp(settings(job))
    phases.write(job.report)
