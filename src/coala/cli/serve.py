"""`coala serve`: a run behind the OpenAI protocol."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from coala.cli.options import Download, TrustCode

KEY = "COALA_API_KEY"
SHORTEST_KEY = 16


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback can be reached.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name; the folder's.")] = None,
    max_rows: Annotated[
        int, typer.Option(min=1, help="Rows of the model's batch; blocks take one per candidate.")
    ] = 40,
    queue: Annotated[int, typer.Option(min=0, help="Replies that may wait besides; then 429 with Retry-After.")] = 112,
    deadline: Annotated[float, typer.Option(help="Seconds a request may take, the queue included.")] = 120.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 1 << 20,
    grace: Annotated[float, typer.Option(help="Seconds that requests at hand get when the server ends.")] = 30.0,
    api_key_env: Annotated[str, typer.Option(help="Variable of the environment that holds the key.")] = KEY,
    no_key: Annotated[bool, typer.Option("--no-key", help="Serve others than loopback without a key.")] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Serve the run's guided model: an OpenAI-compatible server, and a playground at its first page. Ctrl-C ends it.

    Replies to all who ask are written side by side by one model. `/v1/chat/completions` and `/v1/completions` also take
    `guidance` and `best_of`; `/v1/score` and `/v1/rerank` ask the head; `/metrics` is for Prometheus.

    Examples:

    `coala serve runs/demo`   (then open http://127.0.0.1:8000)

    `COALA_API_KEY=... coala serve runs/demo --host 0.0.0.0 --port 9000`
    """
    from coala.alignment import evidence_notes, load_parts
    from coala.cli.output import emit, say
    from coala.values import CoalaError

    try:
        from coala.serve import Limits
        from coala.serve.app import Served, create_app
        from coala.serve.memory import settle
        from coala.web.listening import listen, server
    except ImportError as error:
        raise CoalaError(
            f"Serving needs {error.name or 'a package'}, which is not installed: pip install 'coala-align[serve]'."
        ) from None
    limits = Limits(
        max_rows=max_rows, queue=queue, deadline=deadline, max_tokens=max_tokens, max_body=max_body, grace=grace
    )
    local = host in ("127.0.0.1", "::1", "localhost")
    key = os.environ.get(api_key_env)
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or key != key.strip()):
        raise CoalaError(
            f"{api_key_env} holds {len(key)} characters; expected at least {SHORTEST_KEY} of ASCII without spaces at "
            "the ends, hard to guess."
        )
    if not local and key is None and not no_key:
        raise CoalaError(
            f"{host} can be reached by others and there is no key. Set {api_key_env}, or say --no-key if everyone who "
            "can reach it may use it."
        )
    # Before the model is loaded, which takes long: a port that is taken should be told at once.
    with listen(host, port) as listening:
        backbone, head, guidance = load_parts(run)
        for line in backbone.reads(head.spec):
            say(line)
        served = Served(name or run.resolve().name, backbone, head, guidance)
        app = create_app(served, limits, key=key, local=local and key is None)
        site = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        for note in evidence_notes(run, head, guidance):
            say(f"note: {note}")
        say(f"playground: {site}/   for the openai client: base_url={site}/v1, model {served.name}")
        if not local:
            say("note: this address can be reached by others, unencrypted; put a proxy with TLS in front of it.")
        settle()
        times = {"head_time": limits.head_time, "read_time": limits.read_time, "grace": limits.grace}
        server(app, **times).run(sockets=[listening])
    emit({"served": served.name, "requests": app.state.observed.n_requests, "tokens": app.state.observed.n_tokens})
