#!/usr/bin/env python3
"""Loads a server over the loopback and reports a table, a picture and whether the thresholds held.

    loadtests/load.py saturate            closed loop at concurrency 1, 4 and 16, start time and memory
    loadtests/load.py rate --rate 200     fixed arrival rate for --seconds; latency counts from when a request was due
    loadtests/load.py overload            what 70% and 300% of the saturated rate do
    loadtests/load.py photos              peak memory while 16-megapixel photos come in
    loadtests/load.py soak --minutes 30   steady rate; failures and growth of resident memory
    loadtests/load.py compare             beside FastAPI and ONNX Runtime with dense experts of the same shape

Each starts the server itself. Clients share its cores, so absolute figures are low: `saturate` and `compare` use Debian's
`wrk` where it is installed, the others are this process. A closed loop hides queueing, which is why `rate` exists.
`--json FILE` keeps the figures, `--picture FILE` draws them (needs matplotlib). Exit code 1 when a threshold was missed.
Needs Python 3.11; `photos` needs Pillow, `compare` what loadtests/requirements.txt lists. Build first:
cargo build --release.
"""
import argparse
import asyncio
import importlib.util
import io
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
MIB = 1 << 20


class Server:
    """A process that serves HTTP on a port of the loopback; used with `with`."""

    def __init__(self, command, is_ready, environment=None):
        started = time.monotonic()
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, env=environment)
        self.port, seen = None, []
        for line in self.process.stdout:
            seen.append(line)
            self.port = port_in(line) or self.port
            if self.port and is_ready(line):
                break
        else:
            sys.exit("the server did not start:\n" + "".join(seen))
        self.start_seconds = time.monotonic() - started
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def memory(self):
        """Resident bytes of the process: now, and at its peak."""
        fields = dict(line.split(":", 1) for line in
                      pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def port_in(line):
    for mark in ("address=127.0.0.1:", "running on http://127.0.0.1:"):
        if mark in line:
            return int("".join(c for c in line.split(mark, 1)[1].split()[0] if c.isdigit()))
    return None


def butterflyvit(arguments, *flags):
    # Of the embedded models the one that figures of earlier versions are about.
    store = ["--model-store", arguments.model_store] if arguments.model_store else ["--default-set", "cifar100"]
    # All clients come from one address here, and stand for many.
    command = [arguments.binary, "--listen", "127.0.0.1:0", "--client-share", "100", *store, *arguments.flag, *flags]
    return Server(command, lambda line: " ready " in line)


def files_and_targets(arguments):
    """What is sent, in turn: every image to every set named."""
    images = arguments.images or sorted((ROOT / "tests/images").glob("*.png"))
    targets = [f"/classify/{name}" for name in arguments.sets.split(",")] if arguments.sets else ["/classify"]
    return [(path, target) for path in images for target in targets]


def requests(arguments):
    return [request(target, pathlib.Path(path).read_bytes()) for path, target in files_and_targets(arguments)]


def request(target, body):
    head = f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + body


class Client:
    """One connection, kept open."""

    def __init__(self, port):
        self.port, self.reader, self.writer = port, None, None

    async def send(self, payload):
        """The status of the answer; 0 when none came."""
        for _ in range(2):  # A connection that idled too long was closed; once more on a new one.
            fresh = self.writer is None
            try:
                if fresh:
                    self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=MIB)
                self.writer.write(payload)
                head = await self.reader.readuntil(b"\r\n\r\n")
                fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if b": " in line)
                await self.reader.readexactly(int(fields[b"content-length"]))
                if fields.get(b"connection") == b"close":
                    self.close()
                return int(head.split(b" ", 2)[1])
            except (OSError, asyncio.IncompleteReadError):
                self.close()
                if fresh:
                    return 0
        return 0

    def close(self):
        if self.writer:
            self.writer.close()
        self.writer = None


class Tally:
    """Latencies of accepted requests, and how many of each status."""

    def __init__(self):
        self.latencies, self.statuses = [], {}

    def add(self, status, seconds):
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.latencies.append(seconds)

    def row(self, seconds):
        done = sorted(self.latencies) or [float("nan")]
        at = lambda share: round(1e3 * done[min(len(done) - 1, int(share * len(done)))], 2)
        return {"requests_per_second": round(len(self.latencies) / seconds, 1), "p50_ms": at(0.5), "p95_ms": at(0.95),
                "p99_ms": at(0.99), "statuses": {str(status): n for status, n in sorted(self.statuses.items())}}


async def closed_loop(port, payloads, concurrency, seconds):
    """Each client sends its next request when it has the last one's answer."""
    tally, end = Tally(), time.monotonic() + seconds

    async def client(number):
        connection, i = Client(port), number
        while time.monotonic() < end:
            begun = time.monotonic()
            tally.add(await connection.send(payloads[i % len(payloads)]), time.monotonic() - begun)
            i += 1
        connection.close()

    await asyncio.gather(*(client(number) for number in range(concurrency)))
    return tally.row(seconds)


# Sends the files of a folder in turn. `%s` are their names and the targets they go to.
WRK_SCRIPT = """
local requests, at = {}, 0
for path, target in string.gmatch([[%s]], "(%%S+) (%%S+)") do
  local file = io.open(path, "rb")
  wrk.headers["Content-Type"] = "application/octet-stream"
  requests[#requests + 1] = {target, file:read("*a")}
  file:close()  -- wrk has no room for more files than connections.
end
request = function()
  at = at %% #requests + 1
  return wrk.format("POST", requests[at][1], nil, requests[at][2])
end
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format('\\n{"requests": %%d, "seconds": %%f, "p50": %%f, "p95": %%f, "p99": %%f, "refused": %%d, "broken": %%d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(95) / 1e3,
    latency:percentile(99) / 1e3, errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
"""


def saturated(port, arguments, concurrency):
    """A closed loop. By `wrk` where it is installed, because a compiled client leaves more of the cores to the server."""
    if not shutil.which("wrk"):
        return asyncio.run(closed_loop(port, requests(arguments), concurrency, arguments.seconds))
    files = "\n".join(f"{path} {target}" for path, target in files_and_targets(arguments))
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK_SCRIPT % files)
        script.flush()
        command = ["wrk", "--threads", "1", "--connections", concurrency, "--duration", f"{int(arguments.seconds)}s",
                   "--script", script.name, f"http://127.0.0.1:{port}"]
        output = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
    found = json.loads(output.strip().splitlines()[-1])
    accepted = found["requests"] - found["refused"]
    statuses = {"200": accepted, "refused": found["refused"], "broken": found["broken"]}
    return {"requests_per_second": round(accepted / found["seconds"], 1),
            **{f"{share}_ms": round(found[share], 2) for share in ("p50", "p95", "p99")},
            "statuses": {status: n for status, n in statuses.items() if n}}


async def open_loop(port, payloads, rate, seconds, sample=None):
    """Requests leave when they are due, whatever became of those before; latency counts from then on."""
    tally, idle, running = Tally(), [], set()
    start = time.monotonic()

    async def one(due, payload):
        client = idle.pop() if idle else Client(port)
        status = await client.send(payload)
        tally.add(status, time.monotonic() - due)
        idle.append(client)

    for i in range(int(rate * seconds)):
        due = start + i / rate
        if due > time.monotonic():
            await asyncio.sleep(due - time.monotonic())
        elif i % 16 == 0:
            await asyncio.sleep(0)  # Late: let answers be read.
        task = asyncio.create_task(one(due, payloads[i % len(payloads)]))
        running.add(task)
        task.add_done_callback(running.discard)
        if sample:
            sample(time.monotonic() - start)
    await asyncio.gather(*running)
    for client in idle:
        client.close()
    return {"rate": round(rate, 1), **tally.row(seconds)}


def answered(row):
    """Every request was accepted or told to come back."""
    return set(row["statuses"]) <= {"200", "429"}


def saturate(arguments, report):
    with butterflyvit(arguments) as server:
        idle = server.memory()[0]
        rows = []
        for concurrency in (1, 4, 16):
            row = saturated(server.port, arguments, concurrency)
            rows.append({"concurrency": concurrency, **row})
            report.check(f"every request at concurrency {concurrency} was answered 200", set(row["statuses"]) == {"200"},
                         row["statuses"])
        loaded, peak = server.memory()
        facts = {"start_seconds": round(server.start_seconds, 3), "idle_mb": mb(idle), "loaded_mb": mb(loaded),
                 "peak_mb": mb(peak)}
    report.table("saturate", rows)
    report.facts("process", facts)
    report.check("start to ready within 0.3 s", facts["start_seconds"] <= 0.3, facts["start_seconds"])
    report.check("idle RSS at most 28 MB", facts["idle_mb"] <= 28, facts["idle_mb"])
    return rows


def rate(arguments, report):
    with butterflyvit(arguments) as server:
        row = asyncio.run(open_loop(server.port, requests(arguments), arguments.rate, arguments.seconds))
    report.table("rate", [row])
    report.check("every request was answered 200 or 429", answered(row), row["statuses"])
    report.check(f"p99 at most {arguments.p99_ms} ms", row["p99_ms"] <= arguments.p99_ms, row["p99_ms"])


def overload(arguments, report):
    """Capacity is what an open loop can be served: found by a closed loop with enough clients to keep it busy."""
    payloads = requests(arguments)
    with butterflyvit(arguments) as server:
        full = asyncio.run(closed_loop(server.port, payloads, 16, arguments.seconds))["requests_per_second"]
        rows = []
        for share in (0.7, 3.0):
            row = asyncio.run(open_loop(server.port, payloads, share * full, arguments.seconds))
            rows.append({"load": f"{share:.0%}", **row})
    report.table("overload", rows)
    calm, loaded = rows
    report.check("at 300% every request was answered 200 or 429", answered(loaded), loaded["statuses"])
    # The client takes a share of the cores too, more of it the more it sends.
    goodput = loaded["requests_per_second"] / full
    report.check("at 300% at least 60% of the capacity is answered 200", goodput >= 0.6, f"{goodput:.0%}")
    ratio = loaded["p99_ms"] / calm["p99_ms"]
    report.check("p99 of accepted requests at 300% at most 3x that at 70%", ratio <= 3, f"{ratio:.1f}x")


def photo(width, height, **options):
    """A photo-like JPEG: smooth colour with texture."""
    from PIL import Image
    small = Image.effect_noise((width // 8, height // 8), 60).resize((width, height), Image.Resampling.BICUBIC)
    bands = [small, small.transpose(Image.Transpose.FLIP_LEFT_RIGHT), small.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    out = io.BytesIO()
    Image.merge("RGB", bands).save(out, options.pop("format", "JPEG"), **options)
    return out.getvalue()


def photos(arguments, report):
    kinds = {
        "JPEG": photo(4608, 3456, quality=85),
        "progressive JPEG": photo(4608, 3456, quality=85, progressive=True),
        "turned JPEG": photo(4608, 3456, quality=85, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        "PNG": photo(4608, 3456, format="PNG", compress_level=1),
    }
    target = "/classify" if arguments.model_store else "/classify/imagenet"
    rows = []
    for kind, body in kinds.items():
        with butterflyvit(arguments, "--max-body", "64MiB", "--body-memory", "64MiB") if len(body) > 16 * MIB \
                else butterflyvit(arguments) as server:
            idle = server.memory()[0]
            row = asyncio.run(closed_loop(server.port, [request(target, body)], 16, arguments.seconds))
            rows.append({"photo": kind, "file_mb": mb(len(body)), "idle_mb": mb(idle), "peak_mb": mb(server.memory()[1]),
                         **row})
    report.table("photos", rows)
    for row in rows:
        allowed = {"200", "429", "504"}
        report.check(f"{row['photo']}: answered", "200" in row["statuses"] and set(row["statuses"]) <= allowed,
                     row["statuses"])
        # Both models are in memory, and two bodies of 30 MB where PNG files come.
        report.check(f"{row['photo']}: peak RSS at most 112 MB", row["peak_mb"] <= 112, row["peak_mb"])


def soak(arguments, report):
    """Drift compares the last quarter with the second: in the first, buffers reach their size.

    A burst comes first, so that they have it whatever meets later. A machine that stands still for a second finds more
    than the queue holds, of which some are told to come back: an answer, if a rare one, and no failure.
    """
    samples = []
    with butterflyvit(arguments) as server:
        asyncio.run(closed_loop(server.port, requests(arguments), 128, 2))
        def sample(now):
            if len(samples) <= now:
                samples.append(server.memory()[0])
        seconds = arguments.minutes * 60
        row = asyncio.run(open_loop(server.port, requests(arguments), arguments.rate, seconds, sample))
    quarter = len(samples) // 4
    early, late = statistics.median(samples[quarter:2 * quarter]), statistics.median(samples[3 * quarter:])
    drift = (late - early) / early
    report.table("soak", [{"minutes": arguments.minutes, **row, "rss_mb": mb(late), "drift_percent": round(100 * drift, 2)}])
    refused = row["statuses"].get("429", 0)
    report.check("no failure", answered(row), row["statuses"])
    report.check("at most one in a hundred told to come back", 100 * refused <= sum(row["statuses"].values()), refused)
    report.check("RSS drift below 2%", drift < 0.02, f"{drift:.2%}")


def compare(arguments, report):
    folder = ROOT / "loadtests/dense_onnx"
    model = arguments.work / "dense-experts.onnx"
    subprocess.run([arguments.python, folder / "make_model.py", model], check=True)
    rows = []
    dense = [arguments.python, "-u", folder / "serve.py", model]
    for name, start in (("ButterflyViT Gateway", lambda: butterflyvit(arguments)),
                        ("FastAPI + ONNX Runtime, dense experts",
                         lambda: Server(dense, lambda line: "running on" in line))):
        with start() as server:
            idle = server.memory()[0]
            for concurrency in (1, 4, 16):
                row = saturated(server.port, arguments, concurrency)
                rss, peak = server.memory()
                rows.append({"server": name, "concurrency": concurrency, **row, "start_s": round(server.start_seconds, 2),
                             "idle_mb": mb(idle), "rss_mb": mb(rss), "peak_mb": mb(peak)})
                report.check(f"{name}: every request was answered", set(row["statuses"]) == {"200"}, row["statuses"])
    report.table("compare", rows)
    for ours, theirs in zip(rows[:3], rows[3:]):
        speed = ours["requests_per_second"] / theirs["requests_per_second"]
        report.check(f"at concurrency {ours['concurrency']} at least 10x the requests/s", speed >= 10, f"{speed:.1f}x")
    report.check("at most a tenth of the RSS", rows[2]["rss_mb"] * 10 <= rows[5]["rss_mb"],
                 f"{rows[2]['rss_mb']} MB beside {rows[5]['rss_mb']} MB")


def mb(size):
    return round(size / 1e6, 1)


class Report:
    """Tables and thresholds, printed as they come and kept for --json."""

    def __init__(self):
        self.content, self.missed = {"machine": machine()}, []
        print(", ".join(f"{name} {value}" for name, value in self.content["machine"].items()))

    def table(self, name, rows):
        self.content[name] = rows
        columns = list(rows[0])
        print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        for row in rows:
            print(f"| {' | '.join(cell(row[column]) for column in columns)} |")

    def facts(self, name, facts):
        self.content[name] = facts
        print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))

    def check(self, what, held, got=""):
        print(f"{'ok    ' if held else 'MISSED'} {what}: {got}")
        if not held:
            self.missed.append(what)


def cell(value):
    return ", ".join(f"{n} x {status}" for status, n in value.items()) if isinstance(value, dict) else str(value)


def machine():
    """What every figure should stand beside."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    names = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].split(": ", 1)[1] if names else platform.machine()
    return {"commit": commit.strip() or "unknown", "cpu": cpu, "cores": len(os.sched_getaffinity(0)),
            "load_before": round(os.getloadavg()[0], 2)}


def draw(content, path):
    """Bars of requests/s and of p50, p95 and p99 for each row of each table."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [(name, row) for name, table in content.items() if isinstance(table, list) for row in table]
    labels = [" ".join(str(row[key]) for key in ("server", "photo", "load", "concurrency", "minutes") if key in row) or name
              for name, row in rows]
    figure, (rates, latencies) = pyplot.subplots(1, 2, figsize=(11, 1 + 0.45 * len(rows)), sharey=True)
    places = range(len(rows))
    rates.barh(places, [row["requests_per_second"] for _, row in rows], color="#3b6ea5")
    rates.set_yticks(places, labels)
    rates.invert_yaxis()
    rates.set_xlabel("accepted requests/s")
    for offset, share, colour in ((-0.25, "p50_ms", "#9ecae1"), (0, "p95_ms", "#4292c6"), (0.25, "p99_ms", "#08519c")):
        latencies.barh([place + offset for place in places], [row[share] for _, row in rows], 0.25, color=colour,
                       label=share.removesuffix("_ms"))
    latencies.set_xscale("log")
    latencies.set_xlabel("latency, ms")
    latencies.legend()
    facts = content["machine"]
    figure.suptitle(f"{facts['cpu']}, {facts['cores']} cores, commit {facts['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tests = {test.__name__: test for test in (saturate, rate, overload, photos, soak, compare)}
    parser.add_argument("test", choices=tests)
    parser.add_argument("--binary", type=pathlib.Path, default=TARGET / "release/butterflyvit", help="the server to load")
    parser.add_argument("--model-store", type=pathlib.Path, help="serve this store instead of the embedded model")
    parser.add_argument("--sets", help="expert sets to take turns, separated by commas")
    parser.add_argument("--images", nargs="+", type=pathlib.Path, help="files to send in turn; the PNGs of tests/images")
    parser.add_argument("--flag", action="append", default=[], help="a flag for the server, as --flag=--max-batch=4")
    parser.add_argument("--seconds", type=float, default=10, help="length of each measurement")
    parser.add_argument("--rate", type=float, default=100, help="requests per second of `rate` and `soak`")
    parser.add_argument("--minutes", type=float, default=30, help="length of `soak`")
    parser.add_argument("--p99-ms", type=float, default=100, help="threshold of `rate`")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the packages `compare` needs")
    parser.add_argument("--work", type=pathlib.Path, default=TARGET, help="folder for the dense model")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    parser.add_argument("--picture", type=pathlib.Path, help="draw the figures there")
    arguments = parser.parse_args()
    if arguments.picture and not importlib.util.find_spec("matplotlib"):
        parser.error("--picture needs matplotlib")
    for folder in (arguments.work, *(path.parent for path in (arguments.json, arguments.picture) if path)):
        folder.mkdir(parents=True, exist_ok=True)
    report = Report()
    tests[arguments.test](arguments, report)
    if arguments.json:
        arguments.json.write_text(json.dumps({**report.content, "missed": report.missed}, indent=2) + "\n")
    if arguments.picture:
        draw(report.content, arguments.picture)
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
