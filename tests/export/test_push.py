"""Pushing, against a local server that speaks the hub's upload calls."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from export.package_record import update_record, write_card
from export.push import push
from supernet.common.errors import RequestError, VerificationError
from tests.support import ROOT
from tests.support.export_networks import EVEN, write_tiny

TOKEN = "hf_" + "neverPrintThis" * 2


@dataclass
class Hub:
    """What the server holds, what was asked of it, and how it should misbehave."""

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    commits: list[list[dict[str, Any]]] = field(default_factory=list)
    refuse_create: tuple[int, str] | None = None
    is_a_page: bool = False
    named: str = ""
    """The address that it says it has, where that is another."""
    lose: set[str] = field(default_factory=set)
    others_stored: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does; `hub` is what it holds."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def known(self) -> bool:
        if self.headers.get("authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid credentials"}, 401, X_Error_Message="Invalid credentials")
        return False

    def do_GET(self) -> None:
        if not self.known():
            return None
        matched = re.match(r"/api/models/([^?]+?)(/(?:tree|revision)/main)?(?:\?|$)", self.path)
        if not matched or matched[1] not in self.hub.repos:
            return self.answer({"error": "not found"}, 404)
        files = self.hub.repos[matched[1]]
        if "/tree/" in (matched[2] or ""):
            return self.answer([{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()])
        siblings = [{"rfilename": name} for name in files]
        facts = {"id": matched[1], "_id": "1", "sha": "a" * 40, "private": self.hub.private[matched[1]]}
        return self.answer(facts | {"siblings": siblings})

    def do_PUT(self) -> None:
        content, oid = self.body(), self.path.rpartition("/")[2]
        if oid in self.hub.lose:
            self.hub.others_stored.wait(30)  # files go in parallel: the line is cut when the others are through
            return self.answer({"error": "the line was cut"}, 400)
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.hub.sent.append(oid)
        if len(self.hub.objects) == 2:
            self.hub.others_stored.set()
        return self.answer({})

    def do_POST(self) -> None:
        content = self.body()
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if not self.known():
            return None
        if self.path == "/api/repos/create":
            if self.hub.is_a_page:
                self.send_response(200)
                self.send_header("Content-Length", "6")
                self.end_headers()
                self.wfile.write(b"<html>")
                return None
            if self.hub.refuse_create:
                status, message = self.hub.refuse_create
                return self.answer({"error": message}, status, X_Error_Message=message)
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            exists = name in self.hub.repos
            self.hub.repos.setdefault(name, {".gitattributes": b""})
            self.hub.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            address = self.hub.named or self.hub.address
            return self.answer({"url": f"{address}/{name}", "name": name}, 409 if exists else 200)
        if found := re.match(r"/api/models/(.+)/preupload/main", self.path):
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": modes[f["path"].endswith(".safetensors")]}
                for f in json.loads(content)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(content)["objects"]:
                upload = {"upload": {"href": f"{self.hub.address}/store/{wanted['oid']}"}}
                objects.append(wanted if wanted["oid"] in self.hub.objects else wanted | {"actions": upload})
            return self.answer({"transfer": "basic", "objects": objects})
        if found := re.match(r"/api/models/(.+)/commit/main", self.path):
            rows = [json.loads(line) for line in content.splitlines()]
            repo = self.hub.repos[found[1]]
            for row in rows:
                value = row["value"]
                if row["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                elif row["key"] == "lfsFile":
                    repo[value["path"]] = self.hub.objects[value["oid"]]
                elif row["key"] == "deletedFile":
                    del repo[value["path"]]
            self.hub.commits.append(rows)
            return self.answer({"commitUrl": f"{self.hub.address}/{found[1]}/commit/1", "commitOid": "b" * 40})
        return self.answer({"error": f"unknown call {self.path}"}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfOne", (Handler,), {"hub": state}))
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "best"
    return write_tiny(folder, EVEN, card="---\nlicense: mit\n---\n# A card\n", max_shard_bytes=200_000).folder


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(made, tmp_path / "best")
    update_record(copy, entry={"verified": {"padding_equal": True}})
    return copy


def run_push(
    package: Path, hub: Hub, name: str = "anna/best", token: str = TOKEN, private: bool = False
) -> tuple[dict[str, Any], str]:
    """Push in a process of its own, for huggingface_hub reads its environment once. Returns the result and stderr."""
    script = (
        "import json, sys; from pathlib import Path; from supernet.common.errors import RequestError\n"
        "from export.push import push\n"
        "try:\n    done = push(Path(sys.argv[1]), sys.argv[2], private=sys.argv[3] == 'True')\n"
        "except RequestError as error:\n    done = {'error': str(error)}\n"
        "print(json.dumps(done))"
    )
    home = package.parent / "home"
    unwanted = re.compile(r"^(HF_|HUGGING)|proxy", re.IGNORECASE)
    environment = {name: value for name, value in os.environ.items() if not unwanted.search(name)}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, "-c", script, str(package), name, str(private)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_package_arrives_whole(package: Path, hub: Hub) -> None:
    (package / "notes.txt").write_text("private")
    done, said = run_push(package, hub, private=True)
    assert done["commit"] == "b" * 40 and done["url"].endswith("/anna/best")
    stored = hub.repos["anna/best"]
    assert hub.private == {"anna/best": True} and len(hub.commits) == 1
    expected = {p.name: p.read_bytes() for p in package.iterdir() if p.name != "notes.txt"}
    assert {name: content for name, content in stored.items() if name != ".gitattributes"} == expected
    assert {file["name"]: file["bytes"] for file in done["files"]} == {n: len(c) for n, c in expected.items()}
    assert done["bytes"] == sum(map(len, expected.values())) and "model-00001-of" in said


def test_the_card_says_the_name_on_the_hub(package: Path, hub: Hub) -> None:
    write_card(package, 'name = "path/to/best"\n')
    done, _ = run_push(package, hub)
    stored = hub.repos["anna/best"]
    assert "error" not in done and stored["README.md"] == b'name = "anna/best"\n'
    recorded = json.loads(stored["compression.json"])["files"]["README.md"]
    assert recorded["sha256"] == hashlib.sha256(stored["README.md"]).hexdigest() and len(hub.commits) == 1
    assert (package / "README.md").read_text() == 'name = "path/to/best"\n'


def test_what_is_private_does_not_get_into_a_public_repository(package: Path, hub: Hub) -> None:
    run_push(package, hub)
    done, _ = run_push(package, hub, private=True)
    assert "anna/best: the repository is public" in done["error"] and len(hub.commits) == 1


def test_an_upload_that_broke_is_resumed(package: Path, hub: Hub) -> None:
    shards = sorted(package.glob("*.safetensors"))
    oids = [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards]
    assert len(shards) == 3
    hub.lose = {oids[1]}
    done, _ = run_push(package, hub)
    assert shards[1].name in done["error"] and "run the command again to resume" in done["error"]
    assert not hub.commits
    assert sorted(hub.sent) == sorted([oids[0], oids[2]])
    hub.lose.clear()
    done, _ = run_push(package, hub)
    assert done["commit"] and sorted(hub.sent) == sorted(oids)  # nothing was sent twice


def test_an_earlier_package_in_the_repository_is_replaced(package: Path, hub: Hub) -> None:
    old = {".gitattributes": b"", "compression.json": b"{}", "modeling_old.py": b"", "model-old.safetensors": b"x"}
    hub.repos["anna/best"] = dict(old)
    run_push(package, hub)
    names = set(hub.repos["anna/best"])
    assert names == {p.name for p in package.iterdir()} | {".gitattributes"}


def test_something_else_in_the_repository_stays(package: Path, hub: Hub) -> None:
    hub.repos["anna/thesis"] = {".gitattributes": b"", "thesis.pdf": b"years of work"}
    done, _ = run_push(package, hub, "anna/thesis")
    assert "holds something else (thesis.pdf)" in done["error"] and not hub.commits


def test_a_missing_login_is_explained(package: Path, hub: Hub) -> None:
    done, _ = run_push(package, hub, token="")
    assert "hf auth login" in done["error"] and "HF_TOKEN" in done["error"]
    assert not hub.repos


def test_refusals_are_explained(package: Path, hub: Hub) -> None:
    done, _ = run_push(package, hub, token="hf_another")
    assert "does not know the token" in done["error"]
    hub.refuse_create = (403, "You don't have the rights to create a model under the namespace bob")
    done, _ = run_push(package, hub, "bob/best")
    assert "may not write to bob/best" in done["error"] and "namespace bob" in done["error"]
    assert "\n" not in done["error"]
    hub.refuse_create = (500, f"cannot read Bearer {TOKEN}")  # which `run_push` finds nowhere
    done, _ = run_push(package, hub)
    assert "cannot read Bearer (the token)" in done["error"]


def test_what_is_no_hub_is_said(package: Path, hub: Hub) -> None:
    hub.is_a_page = True
    done, _ = run_push(package, hub)
    assert f"what answers at {hub.address} does not speak as a hub does" in done["error"]
    hub.is_a_page, hub.named = False, "http://elsewhere.example"
    done, _ = run_push(package, hub)
    assert "does not speak as a hub does" in done["error"] and not hub.commits


def test_a_dry_run_lists_and_asks_nobody(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.push._upload", lambda *args: pytest.fail("it uploaded"))
    done = push(package, "anna/best", dry_run=True)
    assert done["commit"] is None and done["bytes"] == sum(p.stat().st_size for p in package.iterdir())
    assert "nothing was uploaded" in capsys.readouterr().err


def test_what_cannot_be_uploaded_is_said_before_anything_else(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError, match="'best' names no owner: write OWNER/best"):
        push(package, "best")
    monkeypatch.setattr("export.push.get_token", lambda: None)
    with pytest.raises(RequestError, match="not logged in"):
        push(package / "nowhere", "anna/best")
    assert "safetensors" not in capsys.readouterr().err


def test_only_whole_and_verified_packages_are_pushed(made: Path, package: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not verified"):
        push(made, "anna/best", dry_run=True)
    with pytest.raises(RequestError, match="no name of a repository"):
        push(package, "anna/best/of", dry_run=True)
    with (package / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(VerificationError, match=r"tokenizer\.json"):
        push(package, "anna/best", dry_run=True)
    with pytest.raises(RequestError, match="no such folder"):
        push(tmp_path / "nowhere", "anna/best", dry_run=True)
