#!/usr/bin/env python3
"""Measures a server that holds many expert sets, and prints a table.

Makes a store of random sets with `butterflyvit-trainer init` (timing does not depend on the weights), starts
`butterflyvit` on it and drives it over the loopback. Only the standard library is needed. Build first:
`cargo build --release`.
"""

import argparse
import http.client
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIB = 1 << 20


class Server:
    """A running `butterflyvit`; used with `with`."""

    def __init__(self, store, binaries, *flags):
        key = pathlib.Path(store) / "admin-key"
        command = [binaries / "butterflyvit", "--listen", "127.0.0.1:0", "--model-store", store,
                   "--client-share", "100", "--admin-key-out", key, *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if "listening address=" in line:
                self.port = int(line.rsplit(":", 1)[1])
            if " ready " in line:
                break
        else:
            sys.exit("the server did not start:\n" + "".join(seen))
        self.key = key.read_text().strip()
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def rss(self):
        """Resident bytes of the process."""
        pages = int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def listing(self):
        return json.loads(ask(self.connect(), "GET", "/sets"))


def ask(connection, method, path, body=None, key=None):
    connection.request(method, path, body, {"X-Api-Key": key} if key else {})
    response = connection.getresponse()
    answer = response.read()
    if response.status not in (200, 201, 202):
        sys.exit(f"{method} {path}: {response.status} {answer.decode(errors='replace')}")
    return answer


def classify(connection, name, image):
    """Milliseconds of one request."""
    start = time.perf_counter()
    ask(connection, "POST", f"/classify/{name}", image)
    return (time.perf_counter() - start) * 1e3


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def throughput(server, image, names, seconds, clients=8):
    """Images per second of a closed loop whose clients take sets at random."""
    end, counts = time.perf_counter() + seconds, [0] * clients

    def client(number):
        connection, choice = server.connect(), random.Random(number)
        while time.perf_counter() < end:
            classify(connection, choice.choice(names), image)
            counts[number] += 1

    threads = [threading.Thread(target=client, args=[number]) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def resident_sets(store, options, image, names):
    """Rows: how many of `names` are in memory after each was asked once, by budget."""
    for budget in [64, 128, 256, 300]:
        with Server(store, options.binaries, "--memory-budget", f"{budget}MiB") as server:
            connection = server.connect()
            classify(connection, names[0], image)
            before, (first, *rest) = server.rss(), names
            accounted = resident = 0
            for count, name in enumerate(rest):
                progress(f"budget {budget} MiB: {count}/{len(rest)} sets")
                ask(connection, "POST", f"/v2/repository/models/{name}/load", key=server.key)
            sets = [view for view in server.listing()["sets"] if view["resident_bytes"]]
            resident, accounted = len(sets), sum(view["resident_bytes"] for view in sets if view["name"] != first)
            grown = server.rss() - before
            bar = "1000" if budget == 300 and len(names) >= 1000 else ""
            yield f"sets resident of {len(names)} in {budget} MiB", f"{resident}", bar
            if budget == 300:
                yield "RSS growth per set / accounted bytes", f"{grown / max(accounted, 1):.3f}", "0.85 to 1.15"


def cold_and_hot(store, options, image, names):
    with Server(store, options.binaries, "--memory-budget", "300MiB") as server:
        connection, hot, cold = server.connect(), names[0], names[1:201]
        classify(connection, hot, image)
        for name in cold:
            (store / "expert-sets" / name / "1.safetensors").read_bytes()  # into the page cache
        hot_times, cold_times = [], []
        for count, name in enumerate(cold):
            progress(f"cold against hot: {count}/{len(cold)}")
            hot_times.append(classify(connection, hot, image))
            cold_times.append(classify(connection, name, image))
        # Pairs that follow each other, so that a busy neighbour hits both.
        extra = statistics.median(cold - hot for cold, hot in zip(cold_times, hot_times))
        tail = percentile(cold_times, 0.99) - statistics.median(hot_times)
        yield "first answer of a cold set, beyond a hot one, median", f"{extra:.2f} ms", "5 ms"
        yield "the same, p99", f"{tail:.2f} ms", "20 ms"

        # Pairs, one after the other, so that a busy neighbour hits both; the middle ratio counts.
        ratios = []
        for turn in range(5):
            progress(f"one set against 100: {turn}/5")
            alone = throughput(server, image, [hot], options.seconds)
            mixed = throughput(server, image, names[:100], options.seconds)
            ratios.append((mixed / alone, alone, mixed))
        ratio, alone, mixed = sorted(ratios)[2]
        yield "100 sets at random / one set, images/s", f"{ratio:.3f} ({mixed:.0f} / {alone:.0f})", "at least 0.85"


def hot_while_loading(store, options, image, names):
    with Server(store, options.binaries, "--memory-budget", "300MiB") as server:
        connection, hot, cold = server.connect(), names[0], names[1:101]
        alone, loading = [], []
        for turn in range(5):
            progress(f"a hot set while 100 load: {turn}/5")
            start, first = time.perf_counter(), []
            done = threading.Event()

            def load():
                other = server.connect()
                for name in cold:
                    ask(other, "POST", f"/v2/repository/models/{name}/load", key=server.key)
                done.set()

            while time.perf_counter() < start + options.seconds:
                first.append(classify(connection, hot, image))
            alone += first
            loader = threading.Thread(target=load)
            loader.start()
            while not done.is_set():
                loading.append(classify(connection, hot, image))
            loader.join()
            for name in cold:
                ask(connection, "POST", f"/v2/repository/models/{name}/unload", key=server.key)
        quiet, busy = percentile(alone, 0.99), percentile(loading, 0.99)
        yield "p99 of a hot set while 100 load / alone", f"{busy / quiet:.2f} ({busy:.1f} / {quiet:.1f} ms)", "at most 2"


def cycles(store, options, image, names):
    with Server(store, options.binaries, "--memory-budget", "64MiB") as server:
        connection, total = server.connect(), options.cycles
        classify(connection, names[0], image)
        for count in range(total):
            name = names[1 + count % 50]
            ask(connection, "POST", f"/v2/repository/models/{name}/load", key=server.key)
            ask(connection, "POST", f"/v2/repository/models/{name}/unload", key=server.key)
            if count == 99:
                before = server.rss()
            if count % 100 == 0:
                progress(f"load and unload: {count}/{total}")
        change = server.rss() / before - 1
        yield f"RSS after {total} load/unload cycles against after 100", f"{change:+.2%}", "within 5%"


MEASURES = {measure.__name__: measure for measure in [resident_sets, cold_and_hot, hot_while_loading, cycles]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=1000, help="expert sets to make (default 1000, at least 202)")
    parser.add_argument("--experts", type=int, default=8, help="experts of each (default 8)")
    parser.add_argument("--preset", default="paper", help="configuration (default paper)")
    parser.add_argument("--seconds", type=float, default=5, help="length of each loop (default 5)")
    parser.add_argument("--cycles", type=int, default=10_000, help="load/unload cycles (default 10000)")
    parser.add_argument("--binaries", type=pathlib.Path, default=ROOT / "target/release", help="folder of the binaries")
    parser.add_argument("--store", type=pathlib.Path, help="make the sets here, or use those of an earlier run")
    parser.add_argument("--only", choices=MEASURES, action="append", help="what to measure (default everything)")
    options = parser.parse_args()
    if options.sets < 202 or options.cycles < 101:
        parser.error("at least 202 sets and 101 cycles are needed")
    image = (ROOT / "tests/images/test-00.png").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or pathlib.Path(folder)
        if not (store / "expert-sets").exists():
            progress("making the store")
            subprocess.run([options.binaries / "butterflyvit-trainer", "init", "--preset", options.preset, "--experts",
                            str(options.experts), "--sets", str(options.sets), "--store", store], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        names = sorted(path.name for path in (store / "expert-sets").iterdir())
        print("| what | measured | bar |\n| --- | --- | --- |")
        for measure in options.only or MEASURES:
            for row in MEASURES[measure](store, options, image, names):
                progress("")
                print("| {} | {} | {} |".format(*row), flush=True)


if __name__ == "__main__":
    main()
