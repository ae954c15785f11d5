"""A plan in words: a few lines for the start of a run, or the whole as a table."""

from __future__ import annotations

from coala.costs import work_over_bound
from coala.plan.distilling import DistilPlan
from coala.plan.memory import OTHERS, size
from coala.plan.plan import RunPlan
from coala.values import Estimate

# What a run does; the other counts are what it is compared with.
DONE = ("layer", "extraction", "fit", "replies")
_KEYS = {"device memory": "device", "memory": "host"}


def first_lines(plan: RunPlan) -> list[str]:
    """The plan in a few lines, for the start of a run."""
    tokens, flops = plan.tokens, plan.flops
    share = tokens["computed"] / tokens["pair_by_pair"] if tokens["pair_by_pair"] else 1.0
    lines = [
        f"{plan.pairs:,} pairs, {plan.rows:,} distinct rows: {tokens['computed']:,} tokens to encode, {share:.2f} of a "
        f"loop over pairs ({plan.counted})",
        f"{operations(sum(flops[name] for name in DONE if name in flops))}, "
        f"{operations(flops['extraction'])} of it for features",
    ]
    if plan.seconds is not None:
        lines[-1] += f": {interval(plan.seconds)}"
    for name, stages in (("device memory", plan.device_bytes), ("memory", plan.host_bytes)):
        if stages:
            lines.append(
                f"{name}: {_of(max(sum(parts.values()) for parts in stages.values()), plan.room[_KEYS[name]])}"
            )
            if OTHERS in stages["extraction"]:
                lines[-1] += (
                    f"; {plan.workers} workers need up to {size(sum(stages['extraction'].values()))} to extract, "
                    f"{size(stages['extraction'][OTHERS] // (plan.workers - 1))} each"
                )
    lines.append(f"disk: {_of(sum(plan.disk_bytes.values()), plan.room['disk'])}")
    return lines + [f"short: {shortage}" for shortage in plan.shortages]


def table_rows(plan: RunPlan) -> list[tuple[str, str]]:
    """The whole plan as two columns."""
    quantised = f", {plan.quantise}" if plan.quantise else ""
    rows = [
        ("model", f"{plan.model}: {plan.parameters:,} parameters, {plan.layers} layers read"),
        ("runs on", f"{plan.device} in {plan.dtype}{quantised}"),
        ("pairs", f"{plan.pairs:,} ({plan.train:,} to train on), {plan.rows:,} distinct rows"),
        ("tokens", f"{plan.tokens['computed']:,} computed; longest row {plan.longest_row:,}"),
        ("  counted", plan.counted),
        ("  distinct", f"{plan.tokens['distinct']:,}, the minimum possible"),
        ("  pair by pair", f"{plan.tokens['pair_by_pair']:,} in a loop without sharing"),
        ("FLOPs", operations(sum(plan.flops[name] for name in DONE if name in plan.flops))),
    ]
    over = work_over_bound(plan.flops["extraction"], plan.flops["least"])
    told = {
        "extraction": f" ({over:.2f} of the lower bound; {operations(plan.flops['pair_by_pair'])} pair by pair)",
        "fit": " at most, for the usual number of solver steps",
        "replies": " at most",
    }
    rows += [(f"  {name}", operations(plan.flops[name]) + told.get(name, "")) for name in DONE if name in plan.flops]
    by_one = " by one process" if plan.workers > 1 else ""
    if plan.seconds:
        rows.append(("time", "without loading the model, the fit and judging"))
        rows.append(("  extraction", interval(plan.seconds) + by_one))
        if plan.reply_seconds is not None:
            rows.append(("  replies", f"up to about {_lasting(plan.reply_seconds)}, if all reach their full length"))
        rows.append(("  probe", plan.probe))
    else:
        rows.append(("time", plan.probe))
    for name, stages in (("device memory", plan.device_bytes), ("memory", plan.host_bytes)):
        room = plan.room[_KEYS[name]]
        for stage, parts in stages.items():
            rows.append((f"{name}, {stage}", _of(sum(parts.values()), room)))
            rows += [(f"  {part}", size(number)) for part, number in parts.items() if number]
    rows.append(("disk", _of(sum(plan.disk_bytes.values()), plan.room["disk"])))
    rows += [(f"  {part}", size(number)) for part, number in plan.disk_bytes.items() if number]
    return rows + ([] if plan.distil is None else _distil_rows(plan.distil))


_VEHICLES = {"output": "  --into output", "adapter": "  --into adapter", "dpo": "  for comparison, DPO at 4 rates"}


def _distil_rows(plan: DistilPlan) -> list[tuple[str, str]]:
    """A row for each vehicle, and DPO's sweep."""
    rows = [("distil", f"{plan.replies:,} replies of {plan.reply_tokens:,} tokens, at most; steps as they usually go")]
    for vehicle, parts in plan.flops.items():
        told = ", ".join(f"{name.replace('_', ' ')} {operations(flops)}" for name, flops in parts.items())
        needed = max(plan.bytes[vehicle].values())
        rows.append((_VEHICLES[vehicle], f"{operations(sum(parts.values()))} ({told}); up to {size(needed)}"))
    return rows


def _of(needed: int, there: int | None) -> str:
    return f"up to {size(needed)} of {'an unknown amount' if there is None else size(there)}"


def operations(flops: int) -> str:
    """FLOPs in the unit that suits them."""
    for power, name in ((18, "EFLOP"), (15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if flops >= 10**power:
            return f"{flops / 10**power:,.1f} {name}"
    return f"{flops / 1e6:,.1f} MFLOP"


def interval(seconds: Estimate) -> str:
    """A duration with its interval."""
    ends = f"[{_lasting(seconds.low)}, {_lasting(seconds.high)}]"
    return f"about {_lasting(seconds.value)} {ends} from {seconds.n} batch{'' if seconds.n == 1 else 'es'}"


def _lasting(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
