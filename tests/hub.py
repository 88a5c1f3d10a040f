"""A local server that speaks as much of the Hugging Face Hub as huggingface_hub asks for."""

import hashlib
import http.server
import threading
import urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        headers |= {"Content-Length": len(body), "X-Repo-Commit": "c" * 40}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if self.close_connection else body)

    def do_GET(self):
        hub, path, part = self.server, urllib.parse.unquote(self.path), self.headers.get("Range")
        if path not in hub.files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        body, fault = hub.files[path], None
        if self.command == "GET":
            hub.log.append((path.rpartition("/")[2], part))
            fault = hub.faults.pop(0) if hub.faults else None
        if isinstance(fault, int):
            return self.answer(fault)
        self.close_connection, etag = fault == "cut", f'"{hashlib.sha256(body).hexdigest()}"'
        if part is None:
            return self.answer(200, body, ETag=etag)
        first, size = int(part.removeprefix("bytes=").rstrip("-")), len(body)
        return self.answer(206, body[first:], ETag=etag, Content_Range=f"bytes {first}-{size - 1}/{size}")

    do_HEAD = do_GET


class Hub(http.server.ThreadingHTTPServer):
    """A server of files. Each GET meets the next of `faults`: a status, or 'cut' (the connection ends after
    half)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log = {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def offer(self, repo: str, revision: str, file: str, body: bytes):
        self.files[f"/datasets/{repo}/resolve/{revision}/{file}"] = body
