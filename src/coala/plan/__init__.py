"""What a run will cost before it is begun: tokens, FLOPs, memory, disk and time, and the settings that make it fit."""

from coala.plan.plan import Plan, PlanError, make_plan

__all__ = ["Plan", "PlanError", "make_plan"]
