"""Tasks, one a file; importing this package fills the registry `TASKS`."""

from app.tasks.base import TASKS, Losses, Task
from app.tasks.causal_lm import CausalLM
from app.tasks.classify import Classify
from app.tasks.masked_lm import MaskedLM

__all__ = ["TASKS", "CausalLM", "Classify", "Losses", "MaskedLM", "Task"]
