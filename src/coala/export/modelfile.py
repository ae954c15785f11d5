"""A Modelfile for Ollama beside a GGUF file: where the weights are, how prompts are written, how tokens are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coala.values import CoalaError, Turn

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

START, END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = (
    f"{{{{- range .Messages }}}}{START}{{{{ .Role }}}}\n{{{{ .Content }}}}{END}\n{{{{ end }}}}{START}assistant\n"
)


@dataclass(frozen=True)
class Chat:
    """How a ChatML model's own template writes a conversation: ``system`` is what it says where none is given."""

    system: str


def chatml_of(backbone: LanguageModel) -> Chat | None:
    """The model's template if it is ChatML and nothing else: a turn each, and perhaps a system turn of its own."""
    if not backbone.template.startswith("chat:"):
        return None
    turns = (Turn("system", "S1"), Turn("user", "U1"), Turn("assistant", "A1"), Turn("user", "U2"))
    if _written(backbone, turns) != written(turns):
        return None
    asked = (Turn("user", "U1"),)
    found, plain = _written(backbone, asked), written(asked)
    before, after = f"{START}system\n", f"{END}\n"
    if found == plain:
        return Chat("")
    if found is None or not (found.startswith(before) and found.endswith(after + plain)):
        return None
    system = found.removeprefix(before).removesuffix(after + plain)
    return Chat(system) if found == written((Turn("system", system), *asked)) and '"""' not in system else None


def written(turns: tuple[Turn, ...]) -> str:
    """A conversation in ChatML, as the Modelfile's template writes it, up to where the reply begins."""
    return "".join(f"{START}{turn.role}\n{turn.text}{END}\n" for turn in turns) + f"{START}assistant\n"


def _written(backbone: LanguageModel, turns: tuple[Turn, ...]) -> str | None:
    try:
        tokens = backbone.render(turns).tokens
    except CoalaError:  # some templates know no system turn
        return None
    tokenizer: Any = backbone.tokenizer
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def modelfile(file: str, backbone: LanguageModel, sampling: dict[str, float]) -> str:
    """The text for a GGUF ``file`` of ``backbone`` in the same folder; ``sampling``: temperature, top_k, top_p.

    A ChatML template is written out; any other is left to what the file itself holds, which Ollama reads.
    """
    chat = chatml_of(backbone)
    lines = [f"FROM ./{file}"]
    if chat is None:
        lines += ["# The template is left to the one that the GGUF file holds: it is not plain ChatML."]
    else:
        lines += [f'TEMPLATE """{_TEMPLATE}"""', f'PARAMETER stop "{END}"']
        lines += [f'SYSTEM """{chat.system}"""'] if chat.system else []
    lines += ["# The sampling that the policy was fitted at."]
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling.items()]
    # Ollama's own defaults would change the distribution besides.
    lines += ["PARAMETER repeat_penalty 1", "PARAMETER min_p 0"]
    return "\n".join(lines) + "\n"
