"""Guided decoding (torch): replies from a frozen model, steered by a head; knows nothing of how the head was fitted."""

from coala.decoding.generation import generate
from coala.decoding.guidance import RULES, Guidance, reweight
from coala.decoding.likelihood import log_likelihood

__all__ = ["RULES", "Guidance", "generate", "log_likelihood", "reweight"]
