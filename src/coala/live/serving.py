"""A session from its settings to its end: model, prompts, raters' links, threads and server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coala.alignment.answers import read_prompts
from coala.alignment.context import open_backbone
from coala.callbacks import OnNote, quiet
from coala.live.app import create_app
from coala.live.figures import figures
from coala.live.finish import begin, recipe_in
from coala.live.jobs import Jobs
from coala.live.session import OWNER, Session
from coala.live.settings import LiveSettings
from coala.live.writer import Backbone, Threads
from coala.messages import CoalaError
from coala.recipe import Recipe
from coala.survey.records import new_token
from coala.web.listening import listen, server
from coala.web.strangers import LOOPBACK, origin_of


def open_model(recipe: Recipe, settings: LiveSettings) -> Backbone:
    """The recipe's model as a session uses it; CoalaError for a layer that only a fit could choose."""
    model = recipe.model
    if model.layer == "auto":
        raise CoalaError(
            "found --layer auto, which pairs choose, expected a number, fix: remove it, and choose the layer "
            "when finishing"
        )
    backbone = open_backbone(recipe)
    backbone.require_head("Replies")
    spec = backbone.spec(model.layer, model.pooling, model.ends_with_eos, model.max_tokens)
    return Backbone(backbone, spec, settings.max_new_tokens, settings.temperature, settings.seed)


def identity_of(model: Backbone) -> dict[str, Any]:
    """What the features of a session depend on."""
    names = ("weights", "template", "layer", "pooling", "ends_with_eos", "max_tokens")
    return {name: getattr(model.spec, name) for name in names}


def serve(
    out: Path,
    prompts: Path | None,
    model: Mapping[str, Any],
    settings: LiveSettings,
    *,
    n_raters: int = 0,
    host: str = "127.0.0.1",
    port: int = 8000,
    site: str | None = None,
    grace: float = 5.0,
    on_note: OnNote = quiet,
) -> dict[str, Any]:
    """Serve the session in ``out`` until it is ended; what there was of it then."""
    asked = [] if prompts is None else [row.prompt for row in read_prompts(prompts)]
    known = None if site is None else origin_of(site)
    local = host in LOOPBACK
    # Before the model is loaded, which takes long: a port that is taken should be told at once.
    with listen(host, port) as listening:
        recipe = recipe_in(out, model, settings.max_new_tokens, settings.seed)
        used = open_model(recipe, settings)
        begin(out, recipe)
        for text in used.backbone.reads(used.spec):
            on_note(text)
        with Session(out, settings, identity_of(used)) as session:
            session.add_prompts(asked)
            here = known or f"http://{f'[{host}]' if ':' in host else host}:{port}"
            on_note(f"your page: {here}/r/{session.rater(OWNER, new_token)}")
            for number in range(1, n_raters + 1):
                name = f"rater-{number}"
                on_note(f"link of {name}: {here}/r/{session.rater(name, new_token)}")
            if not local:
                on_note(
                    "note: other machines can reach this address, unencrypted; put a proxy with TLS in front of it."
                )
            threads, jobs = Threads(session, used), Jobs(out)
            app = create_app(
                session,
                threads,
                jobs,
                title=f"{Path(recipe.model.name).name}: one click at a time",
                local=local or known is not None,
                site=known,
            )
            threads.start()
            try:
                server(app, grace=grace).run(sockets=[listening])
            finally:
                jobs.close()
                lines = figures(session)
        threads.join()
    return {"run": out, "figures": [vars(one) for one in lines]}
