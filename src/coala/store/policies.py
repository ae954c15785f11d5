"""The file form of a distilled policy."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save as save_tensors

from coala.policies import DistilledPolicy
from coala.store.files import StoreError, file_digest, load_arrays, load_object, read_as, save_json, write_atomic
from coala.store.values import certificate_of, read_spec


def save_policy(folder: Path, policy: DistilledPolicy) -> None:
    """``policy.safetensors`` (left and, if there, right) and ``policy.json`` (all else, the digest of the arrays)."""
    arrays = {"left": policy.left} | ({} if policy.right is None else {"right": policy.right})
    data = save_tensors({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    write_atomic(Path(folder) / "policy.safetensors", data)
    about = {
        "spec": policy.spec,
        "program": policy.program,
        "support": policy.support,
        "ridge": policy.ridge,
        "rank": policy.rank,
        "certificate": policy.certificate,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    save_json(Path(folder) / "policy.json", about)


def load_policy(folder: Path) -> DistilledPolicy:
    """Read a policy; a folder whose two files do not belong together is refused."""
    folder = Path(folder)
    about = load_object(folder / "policy.json", "sha256", "spec", "program", "support", "ridge")
    arrays = folder / "policy.safetensors"
    if not arrays.is_file():
        raise StoreError(f"{folder}: policy.json is there but policy.safetensors is missing. Distil again.")
    if file_digest(arrays) != about["sha256"]:
        raise StoreError(f"{folder}: policy.safetensors is not the file policy.json describes. Distil again.")
    with read_as("the description of a policy", folder / "policy.json"):
        found = load_arrays(arrays)
        return DistilledPolicy(
            found["left"],
            found.get("right"),
            spec=read_spec(about["spec"]),
            program=about["program"],
            support=about["support"],
            ridge=float(about["ridge"]),
            certificate=certificate_of(about.get("certificate")),
        )
