"""More processes on one extraction: on this machine, or as tasks on a Ray cluster that sees the same folder.

Each runs the same extraction into the same store, whose claims share the shards out; whoever asked makes what is left
and puts the features together. A worker that dies costs the shard it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coala.processes import Child, Parent
from coala.settings import WorkerEngine
from coala.values import CoalaError, FeatureSpec, Pair


@dataclass(frozen=True)
class ExtractionTask:
    """An extraction as another process can repeat it.

    ``model`` are the arguments of :func:`coala.backbone.load_backbone`, ``options`` those of
    :func:`coala.features.extract` that decide its outcome. ``store`` must be the same folder for every worker.
    """

    model: Mapping[str, Any]
    pairs: Sequence[Pair]
    spec: FeatureSpec
    options: Mapping[str, Any]
    store: Path

    def work(self, threads: int | None = None) -> None:
        """Make shards until none is left."""
        import torch

        from coala.backbone import load_backbone
        from coala.features.extraction import extract
        from coala.store import FeatureStore

        if threads is not None:
            torch.set_num_threads(threads)
        extract(self.pairs, load_backbone(**self.model), self.spec, **self.options, store=FeatureStore(self.store))


@contextmanager
def workers(
    task: ExtractionTask,
    n_workers: int,
    *,
    engine: WorkerEngine = "processes",
    address: str | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Iterator[list[Child]]:
    """While it lasts, ``n_workers`` - 1 other processes of this machine (yielded) work on ``task`` beside this one.

    With the engine ``ray``, ``n_workers`` tasks do, on the cluster at ``address`` (default: one started here), and this
    process waits for them first. Raises :class:`CoalaError` without Ray; a worker that fails is told to ``on_note``.
    """
    note = on_note if on_note is not None else lambda text: None
    if n_workers < 1:
        raise CoalaError(f"{n_workers} workers; expected at least 1.")
    if engine == "ray":
        _on_ray(task, n_workers, address, note)
        yield []
        return
    if n_workers == 1:
        yield []
        return
    import torch

    mine = torch.get_num_threads()
    threads = max(1, mine // n_workers)
    try:
        with ExitStack() as ends:
            others = [ends.enter_context(Child(_help, task, threads)) for _ in range(n_workers - 1)]
            torch.set_num_threads(threads)
            yield others
            for other in others:
                try:
                    code = other.join()
                    if code:
                        note(f"A worker ended with code {code}; the others did its work.")
                except CoalaError as error:
                    note(f"A worker ended ({error}); the others did its work.")
    finally:
        torch.set_num_threads(mine)


def _help(_: Parent, task: ExtractionTask, threads: int) -> None:
    task.work(threads)


def _on_ray(task: ExtractionTask, n_workers: int, address: str | None, note: Callable[[str], None]) -> None:
    try:
        import ray
    except ImportError as error:
        raise CoalaError("The engine ray needs Ray: pip install 'coala-align[ray]', or use --workers.") from error
    mine = not ray.is_initialized()
    if mine:
        # A cluster of our own stays on the loopback. Ray sends usage statistics unless it is told not to; the command
        # line tells it by its environment too.
        with suppress(ImportError):
            from ray._common.usage import usage_lib

            usage_lib.set_usage_stats_enabled_via_env_var(False)
        own: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        ray.init(address=address, log_to_driver=False, **({} if address else own))
    try:
        remote = ray.remote(num_cpus=1, max_retries=3)(ExtractionTask.work)
        for done in [remote.remote(task) for _ in range(n_workers)]:
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                note(f"A Ray task failed ({type(error).__name__}); its shards are made by the others or here.")
    finally:
        if mine:
            ray.shutdown()
