"""Oracles by the names that `coala comal` knows them by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.comal.inputs import kind_of_run

if TYPE_CHECKING:
    from coala.comal.oracles import Example, PreferenceOracle

ORACLES = """
\b
Values of --oracle:
  rule:NAME[:TEXT]      longer, shorter, varied, json, contains:TEXT, regex:PATTERN; the higher value wins
  words:FILE.json       word weights (as in `coala demo`): Bradley-Terry
  scores:FILE.py:NAME   your function NAME(example, answer), a number: Bradley-Terry
  python:FILE.py:NAME   your function NAME(example, a, b), P(a beats b) or None; or an oracle object
  majority:A+B+C        majority vote of several oracles; may be cyclic
  reward:FOLDER         a reward model (a sequence classifier with one label): Bradley-Terry
  judge:MODEL[:NAME]    a language model that sees both answers, in both orders (NAME: judge instructions)
  table:FILE.json       a known game, in the format of `coala comal game`
  head[:RUN]            an antisymmetric head on pairs of hidden states, fitted to the pairs of a COALA run
  convex-head[:RUN]     the run's own head: Bradley-Terry

A Bradley-Terry oracle scores answers one by one and has no cycles: its Nash policy is the answer with the best score.
python: and scores: execute the code in FILE.
"""
LOADED = ("reward", "judge", "head", "convex-head")  # need a model in memory


@dataclass(frozen=True)
class Named:
    """An oracle, whether its verdicts are worth keeping, and what is to be told of it."""

    oracle: PreferenceOracle
    kept: bool
    remarks: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def check_oracle(spec: str) -> None:
    """Refuse what is wrong with an oracle's name as far as can be seen without loading a model."""
    from coala.values import CoalaError

    kind, _, rest = spec.partition(":")
    if kind in LOADED:
        if kind in ("head", "convex-head") and (not rest or kind_of_run(Path(rest).expanduser()) != "coala"):
            raise CoalaError(f"--oracle {spec!r}: name a run of `coala align`, as in {kind}:RUN.")
    elif kind == "majority":
        for voter in rest.split("+"):
            check_oracle(voter)
    else:
        oracle_of(spec)


def oracle_of(spec: str, run: Path | None = None, *, device: str = "auto") -> Named:
    """The oracle a name stands for; ``run`` is the COALA run that ``head`` means when it names none."""
    from coala.values import CoalaError

    kind, _, rest = spec.partition(":")
    makers: dict[str, Callable[[], Named]] = {
        "rule": lambda: _rule(rest),
        "words": lambda: _words(rest),
        "scores": lambda: _scores(rest),
        "python": lambda: _python(rest),
        "majority": lambda: _majority(rest, run, device),
        "reward": lambda: _reward(rest, device),
        "judge": lambda: _judge(rest, device),
        "table": lambda: _table(rest),
        "head": lambda: _head(rest, run, pairwise=True),
        "convex-head": lambda: _head(rest, run, pairwise=False),
    }
    if kind not in makers:
        raise CoalaError(f"--oracle {spec!r}: found oracle {kind!r}; expected one of {', '.join(makers)}.")
    if not rest and kind not in ("head", "convex-head"):
        raise CoalaError(f"--oracle {spec!r}: {kind} needs a value after the colon; see --help.")
    return makers[kind]()


def _rule(text: str) -> Named:
    from coala.comal.oracles import Oracle, from_judge
    from coala.evaluation import RuleJudge

    oracle = from_judge(RuleJudge.parse(text))
    # A rule compares two numbers: the other order says the same.
    return Named(Oracle(oracle.function, oracle.name, antisymmetric=True), kept=False)


def _words(file: str) -> Named:
    from coala.comal.oracles import from_scores
    from coala.evaluation import WordJudge
    from coala.store import digest

    judge = WordJudge.load(file)
    name = f"words {judge.name} {digest(dict(judge.weights), judge.bias, judge.pattern)[:12]}"
    return Named(from_scores(lambda _, answers: [judge.score(answer) for answer in answers], name), kept=False)


def _scores(target: str) -> Named:
    from coala.comal.oracles import from_scores

    function, name = _attribute(target)

    def score(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        return [
            float(_called(function, name, example, answer)) for example, answer in zip(examples, answers, strict=True)
        ]

    return Named(from_scores(score, f"scores {name}"), kept=False)


def _python(target: str) -> Named:
    from coala.comal.oracles import from_callable

    found, name = _attribute(target)
    if hasattr(found, "antisymmetric") and hasattr(found, "name"):
        return Named(found, kept=True)
    return Named(from_callable(lambda example, a, b: _called(found, name, example, a, b), f"python {name}"), kept=True)


def _called(function: Callable[..., Any], name: str, *given: Any) -> Any:
    from coala.values import CoalaError

    try:
        return function(*given)
    except Exception as error:
        raise CoalaError(
            f"{name} raised {type(error).__name__}: {error}. Fix: correct it, or return None if it has no verdict. A "
            "changed file is a new oracle: use --restart or another --out; verdicts of the old one are not used."
        ) from error


def _attribute(target: str) -> tuple[Any, str]:
    """What FILE.py:NAME names, and a name that changes with the file's content."""
    from importlib.util import module_from_spec, spec_from_file_location

    from coala.store import file_digest
    from coala.values import CoalaError

    file, _, attribute = target.rpartition(":")
    path = Path(file).expanduser()
    if not file or path.suffix != ".py" or not attribute:
        raise CoalaError(f"{target!r}: expected FILE.py:NAME, a Python file and a function in it.")
    if not path.is_file():
        raise CoalaError(f"{path}: found no such file. Fix: check the path.")
    spec = spec_from_file_location(f"coala_oracle_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CoalaError(
            f"{path}: could not be run ({type(error).__name__}: {error}). Fix: correct the file."
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        known = ", ".join(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise CoalaError(f"{path}: has no function {attribute!r}; it has {known or 'none'}.")
    # A verdict of an older version of the file must not be taken for one of this.
    return found, f"{path.name}:{attribute} {file_digest(path)[:12]}"


def _majority(specs: str, run: Path | None, device: str) -> Named:
    from coala.comal.oracles import from_majority

    voters = [oracle_of(spec, run, device=device) for spec in specs.split("+")]
    name = "majority of " + " + ".join(voter.oracle.name for voter in voters)
    return Named(
        from_majority([voter.oracle for voter in voters], name),
        any(voter.kept for voter in voters),
        tuple(remark for voter in voters for remark in voter.remarks),
        {key: value for voter in voters for key, value in voter.facts.items()},
    )


def _table(file: str) -> Named:
    from coala.comal.oracles import from_table
    from coala.nash import load_game
    from coala.store import digest

    game, _ = load_game(Path(file))
    name = f"table {digest(*game.matrices, [list(names) for names in game.names], list(game.prompts))[:12]}"
    return Named(from_table(game, name), kept=False)


def _reward(folder: str, device: str) -> Named:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from coala.backbone.files import check_files, weights_digest
    from coala.backbone.kinds import brief, refuse_foreign_code
    from coala.backbone.silence import quiet
    from coala.comal.model_oracles import from_reward_model
    from coala.permission import permission
    from coala.values import CoalaError

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CoalaError(f"{folder}: there is no such folder; a reward model is a folder with config.json and weights.")
    refuse_foreign_code(check_files(path), folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": permission().code}
    try:
        with quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # transformers raises whatever its models do
        raise CoalaError(f"{folder}: cannot be loaded as a reward model ({brief(error)}).") from error
    if info["missing_keys"]:
        raise CoalaError(
            f"{folder}: is not a reward model; {', '.join(sorted(info['missing_keys'])[:3])} would be random. Fix: "
            "pass a sequence classifier with one label, or --oracle head for a COALA run."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"reward {path.name} {weights_digest(path)[:12]}"
    return Named(from_reward_model(model.to(device).eval(), tokenizer, name), kept=True)


def _judge(rest: str, device: str) -> Named:
    from coala.backbone import load_backbone
    from coala.comal.model_oracles import from_pairwise_lm

    model, sign, instructions = rest.rpartition(":")
    if not sign or Path(rest).expanduser().is_dir():
        model, instructions = rest, "weighted"
    backbone = load_backbone(model, device=device)
    name = f"judge {Path(model).name} {backbone.weights[:12]} {instructions}"
    return Named(from_pairwise_lm(backbone, instructions, name=name), kept=True)


def _head(rest: str, run: Path | None, *, pairwise: bool) -> Named:
    """The pair head fitted to a run's training features, and its worth on the held-out ones; or the run's own head."""
    import numpy as np

    from coala.alignment import load_parts
    from coala.comal.model_oracles import from_coala_head
    from coala.comal.pair_head import choose_pair_head
    from coala.statistics.scores import accuracy_difference, accuracy_of_margins
    from coala.store import digest, load_features
    from coala.values import CoalaError

    path = Path(rest).expanduser() if rest else run
    if path is None or kind_of_run(path) != "coala":
        raise CoalaError(
            f"The oracle head needs a COALA run, and {rest or 'the model given'} is not one. Fix: pass the run as "
            "MODEL, or name it: --oracle head:RUN (made by `coala align`)."
        )
    backbone, head, _ = load_parts(path)
    held_out = load_features(path / "features/eval")
    own = head.margins(held_out)
    if not pairwise:
        found = accuracy_of_margins(own, held_out.group)
        told = f"oracle: the run's head, Bradley-Terry; {found} of held-out pairs ranked right"
        name = f"convex head {digest(head.gates, head.weights, head.linear, head.temperature)[:12]}"
        return Named(from_coala_head(head, backbone, name), True, (told,), {"oracle_accuracy": found})
    train = load_features(path / "features/train")
    pair_head, losses = choose_pair_head(train.chosen, train.rejected, train.group.tolist())
    margins = pair_head.margin(held_out.chosen, held_out.rejected)
    accuracy = accuracy_of_margins(margins, held_out.group)
    gain = accuracy_difference(margins, own, held_out.group)
    skew = float(np.sqrt((pair_head.skew**2).sum() / 2))
    told = (
        f"oracle: pair head, rank {len(pair_head.linear)}, ridge {pair_head.ridge:g}, objective within "
        f"{pair_head.gap:.1e} of the least; {accuracy} of held-out pairs ranked right, which is {gain} "
        "more than by the run's own head"
    )
    name = f"pair head {digest(pair_head.projection, pair_head.mean, pair_head.linear, pair_head.skew)[:12]}"
    facts = {
        "oracle_accuracy": accuracy,
        "oracle_gain_over_run_head": gain,
        "oracle_gap": pair_head.gap,
        "oracle_ridge": pair_head.ridge,
        "oracle_held_out_loss": losses,
        "oracle_linear_norm": float(np.linalg.norm(pair_head.linear)),
        "oracle_skew_norm": skew,
    }
    return Named(from_coala_head(pair_head, backbone, name, spec=train.spec), True, (told,), facts)
