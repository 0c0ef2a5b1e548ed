"""The steps of loralib's README, with this package's layers on a Phi-3: what each is called, and what is different.

python examples/loralib_walkthrough.py                      # on the tiny model that the package brings along
python examples/loralib_walkthrough.py --base FOLDER --chats chats.jsonl
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import loralib
import torch

from phi3_lightning import ChatDataModule, Phi3LoRAModule
from phi3_lightning.errors import CheckpointError

TINY = "src/phi3_lightning/assets/tiny_phi3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=TINY)
    parser.add_argument("--chats", default=f"{TINY}/chats_train.jsonl")
    parser.add_argument("--file", type=Path, default=Path("lora.pt"))
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()

    # 1. Layers in place of layers: nn.Linear becomes loralib.Linear, the fused qkv_proj a loralib.MergedLinear with
    #    enable_lora=[True, False, True]. There you write both into the model; here you name them.
    lora = {"backend": "loralib", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    module = Phi3LoRAModule(given.base, lora=lora, optimizer={"lr": 5e-3}, gradient_checkpointing="none")
    module.configure_model()
    attention = module.model.model.layers[0].self_attn
    print(f"o_proj:   a loralib.Linear: {isinstance(attention.o_proj, loralib.Linear)}")
    print(f"qkv_proj: a loralib.MergedLinear, enable_lora={attention.qkv_proj.enable_lora}")
    print(f"          slices of {attention.qkv_proj.slices} rows, where loralib's own would cut three equal ones")

    # 2. loralib.mark_only_lora_as_trainable(model): done; to do it again changes nothing.
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    loralib.mark_only_lora_as_trainable(module.model)
    assert before == {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    trained = sum(parameter.numel() for parameter in module.trained_parameters())
    print(f"trained:  {trained:,} of {sum(parameter.numel() for parameter in module.parameters()):,} parameters")

    # 3. Train. model.eval() merges there and model.train() subtracts again, which rounds the weights at each
    #    validation; here merge_weights is False, and the base stays as it is, to the bit.
    frozen = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    data = ChatDataModule(train=given.chats, tokenizer=given.base, max_length=256, batch_size=2, num_workers=0)
    pl.Trainer(max_steps=given.steps, max_epochs=-1, limit_val_batches=1, logger=False, enable_checkpointing=False,
               enable_progress_bar=False, accelerator="cpu").fit(module, data)  # fmt: skip
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in module.named_parameters() if name in frozen)
    print("frozen:   every weight is as it was, to the bit")

    # 4. torch.save(loralib.lora_state_dict(model)): the same call on the same names.
    state = loralib.lora_state_dict(module.model)
    torch.save(state, given.file)
    print(f"saved:    {len(state)} tensors, {given.file.stat().st_size / 1e3:.0f} kB in {given.file}")

    # 5. model.load_state_dict(torch.load(path), strict=False), because the file has no base weights. It works on a
    #    fresh model with the same layers ...
    again = Phi3LoRAModule(given.base, lora=lora)
    again.configure_model()
    again.model.load_state_dict(torch.load(given.file, weights_only=True), strict=False)
    assert all(map(torch.equal, again.trained_parameters(), module.trained_parameters()))
    #    ... and says nothing where the file belongs to other layers; `init_from: path` names what does not fit.
    other = Phi3LoRAModule(given.base, lora={**lora, "target_modules": ["q_proj"], "init_from": str(given.file)})
    try:
        other.configure_model()
    except CheckpointError as error:
        print(f"refused:  {error}")


if __name__ == "__main__":
    main()
