"""`coala serve`: a run behind the OpenAI protocol."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from coala.cli.flags import Given, Of, with_settings
from coala.cli.options import Download, TrustCode, needs_extra
from coala.messages import CoalaError
from coala.serve.limits import Limits
from coala.settings import GuidanceSettings

KEY = "COALA_API_KEY"
SHORTEST_KEY = 16


@with_settings
def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other machines can reach any but loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model (default: the folder's).")] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt of conversations without one (default: none).")
    ] = None,
    guidance: Annotated[Given, Of(GuidanceSettings, ("mode", "strength", "over", "rater"))],
    limits: Limits,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = KEY,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Serve addresses other than loopback without a key.")
    ] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Serve the run's guided model: an OpenAI-compatible API and a playground in the browser. Ctrl-C stops it.

    Concurrent requests are batched on one model. `/v1/chat/completions` and `/v1/completions` also accept `guidance`
    and `best_of`; `/v1/score` and `/v1/rerank` return the head's scores; `/metrics` is for Prometheus.

    Examples:

    `coala serve runs/demo`   (then open http://127.0.0.1:8000)

    `coala serve runs/demo --mode distilled`   (after `coala distil runs/demo`: full speed)

    `COALA_API_KEY=... coala serve runs/demo --host 0.0.0.0 --port 9000`
    """
    from coala.alignment import evidence_notes, load_parts
    from coala.alignment.talking import settled
    from coala.cli.output import emit, say

    with needs_extra("serve", "Serving"):
        from coala.serve.app import Served, create_app
        from coala.serve.memory import settle
        from coala.web.listening import listen, server
        from coala.web.strangers import LOOPBACK
    local = host in LOOPBACK
    key = _key(host, api_key_env, anyone=local or no_key)
    # Before the model is loaded, which takes long: a port that is taken should be told at once.
    with listen(host, port) as listening:
        backbone, head, own = load_parts(run, rater=guidance.get("rater"))
        for line in backbone.reads(head.spec):
            say(line)
        own, temperature = settled(run, backbone, own.changed(**guidance), {}, say)
        served = Served(name or run.resolve().name, backbone, head, own, temperature, system)
        app = create_app(served, limits, key=key, local=local and key is None)
        site = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        for note in evidence_notes(run, head, own):
            say(f"note: {note}")
        say(f"playground: {site}/   for the openai client: base_url={site}/v1, model {served.name}")
        if not local:
            say("note: other machines can reach this address, unencrypted; put a proxy with TLS in front of it.")
        settle()
        times = {"head_time": limits.head_time, "read_time": limits.read_time, "grace": limits.grace}
        server(app, **times).run(sockets=[listening])
    emit({"served": served.name, "requests": app.state.observed.n_requests, "tokens": app.state.observed.n_tokens})


def _key(host: str, api_key_env: str, *, anyone: bool) -> str | None:
    """The key that requests must bring, from the environment; it may lack where ``anyone`` who reaches us may ask."""
    key = os.environ.get(api_key_env)
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or key != key.strip()):
        raise CoalaError(
            f"{api_key_env} holds {len(key)} characters; expected at least {SHORTEST_KEY} of ASCII without spaces at "
            "the ends, hard to guess."
        )
    if key is None and not anyone:
        raise CoalaError(
            f"{host} is reachable from other machines and there is no key. Fix: set {api_key_env}, or pass "
            f"--no-key if everyone "
            "who can reach it may use it."
        )
    return key
