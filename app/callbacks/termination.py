"""Early ends of a run: SIGTERM while a Trainer runs, and a lost rank."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import subprocess_script

GRACE = 5  # seconds for this process to end by itself, after one beside it has failed and said why
AGAIN = "the same command with --ckpt_path last goes on from the newest checkpoint, if it was fit"


class KeepTermination(Callback):
    """Puts back the handler of SIGTERM that the Trainer replaces, and watches the processes that it starts.

    The Trainer's own would end the run at the end of a batch, as if with success, and with several processes it waits
    in a collective that the others need not be in. Its observer of processes kills this one without a word.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)
        subprocess_script._launch_process_observer = watch

    def _keep(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    # the Trainer puts its own in place after `setup` and `on_fit_start`
    on_train_start = on_validation_start = on_test_start = on_predict_start = _keep

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """End the processes that this one has started: they may wait for it in a collective."""
        launcher = trainer.strategy.launcher
        if launcher is None:
            return
        if isinstance(exception, Exception):
            _await_loss(launcher.procs)
            return
        children, launcher.procs[:] = list(launcher.procs), []  # unseen by the observer, which would end this one too
        for child in children:
            child.kill()


def watch(children: Sequence[subprocess.Popen]) -> None:
    """End this process, with status 1 and a sentence, as soon as one of its children is killed, or stays failed."""
    threading.Thread(target=_watch, args=(children,), daemon=True, name="watch").start()


def _watch(children: Sequence[subprocess.Popen]) -> None:
    failed_at = None
    while any(child.poll() != 0 for child in children):
        end_if_lost(children)
        if any(child.returncode for child in children):
            failed_at = failed_at or time.monotonic()
            if time.monotonic() - failed_at > GRACE:
                end(children, "failed")
        time.sleep(0.1)


def _await_loss(children: Sequence[subprocess.Popen]) -> None:
    """Wait a moment for the end of a child: a collective with it fails before its parent can know that it is gone."""
    until = time.monotonic() + 1
    while children and time.monotonic() < until:
        end_if_lost(children)
        time.sleep(0.05)


def end_if_lost(children: Sequence[subprocess.Popen]) -> None:
    """End this process where a signal has ended one of its children."""
    for child in children:
        if (child.poll() or 0) < 0:
            end(children, f"was killed by {signal.Signals(-child.returncode).name} (out of memory?)")


def end(children: Sequence[subprocess.Popen], how: str) -> None:
    """Kill the other children, and end this process at once: its main thread may wait in a collective for ever."""
    for child in children:
        child.kill()
    print(f"\nespalier: error: a process of this run {how}; {AGAIN}", file=sys.stderr, flush=True)
    os._exit(1)
