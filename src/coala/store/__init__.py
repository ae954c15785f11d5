"""The run folder and the file form of every value: safetensors and JSON, written atomically, stamped with digests.

The only package that writes files. It knows the values and nothing of how they are made.

    RUN/run.json                    the settings the run was started with
    RUN/stages/<stage>.json         digest of what each stage read and of what it wrote
    RUN/pairs-train.jsonl, ...      one file or folder per value
"""

from coala.store.appending import append_line
from coala.store.features import FeatureStore, link_features, load_features, save_features, scratch, write_rows
from coala.store.files import (
    MisfitError,
    StoreError,
    claim,
    digest,
    discard,
    file_digest,
    load_json,
    load_lines,
    load_object,
    plain,
    read_as,
    save_json,
    save_lines,
    working_folder,
    write_atomic,
    write_error,
)
from coala.store.policies import (
    DISTILLED,
    PEFT,
    load_adapter,
    load_policy,
    run_policy,
    save_adapter,
    save_policy,
)
from coala.store.raters import head_for, head_stamp, save_rater_heads
from coala.store.replacing import Replacement, replacing
from coala.store.run import LIVE, RunFolder, differences, worded
from coala.store.values import (
    load_generations,
    load_head,
    load_judgements,
    load_pairs,
    pair_digest,
    save_generations,
    save_head,
    save_judgements,
    save_pairs,
)

__all__ = [
    "DISTILLED",
    "LIVE",
    "PEFT",
    "FeatureStore",
    "MisfitError",
    "Replacement",
    "RunFolder",
    "StoreError",
    "append_line",
    "claim",
    "differences",
    "digest",
    "discard",
    "file_digest",
    "head_for",
    "head_stamp",
    "link_features",
    "load_adapter",
    "load_features",
    "load_generations",
    "load_head",
    "load_json",
    "load_judgements",
    "load_lines",
    "load_object",
    "load_pairs",
    "load_policy",
    "pair_digest",
    "plain",
    "read_as",
    "replacing",
    "run_policy",
    "save_adapter",
    "save_features",
    "save_generations",
    "save_head",
    "save_json",
    "save_judgements",
    "save_lines",
    "save_pairs",
    "save_policy",
    "save_rater_heads",
    "scratch",
    "worded",
    "working_folder",
    "write_atomic",
    "write_error",
    "write_rows",
]
