"""The hub's HTTP API on loopback, as far as model repositories need it: no network, no huggingface.co.

Paths and headers as huggingface_hub uses them (its hf_api.py, _commit_api.py, lfs.py, file_download.py, 2.4.0).
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_good"


class FakeHub:
    """repos: user/name -> {"private": bool, "commits": {sha: {path: bytes}}, "refs": {name: sha}}. log: (method, path).

    broken: None; "truncated" (bodies stop half way), "flipped" (one byte differs), "down" (500 to all).
    """

    def __init__(self):
        self.repos, self.log, self.objects, self.broken = {}, [], {}, None
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo, files, branch="main"):
        """Makes a commit on top of what is there. Returns its sha."""
        entry = self.repos.setdefault(repo, {"private": False, "commits": {}, "refs": {}})
        content = entry["commits"].get(entry["refs"].get(branch), {}) | files
        sha = hashlib.sha1(repr((branch, len(entry["commits"]), sorted(content.items()))).encode()).hexdigest()
        entry["commits"][sha], entry["refs"][branch] = content, sha
        return sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args):
        pass

    def _answer(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(data)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status, code, message):
        self._answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    @property
    def _known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name):
        """The entry, or None after a 404 or 401 as the hub gives it: of what may not be seen nothing is said."""
        entry = self.hub.repos.get(name)
        if entry is None or (entry["private"] and not self._known):
            self._fail(404 if self._known else 401, "RepoNotFound", "Repository not found")
            return None
        return entry

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _start(self):
        self.hub.log.append((self.command, self.path))
        if self.hub.broken == "down":
            self._answer(500, {"error": "down"})
        return self.hub.broken != "down"

    def do_POST(self):
        body = self._body()
        if not self._start():
            return
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif not self._known:
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            if wanted["organization"] == "others":
                self._answer(403, {"error": "You don't have the rights to create a model under others"})
                return
            exists = name in self.hub.repos
            if not exists:
                self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
                self.hub.repos[name]["private"] = wanted.get("private") or wanted.get("visibility") == "private"
            url = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
            self._answer(409 if exists else 200, url | ({"error": "You already created this repo"} if exists else {}))
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self._answer(200, {"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for one in json.loads(body)["objects"]:
                upload = {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}
                known = one["oid"] in self.hub.objects
                objects.append({"oid": one["oid"], "size": one["size"]} | ({} if known else
                                {"actions": {"upload": upload}}))  # fmt: skip
            self._answer(200, {"objects": objects, "transfer": "basic"}, Content_Type="application/vnd.git-lfs+json")
        elif "/commit/" in path:
            self._commit(path, body)
        else:
            self._fail(404, "RepoNotFound", f"no {path}")

    def _commit(self, path, body):
        repo, _, branch = path.removeprefix("/api/models/").partition("/commit/")
        entry = self._repo(repo)
        if entry is None:
            return
        if branch not in entry["refs"]:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            return
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.commit(repo, files, branch)
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def do_PUT(self):
        data = self._body()
        if not self._start():
            return
        oid = self.path.rpartition("/")[2]
        good = hashlib.sha256(data).hexdigest() == oid
        if good:
            self.hub.objects[oid] = data
        self._answer(200 if good else 400)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if not self._start():
            return
        name, _, rest = self.path.lstrip("/").partition("?")[0].partition("/resolve/")
        if not rest:
            name = name.removeprefix("api/models/").partition("/revision/")[0]
            entry = self._repo(name)
            if entry is not None:
                sha = entry["refs"]["main"]
                files = [{"rfilename": path} for path in entry["commits"][sha]]
                self._answer(200, {"id": name, "sha": sha, "siblings": files, "tags": [], "private": entry["private"]})
            return
        entry = self._repo(name)
        if entry is None:
            return
        revision, _, path = rest.partition("/")
        sha = entry["refs"].get(revision, revision)
        if sha not in entry["commits"]:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        data = entry["commits"][sha].get(path)
        if data is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        self._send(path, data, sha)

    def _send(self, path, data, sha):
        lfs = path.endswith(".safetensors")
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git}"', "Accept-Ranges": "bytes", "Content-Length": len(data)}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": len(data)}
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if lfs and self.hub.broken == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if lfs and self.hub.broken == "flipped":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.wfile.write(data)
