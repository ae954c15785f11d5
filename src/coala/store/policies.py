"""The file form of a distilled policy."""

from __future__ import annotations

from pathlib import Path

from coala.policies import DistilledPolicy
from coala.store.files import StoreError
from coala.store.run import RunFolder
from coala.store.values import certificate_of, described, read_spec, save_described

DISTILLED = "distilled"  # folder of a run


def save_policy(folder: Path, policy: DistilledPolicy) -> None:
    """``policy.safetensors`` (left and, if there, right) and ``policy.json`` (all else, the digest of the arrays)."""
    names = ("spec", "program", "support", "ridge", "rank", "certificate")
    arrays = {"left": policy.left} | ({} if policy.right is None else {"right": policy.right})
    save_described(folder, "policy", arrays, {name: getattr(policy, name) for name in names})


def run_policy(run: RunFolder) -> DistilledPolicy:
    """What a run's guidance was distilled into; StoreError for a run that was not distilled."""
    folder = run.path / DISTILLED
    if not (folder / "policy.json").is_file():
        raise StoreError(
            f"{run.path}: found no distilled policy; expected {folder / 'policy.json'}. Fix: coala distil {run.path}"
        )
    return load_policy(folder)


def load_policy(folder: Path) -> DistilledPolicy:
    """Read a policy; a folder whose two files do not belong together is refused."""
    with described(folder, "policy", "Distil again.", "program", "support", "ridge") as (about, arrays):
        return DistilledPolicy(
            arrays["left"],
            arrays.get("right"),
            spec=read_spec(about["spec"]),
            program=about["program"],
            support=about["support"],
            ridge=float(about["ridge"]),
            certificate=certificate_of(about.get("certificate")),
        )
