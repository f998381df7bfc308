#!/usr/bin/env python3
"""Sixteen cameras, a broker and a gateway: what they cost, and how fast a picture becomes a message.

    loadtests/cameras.py                   16 cameras, a picture of 640x480 a second each, for a minute
    loadtests/cameras.py --dead 4          beside four more that accept a connection and never answer
    loadtests/cameras.py --cameras 2 --every 100ms --seconds 600

Every camera shows two photos in turn, so that each picture changes a state, and each change is one message. Latency counts
from a picture's last byte on its way to the gateway until the message is here. The figure for CPU is of the gateway alone, as
a share of all cores. Needs Mosquitto and what loadtests/requirements.txt lists. Build first: cargo build --release.
Exit code 1 when a bar was missed.
"""
import argparse
import http.server
import io
import json
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import paho.mqtt.client as mqtt
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
MIB = 1 << 20
BARS = {"cpu": 0.40, "rss": 64 * MIB, "p99": 0.200}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def photos():
    """Two photos of 640x480 as a camera sends them."""
    for name in ("photo-cat.jpg", "photo-coffee.jpg"):
        picture = Image.open(ROOT / "tests/images" / name).convert("RGB").resize((640, 480))
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=85)
        yield encoded.getvalue()


class Cameras(http.server.ThreadingHTTPServer):
    """Answers /NAME with one photo and then the other."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Camera)
        self.photos = list(photos())
        self.sent = {}  # by name, the times of last bytes


class Camera(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        times = self.server.sent.setdefault(self.path.strip("/"), [])
        photo = self.server.photos[len(times) % 2]
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(photo)}\r\nConnection: close\r\n\r\n"
        # Noted before it is sent: the gateway may be faster than the next line.
        times.append(time.monotonic())
        self.wfile.write(head.encode() + photo)
        self.close_connection = True

    def log_message(self, *_):
        pass


def dead_address():
    """Accepts connections and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    held = []
    threading.Thread(target=lambda: [held.append(listener.accept()) for _ in iter(int, 1)], daemon=True).start()
    return listener.getsockname()[1]


def camera_file(count, every, cameras, dead, broker):
    lines = [f'[mqtt]\nurl = "mqtt://127.0.0.1:{broker}"\n']
    port = cameras.server_address[1]
    for number in range(count):
        lines.append(f'[[camera]]\nname = "camera-{number}"\nurl = "http://127.0.0.1:{port}/camera-{number}"\n'
                     f'every = "{every}"\nagree = "1 of 1"\nfrozen = 0\n')
    lines += [f'[[camera]]\nname = "dead-{number}"\nurl = "http://127.0.0.1:{dead_address()}/"\nevery = "{every}"\n'
              for number in range(dead)]
    return "\n".join(lines)


def listen(port, heard):
    """Notes when each camera's state arrives."""
    def message(_client, _data, message):
        now, (name, what) = time.monotonic(), message.topic.split("/")[2:4]
        if what == "state" and not message.retain:
            heard.setdefault(name, []).append(now)
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.on_message = message
    client.connect("127.0.0.1", port)
    client.subscribe("butterflyvit/camera/+/state", qos=1)
    client.loop_start()


def status(pid):
    """Seconds of CPU, resident bytes and their peak."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    memory = [int(re.search(rf"{name}:\s+(\d+)", text)[1]) * 1024 for name in ("VmRSS", "VmHWM")]
    return seconds, *memory


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cameras", type=int, default=16)
    parser.add_argument("--dead", type=int, default=0, help="more cameras, which never answer")
    parser.add_argument("--every", default="1s")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--binary", type=pathlib.Path, default=TARGET / "release/butterflyvit")
    parser.add_argument("--json", type=pathlib.Path, help="keeps the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        broker = free_port()
        (folder / "mosquitto.conf").write_text(f"user root\nlistener {broker} 127.0.0.1\nallow_anonymous true\n")
        mosquitto = subprocess.Popen(["/usr/sbin/mosquitto", "-c", folder / "mosquitto.conf"], stderr=subprocess.DEVNULL)
        cameras, heard, port = Cameras(), {}, free_port()
        threading.Thread(target=cameras.serve_forever, daemon=True).start()
        (folder / "cameras.toml").write_text(camera_file(arguments.cameras, arguments.every, cameras, arguments.dead, broker))
        time.sleep(1)
        listen(broker, heard)
        command = [arguments.binary, "--listen", f"127.0.0.1:{port}", "--cameras", folder / "cameras.toml"]
        gateway = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            names = [f"camera-{number}" for number in range(arguments.cameras)]
            until = time.monotonic() + 60
            while not all(heard.get(name) for name in names):
                assert time.monotonic() < until, "the cameras' states do not come"
                time.sleep(0.1)
            time.sleep(3)
            began, (before, first, _) = time.monotonic(), status(gateway.pid)
            time.sleep(arguments.seconds)
            ended, (after, resident, peak) = time.monotonic(), status(gateway.pid)
            url = f"http://127.0.0.1:{port}/cameras"
            views = {view["name"]: view for view in json.load(urllib.request.urlopen(url))["cameras"]}
        finally:
            gateway.kill()
            mosquitto.kill()
    latencies, gaps, missed = [], [], 0
    for name in names:
        sent = [moment for moment in cameras.sent[name] if began <= moment < ended - 1]
        arrived = heard[name]
        for moment, following in zip(sent, sent[1:] + [ended]):
            # A message that comes only after the next picture counts as missing.
            arrival = next((arrival for arrival in arrived if moment <= arrival < following), None)
            if arrival is None:
                missed += 1
            else:
                latencies.append(arrival - moment)
        gaps += [later - earlier for earlier, later in zip(sent, sent[1:])]
    figures = {
        "cameras": arguments.cameras, "dead": arguments.dead, "every": arguments.every, "cores": os.cpu_count(),
        "pictures": len(latencies) + missed, "missed": missed,
        "cpu": (after - before) / (ended - began) / os.cpu_count(), "rss": resident, "growth": resident - first, "peak": peak,
        "median": statistics.median(latencies), "p99": quantile(latencies, 0.99), "longest gap": max(gaps),
        "dead cameras": sorted({views[f"dead-{number}"]["condition"] for number in range(arguments.dead)}),
    }
    print(f"{figures['pictures']} pictures of {arguments.cameras} cameras, one every {arguments.every}, {arguments.dead} dead; {missed} without a message")
    print(f"CPU of all {figures['cores']} cores  {figures['cpu']:7.1%}   bar {BARS['cpu']:.0%}")
    print(f"resident memory     {resident / MIB:5.1f} MiB   bar {BARS['rss'] // MIB} MiB (peak {peak / MIB:.1f}, at first {first / MIB:.1f})")
    print(f"last byte to message, median {figures['median'] * 1e3:.1f} ms, p99 {figures['p99'] * 1e3:.1f} ms   bar {BARS['p99'] * 1e3:.0f} ms")
    print(f"longest time from a camera's picture to its next  {figures['longest gap']:.2f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))
    return int(missed > 0 or any(figures[name] > bar for name, bar in BARS.items()))


if __name__ == "__main__":
    sys.exit(main())
