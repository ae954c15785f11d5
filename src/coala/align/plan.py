"""What a run will cost, before any of it is done: tokens, FLOPs, memory, disk and time, and what cannot fit.

Sizes come from the model's config.json, tokens from its tokenizer where there is one, seconds from a short probe where
its weights are here. Every formula is one of :mod:`coala.costs`; nothing is written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from coala.align.counting import Counts, Guess, count
from coala.costs import (
    Shape,
    Stopwatch,
    ask_driver,
    cronos_flops,
    decoding_bytes,
    decoding_flops,
    extraction_flops,
    head_flops,
    least_flops,
    pairwise_flops,
    pass_bytes,
    search_flops,
    second_phase_flops,
)
from coala.recipe import ModelSettings, Recipe
from coala.values import CoalaError, Estimate

if TYPE_CHECKING:
    from coala.backbone import Outline
    from coala.features.plan import Survey
