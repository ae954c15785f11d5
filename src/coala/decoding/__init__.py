"""Guided decoding (torch): replies from a frozen model, steered by a head; knows nothing of how the head was fitted."""

from coala.decoding.distilled import divergence, policy_likelihood
from coala.decoding.engine import Engine, Job
from coala.decoding.generation import generate, generate_distilled
from coala.decoding.guidance import RULES, Guidance, reweight
from coala.decoding.likelihood import (
    TextLikelihood,
    guided_likelihoods,
    lifted,
    log_likelihood,
    model_log_ratios,
    unknown_likelihood,
)
from coala.decoding.requests import Rendered, Request
from coala.decoding.transformers_loop import guide

__all__ = [
    "RULES",
    "Engine",
    "Guidance",
    "Job",
    "Rendered",
    "Request",
    "TextLikelihood",
    "divergence",
    "generate",
    "generate_distilled",
    "guide",
    "guided_likelihoods",
    "lifted",
    "log_likelihood",
    "model_log_ratios",
    "policy_likelihood",
    "reweight",
    "unknown_likelihood",
]
