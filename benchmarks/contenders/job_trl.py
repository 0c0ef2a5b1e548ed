"""The script that TRL's documentation shows, with sample answers after each validation."""

from typing import Any

import torch
import trl
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from contenders.job import Job
from contenders.phases import Phases
from contenders.task import TARGETS


class Answers(TrainerCallback):
    """Answers the first prompts of the validation data."""

    def __init__(self, job: Job, phases: Phases, tokenizer: Any, prompts: list[str]) -> None:
        self.job, self.phases, self.tokenizer, self.prompts = job, phases, tokenizer, prompts

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with self.phases.phase("samples"), torch.no_grad():
            for prompt in self.prompts:
                ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
                answer = model.generate(**ids, max_new_tokens=self.job.sample_tokens, do_sample=False)
                print(self.tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def run(job: Job, phases: Phases) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    with phases.phase("tokenising"):
        data = load_dataset("json", data_files={"train": job.train, "val": job.val}, cache_dir=f"{job.out}/cache")
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        for row in data["val"].select(range(job.samples))
    ]
    with phases.phase("loading"):
        model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.bfloat16)
    phases.watch(trl.SFTTrainer, "_prepare_dataset", "tokenising")
    phases.watch(Trainer, "evaluate", "validation")
    phases.watch(Trainer, "_save_checkpoint", "checkpoint")
    lora = {"r": job.r, "lora_alpha": job.alpha, "lora_dropout": job.dropout, "target_modules": list(TARGETS)}
    with phases.phase("loading"):
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(max_length=job.max_length, **job.trainer(job.steps())),
            train_dataset=data["train"],
            eval_dataset=data["val"],
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
            callbacks=[Answers(job, phases, tokenizer, prompts)],
        )
    with phases.phase("training"):
        trainer.train()
    with phases.phase("export"):
        trainer.save_model(f"{job.out}/adapter")


if __name__ == "__main__":
    order = Job.ordered()
    watched = Phases("start", order.started)
    run(order, watched)
    watched.write(order.report)
