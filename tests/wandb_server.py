"""A stand-in for the W&B server, on loopback: opens, resumes and stops runs, takes rows, files and artifacts.

A subclass answers more: `operations` has a function for the ``data`` of each GraphQL operation, by its name.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import unquote

Variables = dict[str, Any]


@dataclass
class Run:
    """What the server has of one run."""

    name: str
    """Its id for the clients."""
    project: str = "p"
    entity: str = "e"
    group: str | None = None
    display_name: str | None = None
    sweep: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """As W&B sends it: ``{key: {"value": value}}``."""
    tags: list[str] = field(default_factory=list)
    lines: dict[str, list[str]] = field(default_factory=dict)
    """Lines of ``wandb-history.jsonl``, ``wandb-summary.json``, ``wandb-events.jsonl``, ``output.log``."""
    files: dict[str, bytes] = field(default_factory=dict)
    complete: bool = False
    exit_code: int | None = None
    preempting: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """Its rows in the order of arrival."""
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.lines.get("wandb-summary.json")
        return dict(json.loads(lines[-1])) if lines else {}

    def take(self, sent: dict[str, Any]) -> None:
        """One message of its file stream."""
        for name, part in sent.get("files", {}).items():
            lines = self.lines.setdefault(name, [])
            lines[part["offset"] :] = part["content"]
        if sent.get("complete"):
            self.complete, self.exit_code = True, sent.get("exitcode")
        self.preempting = self.preempting or bool(sent.get("preempting"))


@dataclass
class Artifact:
    """One version of an artifact."""

    run: str
    name: str
    kind: str
    aliases: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class Server(ThreadingHTTPServer):
    """Listens until it is closed. What it has got is in `runs`, `artifacts` and, row by row, in `taken`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.lock = threading.RLock()
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Artifact] = []
        self.taken: list[dict[str, Any]] = []
        """Messages of the file streams."""
        self.unknown: set[str] = set()
        """Operations that had no answer."""
        self.silence: threading.Event | None = None
        """Where it is set, rows get no answer before it happens."""
        self.hanging = threading.Event()
        """Where it is set, no request gets an answer."""
        self.status = 200
        """Every request gets this; anything but 200 comes without content."""
        self.delay = 0.0
        """Seconds before each answer."""
        self.stopping: set[str] = set()
        """Runs that somebody stops in the browser."""
        self.operations: dict[str, Callable[[Variables], dict[str, Any]]] = {
            "Viewer": self._viewer,
            "ServerFeaturesQuery": self._server_features_query,
            "UpsertBucket": self._upsert_bucket,
            "RunResumeStatus": self._run_resume_status,
            "CreateRunFiles": self._create_run_files,
            "ArtifactType": self._artifact_type,
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": self._create_artifact_manifest,
            "UpdateArtifactManifest": self._update_artifact_manifest,
            "CreateArtifactFiles": self._create_artifact_files,
            "CommitArtifact": self._commit_artifact,
        }
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def run(self, suffix: str) -> Run:
        """The only run whose displayed name or id ends so."""
        found = [
            run for run in self.runs.values() if f"{run.display_name}".endswith(suffix) or run.name == suffix
        ]
        assert len(found) == 1, (suffix, [run.display_name for run in self.runs.values()])
        return found[0]

    def end(self) -> None:
        """Answer nothing any more and close the port."""
        self.closing.set()
        self.hanging.clear()
        if self.silence:
            self.silence.set()
        self.shutdown()
        self.server_close()

    def answer(self, operation: str, variables: Variables) -> dict[str, Any]:
        """The JSON answer to one GraphQL operation."""
        if operation not in self.operations:
            self.unknown.add(operation)
            return {"errors": [{"message": f"no operation {operation!r} here"}]}
        with self.lock:
            return {"data": self.operations[operation](variables)}

    def _viewer(self, variables: Variables) -> dict[str, Any]:
        del variables
        about = {"id": "u", "entity": "e", "username": "e", "email": "e@example.com", "flags": "{}"}
        return {"viewer": {**about, "teams": {"edges": []}}}

    def _server_features_query(self, variables: Variables) -> dict[str, Any]:
        del variables
        return {"serverInfo": {"features": []}}

    def _upsert_bucket(self, variables: Variables) -> dict[str, Any]:
        name = variables["name"]
        run = self.runs.get(name)
        inserted = run is None
        if run is None:
            run = self.runs[name] = Run(name)
        run.project, run.entity = variables.get("project") or run.project, variables.get("entity") or "e"
        run.group, run.sweep = variables.get("groupName") or run.group, variables.get("sweep") or run.sweep
        run.display_name = variables.get("displayName") or run.display_name
        run.tags = variables.get("tags") or run.tags
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        return {"upsertBucket": {"bucket": self.bucket(run), "inserted": inserted}}

    def _run_resume_status(self, variables: Variables) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        model = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "e"}}
        return {"model": {**model, "bucket": run and self.bucket(run)}}

    def bucket(self, run: Run) -> dict[str, Any]:
        """What clients may ask of a run."""

        def count(name: str) -> int:
            return len(run.lines.get(name, []))

        def tail(name: str) -> str:
            return json.dumps(run.lines.get(name, [])[-1:])

        return {
            "id": run.name,
            "name": run.name,
            "displayName": run.display_name,
            "description": None,
            "notes": None,
            "sweepName": run.sweep,
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}},
            "config": json.dumps(run.config),
            "wandbConfig": json.dumps(run.config.get("_wandb", {}).get("value", {})),
            "summaryMetrics": json.dumps(run.summary),
            "tags": run.tags,
            "historyLineCount": count("wandb-history.jsonl"),
            "eventsLineCount": count("wandb-events.jsonl"),
            "logLineCount": count("output.log"),
            "historyTail": tail("wandb-history.jsonl"),
            "eventsTail": tail("wandb-events.jsonl"),
        }

    def _create_run_files(self, variables: Variables) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _artifact_type(self, variables: Variables) -> dict[str, Any]:
        del variables
        return {"project": None}

    def _create_artifact(self, variables: Variables) -> dict[str, Any]:
        given = variables["input"]
        name = given["artifactCollectionName"]
        aliases = [one["alias"] for one in given.get("aliases") or []]
        self.artifacts.append(Artifact(given["runName"], name, given["artifactTypeName"], aliases))
        number = str(len(self.artifacts) - 1)
        artifact = {"id": number, "state": "PENDING", "digest": given["digest"], "artifactSequence": None}
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": {"id": "s", "name": name}}}}

    def _create_artifact_manifest(self, variables: Variables) -> dict[str, Any]:
        number = variables["artifactID"]
        file = {"id": "f", "uploadUrl": f"{self.url}/artifact/{number}/{_MANIFEST}", "uploadHeaders": []}
        manifest = {"id": f"manifest-{number}", "file": file if variables["includeUpload"] else None}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _update_artifact_manifest(self, variables: Variables) -> dict[str, Any]:
        number = variables["artifactManifestID"].removeprefix("manifest-")
        file = {"id": "f", "uploadUrl": f"{self.url}/artifact/{number}/{_MANIFEST}", "uploadHeaders": []}
        manifest = {"id": variables["artifactManifestID"], "file": file}
        return {"updateArtifactManifest": {"artifactManifest": manifest}}

    def _create_artifact_files(self, variables: Variables) -> dict[str, Any]:
        edges = []
        for one in variables["input"]["artifactFiles"]:
            number, name = one["artifactID"], one["name"]
            url = f"{self.url}/artifact/{number}/{name}"
            node = {"name": name, "storagePath": name, "uploadUrl": url, "uploadHeaders": []}
            edges.append({"node": {**node, "uploadMultipartUrls": None, "artifact": {"id": number}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit_artifact(self, variables: Variables) -> dict[str, Any]:
        number = variables["artifactID"]
        self.artifacts[int(number)].committed = True
        return {"commitArtifact": {"artifact": {"id": number, "digest": "d"}}}

    def take_rows(self, name: str, sent: dict[str, Any]) -> dict[str, Any]:
        """One message of a run's file stream; what the run is told."""
        with self.lock:
            self.taken.append(sent)
            self.runs.setdefault(name, Run(name)).take(sent)
            return {"exitcode": None, "limits": {}, **({"stopped": True} if name in self.stopping else {})}

    def take_file(self, path: str, content: bytes) -> None:
        """One uploaded file."""
        kind, owner, name = unquote(path).lstrip("/").split("/", 2)
        with self.lock:
            if kind == "put":
                self.runs[owner].files[name] = content
            else:
                self.artifacts[int(owner)].files[name] = content


_MANIFEST = "wandb_manifest.json"

AServer = TypeVar("AServer", bound=Server)


@contextmanager
def serving(server: AServer) -> Iterator[AServer]:
    """`server`, at work until the block ends at the latest."""
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.end()


@contextmanager
def listening() -> Iterator[Server]:
    """A server that ends with the block, at the latest."""
    with serving(Server()) as server:
        yield server


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._well():
            return
        if found := re.search(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            if self.server.silence:
                self.server.silence.wait(60)
                self.close_connection = True
                return
            self._say(200, self.server.take_rows(unquote(found[1]), json.loads(body)))
            return
        if not self.path.endswith("/graphql"):  # telemetry
            self._say(404, {})
            return
        asked = json.loads(body)
        # Not every client says it outside the query.
        named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        operation = asked.get("operationName") or (named[1] if named else "")
        self._say(200, self.server.answer(operation, asked.get("variables") or {}))

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self._well():
            self.server.take_file(self.path, content)
            self._say(200, {})

    def _well(self) -> bool:
        """Whether this request is to be answered; an unwell server has then done what it does."""
        if self.server.hanging.is_set():
            self.server.closing.wait(60)
        elif self.server.delay:
            self.server.closing.wait(self.server.delay)
        if self.server.closing.is_set():
            self.close_connection = True
            return False
        if self.server.status != 200:
            self._say(self.server.status, {})
            return False
        return True

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        del format, args
