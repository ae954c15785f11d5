"""What a run will cost before it is begun: tokens, FLOPs, memory, disk and time, and the settings that make it fit."""

from coala.plan.plan import PlanError, RunPlan, make_plan

__all__ = ["PlanError", "RunPlan", "make_plan"]
