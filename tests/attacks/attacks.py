#!/usr/bin/env python3
"""Attacks a server of its own with what hostile or broken clients send, and prints what its memory came to.

    tests/attacks/attacks.py --binary target/release/butterflyvit [--pictures FOLDER ...] [--markdown]

Every attack comes from many addresses at once (127.0.0.1 to 127.0.0.64), so that shares of one client do not help the
server; what is refused for want of room comes again. The last attack is all of the others together. Fails when an answer
blames the server, when the server does not answer afterwards, or when its memory rises by more than it may: decode memory,
body memory and 16 MiB, and for all attacks at once the connections and long answers beside that. Needs Pillow.
"""

import argparse
import concurrent.futures
import gzip
import io
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib

from PIL import Image, ImageFile

ROOT = pathlib.Path(__file__).resolve().parents[2]
MIB = 1 << 20
CLIENTS = 16
# Libjpeg cannot wait in the middle of a progressive file.
ImageFile.MAXBLOCK = 64 * MIB
# Answers that lay no blame on the server; 0 stands for a connection that the server closed.
FAIR = {0, 200, 201, 400, 401, 403, 404, 405, 408, 409, 411, 413, 415, 422, 429, 431, 503, 507}


class Server:
    def __init__(self, binary, flags):
        command = [binary, "--listen", "127.0.0.1:0", "--trust-loopback", *flags]
        self.log = tempfile.NamedTemporaryFile(prefix="attacks-", suffix=".log")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.port = self.wait_for_port()
        self.wait_until_ready()

    def wait_for_port(self):
        while self.process.poll() is None:
            for line in pathlib.Path(self.log.name).read_text(errors="replace").splitlines():
                if "listening address=" in line:
                    return int(line.split("address=")[1].split()[0].rsplit(":", 1)[1])
            time.sleep(0.05)
        sys.exit("the server ended before it listened:\n" + pathlib.Path(self.log.name).read_text(errors="replace"))

    def wait_until_ready(self):
        while self.get("/v2/health/ready") != 200:
            time.sleep(0.1)

    def get(self, path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def status(self, field):
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        sys.exit("the server ended")

    def reset_peak(self):
        pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def log_bytes(self):
        return os.path.getsize(self.log.name)

    def stop(self):
        self.process.terminate()
        self.process.wait()


def connect(port, client):
    """A connection from an address of the client's own."""
    stream = socket.socket()
    stream.settimeout(30)
    stream.bind((f"127.0.0.{1 + client % 64}", 0))
    stream.connect(("127.0.0.1", port))
    return stream


def exchange(port, client, head, body, linger=0.0):
    """Sends a request, waits for `linger` seconds without reading, and returns the status of the answer, or 0."""
    try:
        with connect(port, client) as stream:
            try:
                stream.sendall(head + body)
            except OSError:
                pass  # Refused before the end, which is what the answer says.
            time.sleep(linger)
            first = stream.recv(64)
            status = int(first.split()[1]) if first.startswith(b"HTTP/") else 0
            while stream.recv(1 << 16):
                pass
            return status
    except OSError:
        return status if "status" in locals() else 0


def request(path, body, *headers, method="POST"):
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode(), body


# Pictures.


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks, depth=8, colour=2, interlaced=0):
    """A PNG of zeros with more chunks."""
    row = 1 + (width * {0: 1, 2: 3, 6: 4}[colour] * depth + 7) // 8
    pack = zlib.compressobj(9)
    data = b"".join([pack.compress(bytes(row)) for _ in range(height)] + [pack.flush()])
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = [png_chunk(b"IHDR", head), *chunks, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb(size):
    """That many zeros, deflated."""
    pack = zlib.compressobj(9)
    return b"".join([pack.compress(bytes(MIB)) for _ in range(size // MIB)] + [pack.flush()])


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width, height):
    return Image.frombytes("RGB", (width, height), os.urandom(width * height * 3))


def scan_bomb():
    """A progressive JPEG whose last scan stands there a thousand times."""
    jpeg = encoded(Image.new("L", (4000, 3000), 90), "JPEG", progressive=True, quality=50)
    last = jpeg.rindex(b"\xff\xda")
    scan = jpeg[last:-2]
    return jpeg[:last] + scan * 1000 + jpeg[-2:]


def pictures():
    profile = png_chunk(b"iCCP", b"p\0\0" + bomb(256 * MIB))
    text = png_chunk(b"zTXt", b"t\0\0" + bomb(256 * MIB))
    photo = noise(1000, 750).resize((4000, 3000))
    yield "bombs in colour profile and text of a PNG", [png(64, 64, profile), png(64, 64, text)]
    yield "PNG of 16 megapixels, 16 bits, interlaced", [
        png(4000, 4000, depth=16, colour=6),
        png(4000, 4000, depth=16, colour=6, interlaced=1),
    ]
    yield "JPEG of 12 megapixels, progressive", [
        encoded(photo, "JPEG", progressive=True, quality=80, subsampling=s) for s in (0, 1, 2)
    ]
    yield "JPEG with a scan that repeats", [scan_bomb()]
    yield "WebP, GIF and BMP of 12 megapixels", [
        encoded(photo.resize((2000, 1500)), "WEBP", lossless=True, method=0),
        encoded(Image.new("RGB", (4000, 4000)), "WEBP", lossless=True),
        encoded(photo, "WEBP", method=0),
        encoded(photo, "GIF"),
        encoded(photo.resize((2300, 2300)), "BMP"),
    ]


# Requests.


def tensor(data, shape, kind="FP32", outputs=None):
    inputs = [{"name": "input", "datatype": kind, "shape": shape, "data": data}]
    return {"inputs": inputs, **({"outputs": outputs} if outputs else {})}


def documents():
    infer = "/v2/models/cifar100/infer"
    many = b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1,1],"data":['
    numbers = b'{"inputs":[{"name":"input","datatype":"FP32","shape":[1,32,32,3],"data":['
    size = 15 * MIB
    bodies = {
        "numbers": numbers + b"0," * (size // 2) + b"0]}]}",
        "numbers in lists": numbers + b"[0]," * (size // 4) + b"[0]]}]}",
        "empty strings": many + b'"",' * (size // 3) + b'""]}]}',
        "outputs": json.dumps(tensor([0], [1], outputs=[{"name": "logits"}] * 100_000)).encode(),
        "shape": json.dumps(tensor([0], [1] * 100_000)).encode(),
        "an image in base64": b'{"inputs":"' + b"AAAA" * (size // 4) + b'"}',
        "images in base64": b'{"inputs":[' + b",".join([b'"' + b"QUJD" * (size // 128) + b'"'] * 32) + b"]}",
        "nesting": b"[" * size,
        "a long name": b'{"' + b"x" * size + b'":1}',
        "unknown fields": b"{" + b",".join(b'"f%d":1' % i for i in range(size // 14)) + b"}",
    }
    for path in (infer, "/classify", "/hf/cifar100"):
        yield from (request(path, body, "Content-Type: application/json") for body in bodies.values())
    binary = json.dumps({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [4_000_000], "parameters": {"binary_data_size": 16_000_000}}]})
    body = binary.encode() + bytes(15 * MIB)
    yield request(infer, body, f"Inference-Header-Content-Length: {len(binary)}")


def forms():
    kind = "Content-Type: multipart/form-data; boundary=edge"
    part = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n\r\n'
    header = b'--edge\r\nContent-Disposition: form-data; name="' + b"x" * (8 * MIB) + b'"\r\n\r\n\r\n--edge--\r\n'
    headers = b"--edge\r\n" + b"A: b\r\n" * MIB + b"\r\n\r\n--edge--\r\n"
    for body in (part * (15 * MIB // len(part)) + b"--edge--\r\n", header, headers):
        yield request("/classify", body, kind)


def compressed():
    pack = gzip.compress(bytes(256 * MIB), 9)
    yield request("/classify", pack, "Content-Encoding: gzip")
    yield request("/classify", bomb(256 * MIB), "Content-Encoding: deflate")
    yield request("/v2/models/cifar100/infer", pack, "Content-Encoding: gzip", "Content-Type: application/json")


def long_answers():
    """The most that one request can ask for."""
    image = encoded(Image.new("RGB", (32, 32), (90, 140, 60)), "PNG")
    part = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + image + b"\r\n"
    body = part * 32 + b"--edge--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=edge"
    yield request("/classify/cifar100?top_k=100&routing=true", body, kind)


def artifacts():
    """Uploads that are large, or say so."""
    values = "[" + "0," * 400_000 + "0]"
    head = json.dumps({"__metadata__": {"butterflyvit": values, "sha256": "0" * 64}}).encode()
    sparse = struct.pack("<Q", 1 << 20) + bytes(16 * MIB)
    for body in (struct.pack("<Q", len(head)) + head, sparse, struct.pack("<Q", 1 << 62) + bytes(1000)):
        yield request("/sets/hostile/1", body, method="PUT")


def insist(port, client, head, body, linger):
    """As `exchange`, but comes again for ten seconds when there is no room."""
    until = time.monotonic() + 10
    while (status := exchange(port, client, head, body, linger)) in (429, 503) and time.monotonic() < until:
        time.sleep(0.2)
    return status


def at_once(port, requests, rounds=2, linger=0.0):
    """Sends every request several times from many clients; returns the statuses."""
    jobs = [r for r in requests for _ in range(rounds)]
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(insist, port, i, head, body, linger) for i, (head, body) in enumerate(jobs)]
        return [future.result() for future in futures]


def held_bodies(port, seconds=3):
    """Bodies that stop one byte before their end."""
    head, body = request("/classify", bytes(8 * MIB))
    streams = []
    for client in range(CLIENTS):
        stream = connect(port, client)
        stream.setblocking(False)
        sent = 0
        until = time.monotonic() + 0.5
        data = head + body[:-1]
        while sent < len(data) and time.monotonic() < until:
            try:
                sent += stream.send(data[sent : sent + MIB])
            except BlockingIOError:
                time.sleep(0.005)
            except OSError:
                break
        streams.append(stream)
    time.sleep(seconds)
    for stream in streams:
        stream.close()
    return [0]


def held_connections(port, seconds=3):
    """More connections than there may be, half of them in the middle of their head."""
    streams = []
    for client in range(1100):
        try:
            stream = connect(port, client)
            stream.sendall(b"POST /classify HTTP/1.1\r\nX: " + b"y" * 8000 if client % 2 else b"")
            streams.append(stream)
        except OSError:
            break
    time.sleep(seconds)
    for stream in streams:
        stream.close()
    return [0]


def refused(port):
    """Refusals that quote eight thousand bytes of the client."""
    return at_once(port, [request(f"/classify?{'x' * 4000}{i}=1", b"y" * 4000, f"X: {'z' * 4000}") for i in range(1000)], 5)


def attacks(folders):
    files = [f for folder in folders for f in sorted(pathlib.Path(folder).iterdir()) if f.suffix not in {".md", ""}]
    images = [request("/classify/cifar100", f.read_bytes()) for f in files]
    if images:
        yield f"{len(images)} files that once went wrong", "--decode-memory", lambda port: at_once(port, images)
    for name, bodies in pictures():
        requests = [request("/classify/cifar100", body) for body in bodies]
        yield name, "--decode-memory", lambda port, r=requests: at_once(port, r, 8)
    for name, flag, requests, rounds in (
        ("lists, nesting and names in 15 MiB of JSON", "--body-memory", documents, 1),
        ("parts and headers in 15 MiB of a form", "--body-memory", forms, 4),
        ("256 MiB of zeros, compressed", "--body-memory", compressed, 8),
        ("the longest answer, read late", "8 MiB of answers", long_answers, 32),
        ("artifacts of headers only, of zeros, of a false length", "`--max-upload`, to the disk", artifacts, 4),
    ):
        made = list(requests())
        late = 2.0 if requests is long_answers else 0.0
        yield name, flag, lambda port, r=made, n=rounds, late=late: at_once(port, r, n, late)
    yield f"{CLIENTS} bodies of 8 MiB that stop before their end", "--body-memory", held_bodies
    yield "1,100 connections that are held", "--max-connections", held_connections
    yield "5,000 refusals that quote the client", "log lines a second", refused


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=ROOT / "target/release/butterflyvit", help="the server to attack")
    parser.add_argument("--pictures", nargs="*", default=[ROOT / "model-core/tests/pictures"], help="folders of files to send")
    parser.add_argument("--decode-memory", type=int, default=60, metavar="MIB", help="the server's --decode-memory")
    parser.add_argument("--body-memory", type=int, default=24, metavar="MIB", help="the server's --body-memory")
    args = parser.parse_args()
    flags = ["--decode-memory", f"{args.decode_memory}MiB", "--body-memory", f"{args.body_memory}MiB"]
    with tempfile.TemporaryDirectory() as store:
        subprocess.run(["cp", "-rL", f"{ROOT}/models/store/.", store], check=True)
        server = Server(args.binary, [*flags, "--model-store", store])
        try:
            sys.exit(0 if run(server, args) else 1)
        finally:
            server.stop()


def run(server, args):
    ordinary = request("/classify/cifar100", (ROOT / "tests/images/test-00.png").read_bytes())
    assert at_once(server.port, [ordinary], 20) == [200] * 20
    time.sleep(1)
    idle = server.status("VmRSS")
    bound = (args.decode_memory + args.body_memory + 16) * MIB
    # Two buffers and a task for each of 1,024 connections, and 8 MiB of answers.
    bound_together = bound + (24 + 8) * MIB
    print(f"idle: {idle / MIB:.1f} MiB\n")
    print("| attack | bounded by | answers | MiB above idle at the peak |\n| --- | --- | --- | --- |")
    fine = True

    def attack(name, flag, run, bound=bound):
        nonlocal fine
        server.reset_peak()
        statuses = run(server.port)
        peak = server.status("VmHWM") - idle
        counts = {status: statuses.count(status) for status in sorted(set(statuses)) if status}
        shown = ", ".join(f"{status} x {count}" for status, count in counts.items()) or "-"
        flag = f"`{flag}`" if flag.startswith("--") else flag
        print(f"| {name} | {flag} | {shown} | {max(peak, 0) / MIB:.1f} |", flush=True)
        for problem, found in (
            ("it takes more memory than it may", peak > bound),
            ("an answer blames the server", set(statuses) - FAIR),
            ("the server does not serve afterwards", at_once(server.port, [ordinary], 1) != [200]),
        ):
            if found:
                fine = False
                print(f"{name}: {problem}: {found}", file=sys.stderr)

    known = list(attacks(args.pictures))
    for name, flag, start in known:
        attack(name, flag, start)

    def together(port):
        statuses = []
        threads = [threading.Thread(target=lambda start=start: statuses.extend(start(port))) for _, _, start in known]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statuses

    attack("all of these at once", "the sum", together, bound_together)
    print(f"\nallowed: {args.decode_memory} + {args.body_memory} + 16 = {bound / MIB:.0f} MiB; all at once, with connections and "
          f"answers, + 24 + 8 = {bound_together / MIB:.0f} MiB; log: {server.log_bytes() / MIB:.2f} MiB")
    return fine


if __name__ == "__main__":
    main()
