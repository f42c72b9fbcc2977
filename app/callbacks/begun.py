"""Whether a loop has begun: what fails before, with a checkpoint to read, fails because of the checkpoint."""

from typing import Any

from lightning.pytorch import Callback


class Begun(Callback):
    """Notes the first loop. It must stand behind the callbacks that take their state back when a loop starts."""

    def __init__(self) -> None:
        self.begun = False

    def _note(self, *_: Any) -> None:
        self.begun = True

    on_train_start = on_validation_start = on_test_start = on_predict_start = _note
