"""Optimizers and learning-rate schedules, each an object that a recipe chooses by name."""

from app.optim.adamw import AdamW
from app.optim.base import Optimization
from app.optim.muon import Muon
from app.optim.schedules import Constant, Cosine, Schedule, StepSchedule, WarmupStableDecay

__all__ = ["AdamW", "Constant", "Cosine", "Muon", "Optimization", "Schedule", "StepSchedule", "WarmupStableDecay"]
