"""A local server that speaks as much of the Hugging Face Hub as huggingface_hub asks for."""

import hashlib
import http.server
import threading
import urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(self.path)
        status = 200 if path in hub.files else 404
        if self.command == "GET" and status == 200:
            status = hub.faults.pop(0) if hub.faults else 200
            hub.log.append((path.rpartition("/")[2], status))
        body = hub.files[path] if status == 200 else b""
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


class Hub(http.server.ThreadingHTTPServer):
    """A server of files. Each GET is answered with the next status of `faults`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log = {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def offer(self, repo: str, revision: str, file: str, body: bytes):
        self.files[f"/datasets/{repo}/resolve/{revision}/{file}"] = body
