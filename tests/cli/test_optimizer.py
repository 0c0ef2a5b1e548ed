"""``model.optimizer.class_path`` and Lightning's callbacks by their short names, on the command line."""

import pytest
import torch

from cli.conftest import QUICK


@pytest.mark.slow
def test_a_class_in_a_file_trains_resumes_and_exports_beside_lightnings_callbacks(cli, tmp_path):
    (tmp_path / "sgd.yaml").write_text(
        f"""
model:
  optimizer:
    class_path: torch.optim.SGD
    init_args: {{momentum: 0.9}}
trainer:
  callbacks:
  - class_path: LearningRateMonitor
  - class_path: DeviceStatsMonitor
  - class_path: RichModelSummary
  - class_path: OnExceptionCheckpoint
    init_args: {{dirpath: {tmp_path}}}
  - class_path: Timer
    init_args: {{duration: "00:01:00:00"}}
  - class_path: ModelCheckpoint
    init_args: {{dirpath: {tmp_path}/top, monitor: val/loss, save_top_k: 2}}
"""
    )
    options = (*QUICK, "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1", "--data.packing=false")
    cli("fit", f"--config={tmp_path}/sgd.yaml", *options, "--trainer.max_steps=2")
    assert list((tmp_path / "top").glob("*.ckpt"))
    run = tmp_path / "runs/phi3-lora"
    assert "resuming after step 2" in cli("fit", f"--config={run}/config.yaml", "--trainer.max_steps=3").text
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    (group, *_) = saved["optimizer_states"][0]["param_groups"]
    assert (group["momentum"], group["kind"]) == (0.9, "torch.optim.SGD")
    cli("export", f"--config={tmp_path}/sgd.yaml", QUICK[3], "--output_dir=exported")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.optimizer.class_path=torch.optim.LBFGS"], "model.optimizer.class_path: 'torch.optim.LBFGS' "),
        (
            ["--trainer.callbacks=[{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}]"],
            "trainer.callbacks: GradientAccumulationScheduler ",
        ),
    ],
)
def test_what_cannot_train_is_one_line_before_anything_is_written(cli, tmp_path, options, message):
    run = cli("fit", *QUICK, *options, code=1)
    assert f"error: {message}" in run.text
    assert "Traceback" not in run.text
    assert not (tmp_path / "runs").exists()


def test_a_callback_that_saves_on_exceptions_does_not_hide_them(cli, tmp_path):
    saving = f"--trainer.callbacks=[{{class_path: OnExceptionCheckpoint, init_args: {{dirpath: {tmp_path}}}}}]"
    run = cli("fit", *QUICK, "--data.max_length=3", saving, code=1)
    assert "error: " in run.text
    assert "no row is left to use" in run.text.partition("error: ")[2]
