"""Guided decoding (torch): replies from a frozen model, steered by a head; knows nothing of how the head was fitted."""

from coala.decoding.generation import generate, log_likelihood
from coala.decoding.guidance import RULES, Guidance, reweight

__all__ = ["RULES", "Guidance", "generate", "log_likelihood", "reweight"]
