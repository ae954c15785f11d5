"""Whether the hub can be asked at all, found out once and quietly."""

from __future__ import annotations


def ask_once(name: str) -> None:
    """Raise what the hub's client raises where a data set or the hub cannot be reached.

    The reader of data sets tries again for a minute, aloud, before it says so; one question takes seconds at most.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        HfApi().dataset_info(name, timeout=10)
