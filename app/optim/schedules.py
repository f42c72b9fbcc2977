"""Learning-rate schedules in closed form: a factor in [0, 1] of the highest rate, as a function of the step."""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from models.errors import UserError


class Schedule(ABC):
    """A schedule with its numbers, before there is an optimizer.

    Args:
        warmup_steps: optimizer steps in which the factor rises linearly; step s (from 0) has (s + 1) / warmup_steps.
    """

    bounded = True  # whether the shape depends on the total number of steps

    def __init__(self, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise UserError(f"warmup_steps must be at least 0, not {warmup_steps}")
        self.warmup_steps = warmup_steps

    def factor(self, step: int, total: int) -> float:
        """The factor of optimizer step `step` (0 is the first) in a run of `total` steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(min(step, total), total)

    @abstractmethod
    def after_warmup(self, step: int, total: int) -> float:
        """The factor from step `warmup_steps` on."""

    def build(self, optimizer: Optimizer, total: int | float) -> "StepSchedule":
        """Return the scheduler that moves `optimizer` on every step.

        Raises:
            UserError: the shape needs a total number of steps and the run has none, or the warm-up is longer.
        """
        name = type(self).__name__
        if self.bounded and math.isinf(total):
            raise UserError(f"the schedule {name} needs to know where the run ends: set trainer.max_steps")
        if self.warmup_steps > total:
            raise UserError(f"warmup_steps is {self.warmup_steps}, more than the {total} steps of the whole run")
        return StepSchedule(optimizer, self, total)


class Constant(Schedule):
    """The highest rate after the warm-up."""

    bounded = False

    def after_warmup(self, step: int, total: int) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from 1 to `floor` (arXiv 1608.03983, equation 5, without restarts).

    Args:
        warmup_steps: optimizer steps of the linear rise.
        floor: the factor at the end.
    """

    def __init__(self, warmup_steps: int = 0, floor: float = 0.1) -> None:
        super().__init__(warmup_steps)
        self.floor = _share("floor", floor)

    def after_warmup(self, step: int, total: int) -> float:
        progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupStableDecay(Schedule):
    """Constant, then a linear fall to `floor` over the last part of the run (MiniCPM, arXiv 2404.06395).

    Args:
        warmup_steps: optimizer steps of the linear rise.
        decay: share of the whole run in which the rate falls, above 0 and at most 1.
        floor: the factor at the end.
    """

    def __init__(self, warmup_steps: int = 0, decay: float = 0.2, floor: float = 0.0) -> None:
        super().__init__(warmup_steps)
        self.decay, self.floor = _share("decay", decay), _share("floor", floor)
        if self.decay == 0:
            raise UserError("decay must be above 0; the schedule that never falls is Constant")

    def after_warmup(self, step: int, total: int) -> float:
        length = max(1, min(round(self.decay * total), total - self.warmup_steps))
        return 1.0 - (1.0 - self.floor) * max(0, step - (total - length)) / length


class StepSchedule(LRScheduler):
    """Sets `lr = highest lr * schedule.factor(step, total)` on every optimizer step.

    A checkpoint of it holds the position only: the rates come from the optimizer as it was built now, so a rate that is
    changed on the command line is the one that a resumed run uses.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, total: int | float) -> None:
        self.schedule, self.total = schedule, total
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        factor = self.schedule.factor(self.last_epoch, self.total)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = int(state_dict["last_epoch"])
        self._step_count = self.last_epoch + 1
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{name} must lie between 0 and 1, not {value}")
    return value
