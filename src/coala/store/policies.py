"""The file forms of distilled policies: a change of the output layer, and an adapter."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from coala.policies import DistilledAdapter, DistilledPolicy
from coala.store.files import (
    MisfitError,
    StoreError,
    file_digest,
    load_json,
    load_object,
    read_as,
    save_json,
    write_atomic,
)
from coala.store.run import RunFolder
from coala.store.values import certificate_of, described, read_spec, save_described

DISTILLED = "distilled"  # folder of a run
PEFT = ("adapter_model.safetensors", "adapter_config.json")


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


def save_adapter(folder: Path, adapter: DistilledAdapter) -> DistilledAdapter:
    """peft's two files, copied from where the adapter lies, and ``adapter.json``: all else, and both digests."""
    tensors, config = (adapter.folder / name for name in PEFT)
    write_atomic(folder / PEFT[0], tensors.read_bytes())
    # The model as the run names it: training may have begun from a copy of its weights.
    save_json(folder / PEFT[1], {**load_json(config), "base_model_name_or_path": adapter.spec.backbone})
    about = {one.name: getattr(adapter, one.name) for one in fields(adapter) if one.name != "folder"}
    save_json(folder / "adapter.json", {**about, "sha256": {name: file_digest(folder / name) for name in PEFT}})
    return replace(adapter, folder=folder)


def load_adapter(folder: Path) -> DistilledAdapter:
    """Read an adapter; a folder whose files do not belong together is refused."""
    path = folder / "adapter.json"
    names = [one.name for one in fields(DistilledAdapter) if one.name != "folder"]
    about = load_object(path, "sha256", *names)
    with read_as("the description of an adapter", path):
        for name, wanted in about["sha256"].items():
            if not (folder / name).is_file() or file_digest(folder / name) != wanted:
                raise StoreError(f"{folder}: {name} is not the file adapter.json describes. Distil again.")
        values = {name: about[name] for name in names}
        return DistilledAdapter(
            folder, **{**values, "spec": read_spec(about["spec"]), "trials": tuple(about["trials"])}
        )
