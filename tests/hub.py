"""A local server that speaks as much of the Hugging Face Hub as huggingface_hub asks for."""

import hashlib
import http.server
import threading
import urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes, length: int, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        body = self.server.files.get(urllib.parse.unquote(self.path))
        if body is None:
            return self.answer(404, b"", 0, X_Error_Code="EntryNotFound", X_Repo_Commit="c" * 40)
        stated = {"X_Linked_Size": str(len(body)), "X_Linked_ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        return self.answer(200, b"", len(body), X_Repo_Commit="c" * 40, ETag='"storage"', **stated)

    def do_GET(self):
        hub, path, asked = self.server, urllib.parse.unquote(self.path), self.headers.get("Range")
        if path not in hub.files:
            return self.answer(404, b"", 0)
        hub.log.append((path.rpartition("/")[2], asked))
        hub.on_get()
        fault = hub.faults.pop(0) if hub.faults else None
        if isinstance(fault, int):
            return self.answer(fault, b"", 0)
        body, status, headers = hub.files[path], 200, {}
        if asked:
            first, size, status = int(asked.removeprefix("bytes=").rstrip("-")), len(body), 206
            body, headers = body[first:], {"Content_Range": f"bytes {first}-{size - 1}/{size}"}
        length = len(body)
        if fault == "corrupt":
            body = body[:-20] + bytes([body[-20] ^ 1]) + body[-19:]
        if fault == "cut":
            body, self.close_connection = body[: length // 2], True
        return self.answer(status, body, length, **headers)


class Hub(http.server.ThreadingHTTPServer):
    """A server of dataset files. Each GET meets the next of `faults`: a status, 'cut' (the connection ends
    after half) or 'corrupt' (a flipped byte)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log, self.on_get = {}, [], [], lambda: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def offer(self, repo: str, revision: str, file: str, body: bytes):
        self.files[f"/datasets/{repo}/resolve/{revision}/{file}"] = body
