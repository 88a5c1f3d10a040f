"""A local server that speaks as much of the Hugging Face Hub as huggingface_hub asks for."""

import hashlib
import http.server
import os
import re
import signal
import threading
import urllib.parse


class Hub:
    """A server of dataset files. Each GET meets the next of `faults`: a status; 'cut': the connection ends
    after half; 'kill': so it does, and with it the process `victim`; 'corrupt': a flipped byte."""

    def __init__(self):
        self.files, self.faults, self.log, self.victim, self.on_get = {}, [], [], None, lambda: None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status, body=b"", length=None, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self):
                body = hub.files.get(urllib.parse.unquote(self.path))
                if body is None:
                    return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="c" * 40)
                stated = {"X_Repo_Commit": "c" * 40, "X_Linked_Size": str(len(body))}
                stated["X_Linked_ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
                return self.answer(200, length=len(body), ETag='"storage"', **stated)

            def do_GET(self):
                path, asked = urllib.parse.unquote(self.path), self.headers.get("Range")
                fault = hub.faults.pop(0) if hub.faults else ""
                hub.log.append((path.rpartition("/")[2], asked))
                hub.on_get()
                if isinstance(fault, int):
                    return self.answer(fault)
                body = hub.files[path]
                first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
                rest, status = body[first:], 206 if asked else 200
                if fault == "corrupt":
                    rest = rest[:-20] + bytes([rest[-20] ^ 1]) + rest[-19:]
                where = {"Content_Range": f"bytes {first}-{len(body) - 1}/{len(body)}"} if asked else {}
                if fault in ("cut", "kill"):
                    self.close_connection = True
                    self.answer(status, rest[: len(rest) // 2], len(rest), **where)
                    if fault == "kill":
                        os.kill(hub.victim, signal.SIGKILL)
                    return None
                return self.answer(status, rest, **where)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def offer(self, repo: str, revision: str, file: str, body: bytes):
        self.files[f"/datasets/{repo}/resolve/{revision}/{file}"] = body
