"""The seconds between the command and the first batch, told once."""

import logging
import re
import time

import psutil
import pytest

import synthetic
from phi3_lightning import Phi3LoRAModule
from phi3_lightning.callbacks import StartUp
from phi3_lightning.callbacks.start_up import process_age

ROWS = [[synthetic.document(9, 5, seed)] for seed in range(2)]


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere the system does not tell")
def test_a_process_is_as_old_as_the_system_says():
    # the system counts in hundredths of a second, and psutil knows the moment of its start to a second
    assert process_age() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)


def test_what_the_first_batch_waited_for_is_told_once(tiny_base, tmp_path, caplog):
    class Slow(Phi3LoRAModule):
        def configure_model(self):
            time.sleep(0.3)
            super().configure_model()

    loader = synthetic.loader([synthetic.batch_of([row]) for row in ROWS])
    with caplog.at_level(logging.INFO):
        began = time.perf_counter()
        trainer = synthetic.trainer(tmp_path, callbacks=[StartUp()], max_epochs=2)
        trainer.fit(Slow(tiny_base), loader, loader)
    lasted = time.perf_counter() - began
    (line,) = [message for message in caplog.messages if "the first batch" in message]
    total = float(re.match(r"trained the first batch ([\d.]+) s after the start", line)[1])
    parts = {what: float(seconds) for seconds, what in re.findall(r"([\d.]+) s ([a-z ]+?)(?:,|$)", line.split(": ")[1])}
    assert parts["data and model"] >= 0.3
    assert total <= process_age()
    assert total - parts["imports and configuration"] <= lasted + 0.1
    # rounded to a tenth each, and what takes no twentieth of a second is left out
    assert sum(parts.values()) == pytest.approx(total, abs=0.05 * 8)
