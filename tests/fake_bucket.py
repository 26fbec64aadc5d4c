"""A simulated Google Cloud Storage bucket on this machine, with the part of its JSON API that TensorStore uses."""

import contextlib
import http.server
import json
import os
import re
import threading
import urllib.parse


@contextlib.contextmanager
def bucket():
    """The objects of gs://bucket/ by their names, a dict of bytes, served while the block runs.

    Within it TensorStore asks this server for every path in a bucket, here and in processes begun here.
    """
    objects, lock = {}, threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            path, query = self._asked()
            if path is None:
                return self._answer(404)
            if path == "":
                begin, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
                with lock:
                    found = [
                        {"name": name, "size": str(len(data)), "generation": "1"}
                        for name, data in sorted(objects.items())
                        if begin <= name < end
                    ]
                return self._answer(200, json.dumps({"items": found}).encode())
            with lock:
                data = objects.get(path)
            if data is None:
                return self._answer(404)
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if part is None:
                return self._answer(200, data)
            begin, end = int(part[1]), int(part[2] or len(data) - 1) + 1
            if begin >= len(data):
                return self._answer(416)
            span = f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}"
            return self._answer(206, data[begin:end], **{"Content-Range": span})

        def do_POST(self):
            _, query = self._asked()
            data = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                objects[query["name"]] = data
            answer = {"name": query["name"], "size": str(len(data)), "generation": "1"}
            self._answer(200, json.dumps(answer).encode())

        def do_DELETE(self):
            path, _ = self._asked()
            with lock:
                found = objects.pop(path, None)
            self._answer(404 if found is None else 204)

        def _asked(self):
            url = urllib.parse.urlsplit(self.path)
            found = re.fullmatch(r"(?:/upload)?/storage/v1/b/bucket/o/?(.*)", url.path)
            return found and urllib.parse.unquote(found[1]), dict(urllib.parse.parse_qsl(url.query))

        def _answer(self, code, data=b"", **headers):
            self.send_response(code)
            for name, value in {"x-goog-generation": "1", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    names = {"TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield objects
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
