"""Bytes by formula: upper bounds of what passes and replies take besides the weights."""

from __future__ import annotations

from dataclasses import dataclass

from coala.costs.flops import Shape


@dataclass(frozen=True)
class Load:
    """The largest forward passes of an extraction, in tokens.

    ``trunk`` are those of a pass over whole rows, ``branch`` those computed in a pass over rows that go on from kept
    ones, ``gathered`` what is gathered in front of them, ``across`` the most that one of them attends to; ``nested``
    are those of the rows that go on from kept ones and are kept themselves, at all depths together.
    """

    trunk: int
    branch: int = 0
    gathered: int = 0
    across: int = 0
    nested: int = 0


def pass_bytes(
    shape: Shape,
    cached: int,
    load: Load,
    *,
    size: int,
    layer: int | None = None,
    to_end: bool = False,
    pooled: int = 1,
) -> dict[str, int]:
    """Upper bounds in bytes, by part, of what an extraction holds on its device besides the weights.

    With T, B, G, K and N the five numbers of ``load``, s bytes a number, l of L layers read, c numbers ``cached`` a
    token over all layers, A = attention width and w = P_mm / (L d), all widths a layer makes taken together:

        kept keys and values   (T + N) c s l / L                              (if rows branch off)
        activations            M (s (w + 2 A + 4 d) + 8 d),  M = max(T, B), and of a pass of branches
                               (2 G + B) c s / L + 2 A (G + B) s + 24 B K     (gathered, repeated per head, masks)
        hidden states          f (T + N + G + 2 B) d s + max(T, G + B) 8 d    (f ``pooled`` layers, the end one more)

    Holds for fused attention; of eager attention the scores, heads * T * K * (s + 4), come on top.
    """
    n_layers, width, attention = shape.n_layers, shape.width, shape.attention_width
    read = n_layers if layer is None or to_end else layer % (n_layers + 1)
    made = -(-shape.body_matmul_parameters // (n_layers * width))
    trunk, branch, gathered = load.trunk, load.branch, load.gathered
    activations = max(trunk, branch) * (size * (made + 2 * attention + 4 * width) + 8 * width)
    if branch:
        activations += (2 * gathered + branch) * cached * size // n_layers
        activations += 2 * attention * (gathered + branch) * size + 24 * branch * load.across
    kinds = pooled + to_end
    states = (
        kinds * (trunk + load.nested + gathered + 2 * branch) * width * size + max(trunk, gathered + branch) * 8 * width
    )
    return {
        "kept keys and values": -(-(trunk + load.nested) * cached * size * read // n_layers) if branch else 0,
        "activations of a pass": activations,
        "hidden states to pool": states,
    }


def decoding_bytes(shape: Shape, cached: int, rows: int, prompt_tokens: int, new_tokens: int, *, size: int) -> int:
    """Upper bound in bytes of decoding ``rows`` replies side by side, besides the weights.

    Keys and values of R rows of T + N tokens, with half as much room to grow in and one layer copied; the pass over
    the prompts as in :func:`pass_bytes`, with masks of 4 bytes; three rows of float32 logits each.
    """
    kept = rows * (prompt_tokens + new_tokens + 64) * cached * size
    read = sum(pass_bytes(shape, cached, Load(rows * prompt_tokens), size=size).values())
    return 3 * kept // 2 + kept // shape.n_layers + read + 4 * rows * prompt_tokens**2 + 12 * rows * shape.vocabulary
