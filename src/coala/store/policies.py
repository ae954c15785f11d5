"""The file form of a distilled policy."""

from __future__ import annotations

from pathlib import Path

from coala.policies import DistilledPolicy
from coala.store.files import MisfitError
from coala.store.values import certificate_of, described, read_spec, save_described


def save_policy(folder: Path, policy: DistilledPolicy) -> None:
    """``policy.safetensors`` (left and, if there, right) and ``policy.json`` (all else, the digest of the arrays)."""
    names = ("spec", "program", "support", "ridge", "rank", "certificate")
    arrays = {"left": policy.left} | ({} if policy.right is None else {"right": policy.right})
    save_described(folder, "policy", arrays, {name: getattr(policy, name) for name in names})


def load_policy(folder: Path) -> DistilledPolicy:
    """Read a policy; a folder whose two files do not belong together is refused."""
    with described(folder, "policy", "Distil again.", "program", "support", "ridge", "rank") as (about, arrays):
        if about["rank"] != arrays["left"].shape[1]:
            raise MisfitError(
                f"{folder}: found a policy of rank {str(about['rank'])[:20]} with {arrays['left'].shape[1]} columns, "
                "expected as many, fix: distil again."
            )
        return DistilledPolicy(
            arrays["left"],
            arrays.get("right"),
            spec=read_spec(about["spec"]),
            program=about["program"],
            support=about["support"],
            ridge=float(about["ridge"]),
            certificate=certificate_of(about.get("certificate")),
        )
