"""A program for pods that are looked at from outside: it behaves as its model's label `behave` says.

It stands where a model's process stands, so that each way to fail can be had at will; the statuses that it brings about
are the kubelet's own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LABELS = json.loads(os.environ["EKIBEN_MODEL_METADATA"])["labels"]
CHECKED = {"verified": "expected", "rows": 3, "matched": 3}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, body = 200, {"version": os.environ["EKIBEN_MODEL_VERSION"], "path": self.path, "checked": CHECKED}
        if self.path == "/crash":
            os._exit(7)
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def main() -> None:
    print("subject of version", os.environ["EKIBEN_MODEL_VERSION"], flush=True)
    behave = LABELS.get("behave", "well")
    if behave == "golden":
        words = {"code": "golden_sample_failed", "message": "row 0: 0.7 was expected, 0.2 came", "hint": "Train again."}
        with open("/dev/termination-log", "w") as log:
            json.dump(words, log)
        sys.exit(10)
    if behave == "crash":
        print("about to fall", flush=True)
        sys.exit(3)
    if behave == "memory":
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(1 << 20) * 16))
    if behave == "disk":
        with open("/tmp/flood", "wb") as flood:
            for _ in range(256):
                flood.write(bytes(1 << 20))
        time.sleep(3600)
    if behave == "hang":
        time.sleep(3600)
    ThreadingHTTPServer(("", 3000), Answer).serve_forever()


main()
