"""The card of an exported policy: what was changed and how, what is proved of it and what not, how it is served.

Counts, digests and estimates only; never a prompt or a reply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from coala.backbone.files import WHEEL
from coala.export.card import rows_of, uploading
from coala.export.folder import MANIFEST, public_spec
from coala.policies import DistilledAdapter, DistilledPolicy
from coala.store import digest, file_digest, load_json, save_json, write_atomic

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

Form = Literal["checkpoint", "gguf", "lora", "gguf-lora", "merged"]
Policy = DistilledPolicy | DistilledAdapter
UNKNOWN = "not stated in the model's files: look it up before publishing"
_WAYS = {
    "guided": "replies guided by a preference head, block by block",
    "weighted": "the training pairs' own replies, weighted by the head's score",
    "shift": "the distributions of a decoder that a preference head shifted, token by token",
}


@dataclass(frozen=True)
class PolicyFacts:
    """What a run knows of its policy: how the teacher sampled, what was counted, and what was measured, if it was."""

    guidance: str = ""
    sampling: dict[str, float] = field(default_factory=lambda: {"temperature": 1.0, "top_k": 50, "top_p": 0.9})
    n_replies: int | None = None
    flops: Mapping[str, int] = field(default_factory=dict)
    measured: Mapping[str, Any] | None = None
    held_out: Mapping[str, Any] | None = None


def policy_facts(run: Path | str, policy: Policy) -> PolicyFacts:
    """The facts of the policy that was distilled last in the run's folder; measurements of other weights are none."""
    if isinstance(policy, DistilledAdapter):
        folder, weights, about = policy.folder, "adapter_model.safetensors", dict(policy.facts)
    else:
        folder, weights = Path(run) / "distilled", "policy.safetensors"
        about = load_json(folder / "path.json") if (folder / "path.json").is_file() else {}
    measured = load_json(folder / "measured.json") if (folder / "measured.json").is_file() else None
    if measured is not None and measured["weights"] != file_digest(folder / weights):
        measured = None
    usual = PolicyFacts()
    sampling = {"temperature": about.get("temperature", 1.0), **about.get("sampling", {})}
    return PolicyFacts(
        about.get("guidance", ""),
        {**usual.sampling, **sampling},
        about.get("n_replies"),
        about.get("flops", {}),
        measured,
        about.get("held_out") if isinstance(policy, DistilledPolicy) else None,
    )


def licence_of(name: str, revision: str = "") -> str:
    """The licence that the files of a model name: its card's front matter, or a GGUF file's header."""
    from coala.backbone import BackboneError
    from coala.backbone.files import find
    from coala.backbone.gguf import is_gguf

    try:
        place = find(name.partition("+")[0], revision or None, download=False)[0]
    except BackboneError:
        return UNKNOWN
    if is_gguf(place):
        import gguf

        field_ = gguf.GGUFReader(place).fields.get("general.license")
        return str(field_.contents()) if field_ is not None else UNKNOWN
    card = place / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
    if lines[:1] == ["---"]:
        for line in lines[1:]:
            if line == "---":
                break
            name, _, value = line.partition(":")
            if name.strip() in ("license", "licence") and value.strip():
                return value.strip()
    return UNKNOWN


def checked(probes: int, difference: float) -> str:
    """How an export was compared with its policy."""
    if not probes:
        return "tensors were compared, log-probabilities not, because transformers did not load the file"
    return (
        f"loaded by transformers: log-probabilities after {probes} prompts differ from the policy's by at most "
        f"{difference:.1e} nats; another dtype, device or engine changes the last digits"
    )


def policy_card(policy: Policy, backbone: LanguageModel, form: Form, facts: PolicyFacts, checked: str) -> str:
    """The card of ``policy`` in ``form``; ``checked`` says how it was compared with the policy."""
    spec, licence = public_spec(policy.spec), licence_of(backbone.name, backbone.revision)
    base = spec.backbone.partition("+")[0]
    front = ["---", "pipeline_tag: text-generation"]
    library = {"lora": "peft", "checkpoint": "transformers", "merged": "transformers"}.get(form)
    front += [f"library_name: {library}"] if library else []
    front += [f"base_model: {base}"] if spec.revision else []
    front += [f"license: {licence}"] if licence != UNKNOWN else []
    front += ["tags:", "- preference", "- distillation", "- coala", "---"]
    local = "" if spec.backbone.startswith(WHEEL) else " (a local folder)"
    rows = [
        ("base model", f"{spec.backbone}{f', revision {spec.revision}' if spec.revision else local}"),
        ("weights, SHA-256", spec.weights),
        *([("change, SHA-256", digest(policy.change))] if isinstance(policy, DistilledPolicy) else []),
        ("licence of the base model", licence),
        ("teacher", _teacher(policy, facts)),
        *_vehicle(policy),
        *(
            [("held-out loss", f"{_told(facts.held_out)}; nats a token from no change, at strength 1")]
            if facts.held_out
            else []
        ),
        ("fitted at", ", ".join(f"{name} {value:g}" for name, value in facts.sampling.items())),
        ("cost", _cost(policy, facts.flops)),
    ]
    lines = [
        *front,
        "",
        f"# {spec.backbone}, with preferences distilled into it",
        "",
        _what(policy),
        "",
        *rows_of(rows),
        "",
        "## Certificate",
        "",
        *_certificate(policy),
        "",
        "## Measured",
        "",
        *_measured(facts),
        "",
        "## Serving",
        "",
        *_serving(form, facts.sampling),
        "",
        *uploading(),
        "## Limits",
        "",
        "- It prefers what the teacher's head preferred on the data the head was fitted to, and no more: measure it "
        "on yours before use.",
        "- No row of that data is in these files.",
        f"- {checked}",
        "- Licence: that of the base model and of the data apply. Name it above before publishing.",
        "",
    ]
    return "\n".join(lines)


def merged_card(base: str, adapter: Path, rank: int, checked: str) -> str:
    """The card of any adapter merged into ``base``: what is known of it, which is little."""
    licence, name = licence_of(base), Path(base).name if Path(base).exists() else base
    rows = [
        ("base model", name),
        ("licence of the base model", licence),
        ("adapter", f"LoRA of rank {rank}, SHA-256 {file_digest(adapter / 'adapter_model.safetensors')}"),
    ]
    front = ["---", "pipeline_tag: text-generation", "library_name: transformers"]
    front += [f"license: {licence}"] if licence != UNKNOWN else []
    lines = [
        *front,
        "---",
        "",
        f"# {name}, with an adapter merged into it",
        "",
        "Every tensor that the adapter does not change is the base model's, byte for byte.",
        "",
        *rows_of(rows),
        "",
        "How the adapter was trained, and what it does, is not in its files: say so here before publishing.",
        "",
        "## Serving",
        "",
        *_folder(""),
        "",
        *uploading(),
        "## Limits",
        "",
        f"- {checked}",
        "- Licence: that of the base model and of the adapter's data apply.",
        "",
    ]
    return "\n".join(lines)


def _what(policy: Policy) -> str:
    if isinstance(policy, DistilledPolicy):
        return (
            "The output layer of a frozen language model, changed by one convex program: logits are W (h + A h) "
            "instead of W h. Every other weight is the base "
            "model's. One forward pass per token, no head, no code."
        )
    return (
        "A language model with a LoRA adapter of its layers, trained by supervised fine-tuning (TRL) on replies that "
        "the model itself wrote under the guidance of a preference head. One forward a token, no head, no code."
    )


def _teacher(policy: Policy, facts: PolicyFacts) -> str:
    told = f"`{policy.program}`: {_WAYS[policy.program]}"
    if policy.program == "weighted":  # unguided, several to a prompt
        return told + (f"; to {facts.n_replies} prompts" if facts.n_replies else "")
    told += f" ({facts.guidance})" if facts.guidance else ""
    return told + (f"; {facts.n_replies} replies" if facts.n_replies else "")


def _vehicle(policy: Policy) -> list[tuple[str, str]]:
    if isinstance(policy, DistilledPolicy):
        support = {
            "nucleus": "`nucleus`: each step normalised over the tokens that top-k and top-p left of the base model",
            "vocabulary": "`vocabulary`: each step normalised over all tokens, which also sharpens the model",
        }
        return [
            ("program", "likelihood of the teacher over the changes A of the output layer, with a ridge; convex"),
            ("support", support[policy.support]),
            ("ridge", f"{policy.ridge:.3g}"),
            ("rank", f"{policy.rank} of {policy.width}"),
        ]
    row = policy.kept
    rates = ", ".join(f"{rate:g}" for rate in sorted({one["rate"] for one in policy.trials}))
    return [
        ("program", f"SFT of a LoRA adapter of rank {policy.rank}, loss on replies only; not convex"),
        ("learning rate", f"{policy.rate:g}, the best of {rates} on {policy.facts['n_held_out']} replies held out"),
        ("epoch", f"{policy.epoch} of {policy.facts['epochs']}, the best there"),
        (
            "held-out loss",
            f"{row['held_out']:+.4f} nats per token (standard error {row['se']:.4f}) from the base model's",
        ),
    ]


def _certificate(policy: Policy) -> list[str]:
    if isinstance(policy, DistilledAdapter):
        return ["None: the training is not convex, so its distance to the best adapter is unknown."]
    if policy.certificate is None:
        return ["None was saved with the policy, or it was scaled since."]
    found = policy.certificate
    return [
        f"{found.statement} The gap is {found.gap:.3g} nats per token.",
        "",
        "It does not say that replies are better, nor that they win: only that no other change of the output layer "
        "lowers this objective, on these replies of the teacher, by more than the gap. For the quality of replies see "
        "the measurements below and your own.",
    ]


def _measured(facts: PolicyFacts) -> list[str]:
    if facts.measured is None:
        return ["Not measured by the run. `coala distil RUN --measure` measures it on held-out prompts."]
    found = facts.measured
    wins = "not known: the run names no judge"
    if found["wins"] is not None:
        wins = f"{_told(found['wins'])}, by {found['judge']}"
    ratio = found["perplexity_ratio"]
    return [
        *rows_of(
            [
                ("wins against unguided replies", wins),
                ("KL(policy, base) per reply, nats", _told(found["divergence"])),
                ("perplexity under the base model, over unguided replies'", f"{ratio:.2f}"),
            ]
        ),
        "",
        f"One reply to each of {found['n']} held-out prompts and as many independent unguided ones; 95 % intervals.",
    ]


def _told(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return f"none ({estimate['method']})"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}], n = {estimate['n']}"


def _cost(policy: Policy, flops: Mapping[str, int]) -> str:
    if not flops:
        return "not counted"
    own = sum(value for name, value in flops.items() if name != "dpo_sweep")
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in flops.items() if name != "dpo_sweep")
    share = ""
    if flops.get("dpo_sweep"):
        share = f"; {own / flops['dpo_sweep']:.2g} of four learning rates of DPO by adapters on the same pairs"
    left = isinstance(policy, DistilledPolicy) and "solver" not in flops
    return f"{own:.3g} FLOPs by formula ({parts}){share}{'; without the solver, which is not counted' if left else ''}"


def gguf_commands(file: str, sampling: Mapping[str, float], name: str = "NAME") -> tuple[str, str]:
    """How llama.cpp and Ollama, which calls it ``name``, serve the GGUF ``file`` as it was fitted."""
    flags = f"--temp {sampling['temperature']:g} --top-k {sampling['top_k']:g} --top-p {sampling['top_p']:g} --min-p 0"
    made = quote(str(Path(file).with_suffix(".Modelfile")))
    return (
        f"llama-server -m {quote(file)} {flags}",
        f"ollama create {quote(name)} -f {made} && ollama run {quote(name)}",
    )


def _serving(form: Form, sampling: Mapping[str, float]) -> list[str]:
    settings = ", ".join(f"{name}={value:g}" for name, value in sampling.items())
    told = f"Sample at {settings}, as fitted; another temperature gives another policy."
    if form == "gguf":
        llama, ollama = gguf_commands("FILE.gguf", sampling)
        return [
            "```sh",
            f"{llama}                # llama.cpp",
            f"{ollama}   # Ollama: the Modelfile next to the file",
            "```",
            "",
            told,
        ]
    if form == "gguf-lora":
        return [
            "```sh",
            "llama-server -m BASE.gguf --lora adapter.gguf   # llama.cpp; BASE.gguf is base.gguf where that is here",
            "```",
            "",
            'A request says how much of the change it wants: `"lora": [{"id": 0, "scale": 0.5}]`. ' + told,
        ]
    if form == "lora":
        return [
            "```python",
            "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)   # peft",
            "```",
            "",
            "```sh",
            "vllm serve BASE --enable-lora --lora-modules preferred=FOLDER",
            "```",
            "",
            "Not every engine applies an adapter to every layer, and some ignore one silently: compare "
            f"log-probabilities once it is loaded. {told}",
        ]
    return _folder(told)


def _folder(told: str) -> list[str]:
    return [
        "```python",
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)   # transformers",
        "```",
        "",
        "```sh",
        "vllm serve FOLDER                                      # vLLM; SGLang takes the folder likewise",
        "```",
        *(["", told] if told else []),
    ]


def describe(
    work: Path, policy: Policy, form: Form, backbone: LanguageModel, facts: PolicyFacts | None, checked: str
) -> None:
    """Write the manifest of ``work``, and the card, which may be edited."""
    own = ("program", "support", "ridge", "rank", "certificate", "rate", "epoch")
    files = {p.name: file_digest(p) for p in sorted(work.iterdir()) if p.is_file()}
    about = {name: getattr(policy, name) for name in own if hasattr(policy, name)}
    if isinstance(policy, DistilledPolicy):
        about["policy"] = digest(policy.change)
    save_json(work / MANIFEST, {"form": f"distilled {form}", **about, "weights": backbone.weights, "files": files})
    write_atomic(work / "README.md", policy_card(policy, backbone, form, facts or PolicyFacts(), checked))
