"""What a distilled policy does to text: its replies to a run's held-out prompts, against unguided ones.

FOLDER/measured.json beside the policy, with the digest of the weights that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coala.alignment import load_parts
from coala.alignment.judges import judge_name, open_judge
from coala.alignment.replies import rows_at_once, unguided_replies
from coala.alignment.talking import settled
from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.decoding import Guidance, generate, generate_distilled
from coala.decoding.adapted import generate_adapted, load_adapted
from coala.evaluation import judge_many, win_rate
from coala.policies import DistilledAdapter, DistilledPolicy
from coala.recipe import recipe_of
from coala.statistics.intervals import mean_estimate
from coala.statistics.scores import perplexity
from coala.store import RunFolder, file_digest, load_pairs, save_json
from coala.values import CoalaError, Estimate, Generation, Turn, one_per_prompt, prompt_id


@dataclass(frozen=True)
class Measured:
    """Of one reply to each of ``n`` held-out prompts, against as many unguided ones.

    ``wins`` by the run's judge, None where it names none. ``divergence`` is the exact KL(policy || base) of a reply in
    nats, over the whole vocabulary at temperature 1. Perplexities are the base model's.
    """

    n: int
    judge: str
    wins: Estimate | None
    divergence: Estimate
    perplexity: Estimate
    unguided_perplexity: Estimate
    sampling: dict[str, float]
    weights: str

    @property
    def perplexity_ratio(self) -> float:
        """The base model's perplexity of the policy's replies over that of unguided ones."""
        return self.perplexity.value / self.unguided_perplexity.value

    def summary_rows(self) -> list[list[str]]:
        """What a table says of it."""
        wins = "not known: the run names no judge (align with --judge)"
        if self.wins is not None:
            wins = f"{self.wins} against unguided replies, by {self.judge}"
        return [
            ["wins", wins],
            ["divergence", f"{self.divergence} nats a reply"],
            ["perplexity", f"{self.perplexity_ratio:.2f} of unguided replies' ({self.n} replies each)"],
        ]


def measure(
    path: Path | str,
    policy: DistilledPolicy | DistilledAdapter,
    *,
    on_progress: OnProgress = silent,
    on_note: OnNote = quiet,
    trust_remote_code: bool = False,
    download: bool = False,
) -> Measured:
    """Sample ``policy``, distilled of the run ``path``, on its held-out prompts; written beside the policy.

    The first ``evaluation.prompts`` are answered, none of which was fitted on, at the temperature, top-k and top-p that
    the teacher sampled with; by an adapter at temperature 1, at which it learnt the teacher's texts. The unguided
    replies are the run's own, with the same noise, or written as those were; ``on_note`` hears which.
    """
    run = RunFolder.open(path)
    recipe = recipe_of(run.settings, run.path / "run.json")
    settings = recipe.evaluation
    pairs = one_per_prompt(load_pairs(run.path / "pairs-eval.jsonl"))[: settings.prompts]
    if not pairs:
        raise CoalaError("Found no held-out prompt to answer. Fix: align with --prompts 50 and pairs held out.")
    prompts = [pair.prompt for pair in pairs]
    backbone, _, guidance = load_parts(run.path, trust_remote_code=trust_remote_code, download=download)
    guidance, temperature = settled(run.path, backbone, guidance, {})
    sampling = {"temperature": temperature, "top_k": guidance.top_k, "top_p": guidance.top_p}
    common: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": temperature,
        "prompt_ids": [prompt_id(prompt) for prompt in prompts],
        "batch_size": rows_at_once(backbone),
    }
    restricted: dict[str, Any] = {"top_k": guidance.top_k, "top_p": guidance.top_p}
    on_progress("measure", 0, 3, "unguided replies")
    plain = unguided_replies(run, recipe)
    if plain is None:
        on_note("unguided replies: generated now, because the run has none of this model, prompts, sampling and seed")
        plain = generate(prompts, backbone, None, Guidance.unguided(**restricted), seed=recipe.seed, **common)
    else:
        on_note(f"unguided replies: the run's own {len(plain)}, in generations-unguided.jsonl")
    on_progress("measure", 1, 3, "the policy's replies")
    if isinstance(policy, DistilledPolicy):
        ours = generate_distilled(prompts, backbone, policy, seed=recipe.seed, **restricted, **common)
        file = run.path / "distilled" / "policy.safetensors"
    else:
        common["temperature"] = sampling["temperature"] = policy.facts["temperature"]
        options: dict[str, Any] = {"device": str(backbone.device), "dtype": str(backbone.dtype).removeprefix("torch.")}
        del backbone  # the adapted model has its weights too
        model = load_adapted(policy, trust_remote_code=trust_remote_code, **options)
        ours = generate_adapted(prompts, model, seed=recipe.seed, **restricted, **common)
        file = policy.folder / "adapter_model.safetensors"
    on_progress("measure", 2, 3, "verdicts")
    by_id = dict(zip(common["prompt_ids"], prompts, strict=True))
    wins = wins_of(ours, plain, settings.judge, by_id, on_note=on_note)
    on_progress("measure", 3, 3)
    return keep_measured(file, ours, plain, settings.judge, wins, sampling)


def wins_of(
    ours: Sequence[Generation],
    plain: Sequence[Generation],
    judge: str | None,
    prompts: Mapping[str, tuple[Turn, ...]],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_note: OnNote = quiet,
) -> Estimate | None:
    """Win rate of replies against unguided ones by the run's ``judge``; None where it names none."""
    if judge is None:
        return None
    found = judge_many(
        ours,
        plain,
        open_judge(judge),
        prompts=prompts,
        on_progress=on_progress,
        on_failure=lambda prompt, error: on_note(f"no verdict on prompt {prompt}: {error}"),
    )
    return win_rate(found.judgements, of=ours[0].method)


def keep_measured(
    file: Path,
    ours: Sequence[Generation],
    plain: Sequence[Generation],
    judge: str | None,
    wins: Estimate | None,
    sampling: dict[str, float],
) -> Measured:
    """What replies of the policy in ``file`` are beside unguided ones to the same prompts, written beside it."""
    measured = Measured(
        len(ours),
        "" if judge is None else judge_name(judge)[0],
        wins,
        mean_estimate([one.divergence or 0.0 for one in ours]),
        perplexity([one.log_prob for one in ours], [one.n_tokens for one in ours]),
        perplexity([one.log_prob for one in plain], [one.n_tokens for one in plain]),
        sampling,
        file_digest(file),
    )
    save_json(file.parent / "measured.json", {**asdict(measured), "perplexity_ratio": measured.perplexity_ratio})
    return measured
