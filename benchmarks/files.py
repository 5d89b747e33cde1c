"""How many files a store has, and what that costs who attaches its basis from a disk and from a web server.

python benchmarks/files.py --model MODEL --data DATA.jsonl --template "{question}\\n{answer}" --store STORE

Makes the store with default options, but of few tokens, and a basis of rank 256 where there is none. Run it in turn
with two versions of prep on the path, and a store for each. The server answers a request after --delay milliseconds.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from load import Sample, kept, timed

import prep
from prep.preprocess.model import loading as models


class Parts(BaseHTTPRequestHandler):
    """GET of files below `root`, whole or in part, each answered after `delay` seconds."""

    protocol_version = "HTTP/1.1"
    root, delay = Path(), 0.0

    def do_GET(self) -> None:
        """One file."""
        time.sleep(self.delay)
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(max(end - start, 0))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def serve(root: Path, delay: float) -> None:
    """Serve until the standard input ends, and say where."""
    Parts.root, Parts.delay = root, delay
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parts)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


def make(options: argparse.Namespace) -> None:
    """The store that is to be measured."""
    if not options.store.exists():
        text = {"data": options.data, "template": options.template, "num_sequences": 16, "seq_len": 64}
        prep.covariance(options.model, **text, store=options.store, quiet=True)
        prep.decompose(options.store, quiet=True)


def main() -> None:
    """Count the files, attach in turn from the disk and from the server, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--template")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--delay", type=float, default=20, help="milliseconds before the server answers")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.serve:
        serve(options.store, options.delay / 1000)
        return
    make(options)
    net = models.load_model(options.model, dtype="float32")
    command = [sys.executable, __file__, "--serve", "--store", str(options.store), "--delay", str(options.delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin and server.stdout
        places = {"disk": str(options.store), "server": f"http://127.0.0.1:{int(server.stdout.readline())}"}
        samples: dict[str, list[Sample]] = {name: [] for name in places}
        processor: dict[str, list[float]] = {name: [] for name in places}
        for _ in range(options.rounds + 1):
            for name, place in places.items():
                begun = time.process_time()
                work = timed(lambda at=place: prep.attach(net, at, core="gain", basis="full", rank=options.rank))
                samples[name].append(work)
                processor[name].append(time.process_time() - begun)
                prep.detach(net)
        server.stdin.close()
    medians = {name: statistics.median(kept(found[1:])) for name, found in samples.items()}  # the first ones warm up
    files = [file for file in options.store.rglob("*") if file.is_file()]
    said = {"files": len(files), "MB": sum(file.stat().st_size for file in files) / 1e6, "seconds": medians}
    print(f"{said['files']:,} files, {said['MB']:,.0f} MB")
    for name, value in medians.items():
        used = statistics.median(processor[name][1:])
        print(f"attach from {name:8}{value:8.3f} s, of which the processor works {used:.3f} s")
    if options.json:
        options.json.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
