"""What SIGTERM does while a Trainer runs: what it does elsewhere in the process."""

import signal
import threading

from lightning.pytorch import Callback, LightningModule, Trainer


class KeepTermination(Callback):
    """Puts back the handler of SIGTERM that the Trainer replaces.

    The Trainer's own would end the run at the end of a batch, as if with success, and with several processes it waits
    in a collective that the others need not be in.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """End the processes that this one has started: they may wait for it in a collective."""
        launcher = trainer.strategy.launcher
        if isinstance(exception, Exception) or launcher is None:
            return
        children, launcher.procs[:] = list(launcher.procs), []  # unseen by the observer, which would end this one too
        for child in children:
            child.kill()
