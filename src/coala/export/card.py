"""The card of an exported folder: what the head is, on what it was fitted, how good it is, and how it is loaded.

Counts, digests and estimates only; never a prompt or a reply.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coala.statistics import scores
from coala.store import RunFolder, StoreError, file_digest, load_features
from coala.values import ConvexHead, Estimate, FeatureSpec


@dataclass(frozen=True)
class RunFacts:
    """What a run knows of its head: ``metrics`` on held-out pairs by name, and ``data`` (counts, digests) by name."""

    metrics: dict[str, Estimate] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)


def facts_of(path: Path | str, head: ConvexHead) -> RunFacts:
    """Metrics of ``head`` on the run's held-out features, and the run's pairs counted and digested."""
    run = RunFolder.open(path)
    metrics: dict[str, Estimate] = {}
    data: dict[str, str] = {}
    for part, name in (("train", "fitted on"), ("eval", "held out")):
        file = run.path / f"pairs-{part}.jsonl"
        if file.is_file():
            with file.open("rb") as lines:
                count = sum(1 for line in lines if line.strip())
            data[name] = f"{count} pairs, SHA-256 {file_digest(file)}"
    try:
        held_out = load_features(run.path / "features/eval")
    except StoreError:
        return RunFacts(metrics, data)
    if len(held_out) and held_out.spec.same_features(head.spec):
        margins = head.margins(held_out)
        sure = head.preference(held_out.chosen, held_out.rejected, held_out.prompt)
        metrics["ranking accuracy"] = scores.accuracy_of_margins(margins, held_out.group)
        metrics["log loss (nats per pair)"] = scores.pairwise_nll(margins / head.temperature, held_out.group)
        metrics["calibration error"] = scores.reliability(sure, held_out.group).error
    return RunFacts(metrics, data)


def card(head: ConvexHead, spec: FeatureSpec, form: str, facts: RunFacts | None, difference: float) -> str:
    """README.md of a folder of ``form``; ``spec`` names the model as it may be published."""
    facts = facts or RunFacts()
    base = spec.backbone.partition("+")[0]
    front = ["---", "library_name: transformers", "pipeline_tag: text-classification"]
    front += [f"base_model: {base}"] if spec.revision else []
    front += ["tags:", "- reward-model", "- preference", "- coala", "---"]
    certificate = head.certificate
    gates = f"{head.n_neurons} gates on the {head.gate_on}" if head.n_neurons else "no gates (linear)"
    rows = [
        ("base model", f"{spec.backbone}{f', revision {spec.revision}' if spec.revision else ' (a local folder)'}"),
        ("weights, SHA-256", spec.weights),
        ("rendering", f"`{spec.template}`, replies {'with' if spec.ends_with_eos else 'without'} their stop token"),
        ("features", f"hidden state {spec.layer}, pooling `{spec.pooling}`, d = {head.width}"),
        ("longest row", f"{spec.max_tokens} tokens of prompt and reply; a longer prompt loses tokens on the left"),
        ("head", gates),
        ("temperature", f"{head.temperature:.6g}"),
    ]
    metrics = [f"| {name} | {found} |" for name, found in facts.metrics.items()]
    lines = [
        *front,
        "",
        f"# Preference head on {spec.backbone}",
        "",
        "Scores a reply to a prompt; higher is preferred. The language model is unchanged; the head was fitted to "
        "preference pairs by convex optimisation with COALA.",
        "",
        *rows_of(rows),
        "",
        "## Certificate",
        "",
        "None was saved with the head." if certificate is None else f"{certificate}.",
        *([] if certificate is None else ["", certificate.statement]),
        "",
        "## Held-out pairs",
        "",
        *(["| metric | value, 95 % interval |", "|---|---|", *metrics] if metrics else ["No metrics were recorded."]),
        "",
        "## Data",
        "",
        *([f"- {name}: {what}" for name, what in facts.data.items()] or ["Not recorded."]),
        "",
        "No row of the data is in this folder.",
        "",
        "## Loading",
        "",
        *(_REWARD_MODEL if form == "reward model" else _linear(spec)),
        "",
        "P(first is preferred) = sigmoid((score of the first - score of the second) / temperature).",
        "",
        *uploading(),
        "## Limits",
        "",
        "- A score compares replies to one prompt; scores of different prompts are not on one scale.",
        "- The head knows the preferences of the data above and no others; measure it on yours before use.",
        "- When the folder was written its scores on trial conversations were the head's own up to "
        f"{difference:.1e} of the largest; another dtype, device or version of transformers changes last digits.",
        "- Licence: that of the base model and of the data apply. Name it above before publishing.",
        "",
    ]
    return "\n".join(lines)


def uploading() -> list[str]:
    """How a folder is published by its owner, for every card; nothing here uploads."""
    return ["## Publishing", "", "```sh", "hf upload OWNER/NAME FOLDER .", "```", ""]


def rows_of(rows: list[tuple[str, str]]) -> list[str]:
    """A Markdown table of two columns without a head."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


_REWARD_MODEL = [
    "The folder contains two short Python files (`modeling_coala.py`, `tokenization_coala.py`), because no stock "
    "class has such a head. Loading runs them: read them, then allow it with `trust_remote_code=True`. Weights are "
    "safetensors.",
    "",
    "```python",
    "from transformers import pipeline",
    "",
    'score = pipeline("text-classification", model=FOLDER, trust_remote_code=True)',
    'score({"text": "How do I boil an egg?", "text_pair": "Eight minutes in boiling water."})',
    "```",
    "",
    '`text` is a prompt of one user turn or a list of messages (`{"role": ..., "content": ...}`), `text_pair` the '
    "reply. A list of messages alone ends with the reply. One rendered text alone (`apply_chat_template`) is cut at "
    "the last `tokenizer.reply_marker`; a reply that quotes the marker must be given as `text_pair`.",
]


def _linear(spec: FeatureSpec) -> list[str]:
    chat = spec.template.startswith("chat:")
    text = (
        "tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)"
        if chat
        else '"Human: PROMPT\\n\\nAssistant: REPLY"'
        if spec.template.startswith("dialogue:")
        else "PROMPT + REPLY"
    )
    ending = " + STOP_TOKEN" if spec.ends_with_eos else ""
    special = ", add_special_tokens=False" if chat else ""
    return [
        "A stock sequence classifier with one linear layer `score`; no code is needed. The score is read at the last "
        "token, so the text must end where the reply ends" + (", with its stop token." if ending else "."),
        "",
        "```python",
        "from transformers import AutoTokenizer, pipeline",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        f"text = {text}{ending}",
        'score = pipeline("text-classification", model=FOLDER)',
        f"score(text{special})",
        "```",
        "",
        "The text is tokenised in one piece: where a tokenizer joins the end of the prompt with the start of the "
        "reply, tokens, and scores, differ from those of the fit.",
    ]
