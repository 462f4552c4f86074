"""Ctrl-C, SIGTERM and kill -9."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, TINY, load_script
from small_runs import STEPS, assert_same_run, before_step, resumed, trainer

from minivit.training.folder import LAST, METRICS, read_metrics
from minivit.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")

FLAGS = [
    *TINY,
    *"--width 8 --batch-size 32 --accumulate 2 --dropout 0.1".split(),
    *"--epochs 12 --log-every 1 --checkpoint-seconds 0".split(),
]


MIDDLE, LONG = 100, 300  # steps, of 276; seconds
WAITING = f"""
import runpy, sys, time
from minivit.training.trainer import Trainer

learning_rate, deadline = Trainer.learning_rate, time.monotonic() + {LONG}

def waiting(self, step):
    while step == {MIDDLE} and not self.stopped and time.monotonic() < deadline:
        time.sleep(0.005)
    return learning_rate(self, step)

Trainer.learning_rate = waiting
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(out):
    """minivit train in a process of its own that has made 100 steps and waits for a signal in the next."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WAITING, ROOT / "scripts" / "train.py", *FLAGS, "--out", out],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + LONG
    while sum(r["kind"] == "train" for r in read_metrics(out / METRICS)) < MIDDLE and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert load_script("train").main([*FLAGS, "--out", str(out)]) == 0
    return out


def finish(out, capsys):
    assert load_script("train").main(["--resume", "--quiet", "--out", str(out)]) == 0
    return capsys.readouterr().out


def test_ctrl_c_in_another_process(tmp_path, uninterrupted, capsys):
    out = tmp_path / "run"
    process = launch(out)
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=600)
    assert process.returncode == 130 and complaint == ""
    step = checkpoint.load(out / LAST)[1]["progress"]["step"]
    assert step in (MIDDLE, MIDDLE + 1)  # one less if the signal came while step 100 was logged
    assert said.splitlines()[-1] == f"stopped at step {step} of 276; go on with --resume --out {out}"
    assert f"resuming at step {step} of 276" in finish(out, capsys)
    assert_same_run(out, uninterrupted)


def test_kill_9_in_another_process(tmp_path, uninterrupted, capsys):
    out = tmp_path / "run"
    process = launch(out)
    process.kill()
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    step = checkpoint.load(out / LAST)[1]["progress"]["step"]
    assert step in (MIDDLE - 1, MIDDLE)  # killed before its checkpoint of step 100, or after
    assert f"resuming at step {step} of 276" in finish(out, capsys)
    assert_same_run(out, uninterrupted)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    run = trainer(tmp_path)

    def twice():
        signal.raise_signal(signal.SIGINT)
        assert run.stopped
        signal.raise_signal(signal.SIGINT)

    before_step(run, 6, twice)
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert signal.getsignal(signal.SIGINT) is previous
    assert resumed(tmp_path).state.step == 0  # the first checkpoint, whole


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(trainer(tmp_path).run()))
    thread.start()
    thread.join()
    assert results[0]["steps"] == STEPS
