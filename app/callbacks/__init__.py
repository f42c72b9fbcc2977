"""Callbacks of a run: checkpoints, metrics, samples, progress, random state, and the model folder at its end."""

from app.callbacks.checkpoints import Checkpoints, newest_checkpoint
from app.callbacks.early_stopping import StopEarly
from app.callbacks.experts import ExpertLoad
from app.callbacks.folder import ModelFolder
from app.callbacks.metrics import Metrics
from app.callbacks.nan_guard import FiniteGuard, NonFiniteLoss
from app.callbacks.progress import RunProgress
from app.callbacks.randomness import RandomState
from app.callbacks.record import RunRecord
from app.callbacks.samples import Samples
from app.callbacks.termination import KeepTermination

__all__ = [
    "Checkpoints",
    "ExpertLoad",
    "FiniteGuard",
    "KeepTermination",
    "Metrics",
    "ModelFolder",
    "NonFiniteLoss",
    "RandomState",
    "RunProgress",
    "RunRecord",
    "Samples",
    "StopEarly",
    "newest_checkpoint",
]
