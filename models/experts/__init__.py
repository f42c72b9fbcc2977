"""Mixtures of experts: routers, balancing and capacity as objects of their own, and the experts they send tokens to."""

from models.experts.assignments import Assignments
from models.experts.balancing import BALANCES, Auxiliary, Bias, ImportanceAndLoad, ZLoss
from models.experts.capacity import Capacity
from models.experts.mixture import MixtureOfExperts, Statistics
from models.experts.router import ROUTERS, Router, Routing
from models.experts.router_expert_choice import ExpertChoice
from models.experts.router_noisy import NoisyTopK
from models.experts.router_sigmoid import Sigmoid
from models.experts.router_softmax import GShard, Softmax, Switch
from models.experts.separate import SeparateExperts
from models.experts.spec import LAYOUTS, Experts
from models.experts.stacked import StackedExperts

__all__ = [
    "BALANCES",
    "LAYOUTS",
    "ROUTERS",
    "Assignments",
    "Auxiliary",
    "Bias",
    "Capacity",
    "ExpertChoice",
    "Experts",
    "GShard",
    "ImportanceAndLoad",
    "MixtureOfExperts",
    "NoisyTopK",
    "Router",
    "Routing",
    "SeparateExperts",
    "Sigmoid",
    "Softmax",
    "StackedExperts",
    "Statistics",
    "Switch",
    "ZLoss",
]
