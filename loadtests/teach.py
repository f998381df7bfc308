#!/usr/bin/env python3
"""Measures what `butterflyvit teach` makes of folders of images, and prints tables.

    teach.py scenes FOLDER...         each has train/, test/ and perhaps unlike/: how often the set is right, what it refuses
    teach.py against NAME=FOLDER...   classes in folders: each set is shown photographs of the other folders
    teach.py upload FOLDER            seconds from the command, `teach --server`, to the first answer of the server
    teach.py beside FOLDER            p99 of a steady client while the server fits, over its p99 before and after
    teach.py resident FOLDER          how many sets like this one stay in memory, and what 100 of them at random cost

Only the standard library is needed. Build first: `cargo build --release`.
"""

import argparse
import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

import many_sets
from many_sets import ask, classify, percentile

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def images(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)


def interval(count, of):
    """Wilson's interval of a share, in which the true one lies in 95 of 100 cases."""
    if not of:
        return 0.0, 1.0
    z, share = 1.959964, count / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + (z / (2 * of)) ** 2)
    return max(0.0, (middle - half) / (1 + z * z / of)), min(1.0, (middle + half) / (1 + z * z / of))


def percent(count, of):
    low, high = interval(count, of)
    return f"{100 * count / max(of, 1):.1f}% of {of} ({100 * low:.1f} to {100 * high:.1f})"


class Gateway:
    """The commands of a `butterflyvit` with a store of its own."""

    def __init__(self, binary, store, flags):
        self.binary, self.store, self.flags = binary, store, flags

    def run(self, *arguments, fine=(0,)):
        done = subprocess.run([self.binary, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode not in fine:
            sys.exit(f"{' '.join(map(str, arguments))}: {done.stderr}")
        return done.stdout

    def teach(self, folder, name):
        """The report, and seconds."""
        start = time.perf_counter()
        out = self.run("teach", folder, "--set", name, "--store", self.store, "--json", *self.flags)
        return json.loads(out), time.perf_counter() - start

    def classify(self, name, files):
        """Answers by file."""
        lines = []
        for first in range(0, len(files), 500):
            some = files[first:first + 500]
            # Exit code 1: a file is no image. It has no line.
            lines += self.run("classify", "--model-store", self.store, "--set", name, "--json", *some, fine=(0, 1)).splitlines()
        return [json.loads(line) for line in lines]


def right(answers):
    """Answers whose best label is the folder of the file, `unknown` or not."""
    return sum(pathlib.Path(a["file"]).parent.name == a["predictions"][0]["label"] for a in answers)


def unknown(answers):
    return sum(a["unknown"] is True for a in answers)


def scenes(gateway, folders):
    print("| folder | seconds | file bytes | test images right | real ones refused | unlike ones called unknown | let through |")
    print("| --- | ---: | ---: | --- | --- | --- | --- |")
    rights, refusals, total = 0, 0, 0
    for number, folder in enumerate(map(pathlib.Path, folders)):
        report, seconds = gateway.teach(folder, f"scene-{number}")
        test = gateway.classify(f"scene-{number}", images(folder / "test"))
        unlike = gateway.classify(f"scene-{number}", images(folder / "unlike"))
        known = [pathlib.Path(a["file"]).stem for a in unlike if a["unknown"] is not True]
        rights, refusals, total = rights + right(test), refusals + unknown(test), total + len(test)
        print(f"| {folder.name} | {seconds:.1f} | {report['bytes']} | {percent(right(test), len(test))} | "
              f"{percent(unknown(test), len(test))} | {unknown(unlike)} of {len(unlike)} | {', '.join(known)} |", flush=True)
    print(f"| all | | | {percent(rights, total)} | {percent(refusals, total)} | | |")


def sampled(folder, target, most_classes, per_class, tests, seed):
    """A folder of links with `train` and `test`, from a folder of classes or one that has `train` and `test` itself."""
    pick = random.Random(seed)
    both = folder / "train", folder / "test"
    source = both[0] if both[0].is_dir() else folder
    classes = [path for path in sorted(source.iterdir()) if path.is_dir()]
    enough = [path for path in classes if len(images(path)) >= (per_class if both[1].is_dir() else per_class + 2)]
    for path in sorted(pick.sample(enough, min(most_classes, len(enough)))):
        files = images(path)
        pick.shuffle(files)
        train, test = files[:per_class], files[per_class:per_class + tests]
        if both[1].is_dir():
            test = images(both[1] / path.name)
            pick.shuffle(test)
            test = test[:tests]
        for part, some in (("train", train), ("test", test)):
            place = target / part / path.name
            place.mkdir(parents=True)
            for number, file in enumerate(some):
                (place / f"{number:04}{file.suffix}").symlink_to(file.resolve())
    return target


def against(gateway, named, arguments):
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for name, folder in (pair.split("=", 1) for pair in named):
            target = pathlib.Path(scratch) / name
            folders[name] = sampled(pathlib.Path(folder), target, arguments.classes, arguments.per_class, arguments.tests,
                                    arguments.seed)
        print("| set | classes | file bytes | right | real ones refused | of others let through | the report's two intervals span it | by set |")
        print("| --- | ---: | ---: | --- | --- | --- | --- | --- |")
        for name, folder in folders.items():
            report, _ = gateway.teach(folder, name)
            test = gateway.classify(name, images(folder / "test"))
            passed, of, apart = 0, 0, []
            for other, elsewhere in folders.items():
                if other == name:
                    continue
                answers = gateway.classify(name, images(elsewhere / "test"))
                let = len(answers) - unknown(answers)
                passed, of = passed + let, of + len(answers)
                apart.append(f"{other} {100 * let / max(len(answers), 1):.1f}%")
            said = [report["report"]["unknown"][what] for what in ("background_passes", "class_passes")]
            said = [share for share in said if share]
            low, high = min((s["low"] for s in said), default=0), max((s["high"] for s in said), default=1)
            holds = low <= passed / max(of, 1) <= high
            stated = f"{'yes' if holds else 'no'}: " + ", ".join(f"{100 * s['low']:.1f} to {100 * s['high']:.1f}%" for s in said)
            classes = len(report["report"]["classes"])
            print(f"| {name} | {classes} | {report['bytes']} | {percent(right(test), len(test))} | "
                  f"{percent(unknown(test), len(test))} | {percent(passed, of)} | {stated} | {', '.join(apart)} |", flush=True)


def server(gateway, *flags):
    return many_sets.Server(gateway.store, gateway.binary.parent, "--default-set", "before", *flags)


def upload(gateway, folder):
    """Starts a server on a store with the backbone, and times `teach --server` and the first answer."""
    folder = pathlib.Path(folder)
    gateway.teach(folder, "before")
    with server(gateway) as running:
        train = folder / "train" if (folder / "train").is_dir() else folder
        picture = images(train)[0].read_bytes()
        start = time.perf_counter()
        gateway.run("teach", folder, "--set", "door", "--server", f"http://127.0.0.1:{running.port}", "--admin-key-file",
                    pathlib.Path(gateway.store) / "admin-key", "--json", *gateway.flags)
        answer = json.loads(ask(running.connect(), "POST", "/classify/door", picture))
        seconds = time.perf_counter() - start
        print(f"{len(images(train))} images: {seconds:.1f} s from the command to the answer `{answer['predictions'][0]['label']}`")


def beside(gateway, folder, rate, rounds=5):
    """The examples of FOLDER are fitted over and over while a client sends `rate` pictures a second, due at fixed times."""
    folder = pathlib.Path(folder)
    gateway.teach(folder, "before")
    train = folder / "train" if (folder / "train").is_dir() else folder
    with tempfile.TemporaryDirectory() as examples, server(gateway, "--examples", examples) as running:
        connection = running.connect()
        for picture in images(train):
            label = urllib.parse.quote(picture.parent.name)
            ask(connection, "POST", f"/teach/door/examples?label={label}", picture.read_bytes(), key=running.key)
        picture = images(train)[0].read_bytes()
        state = lambda: json.loads(ask(running.connect(), "GET", "/teach/door/fit", key=running.key))["state"]

        def steady(goes_on):
            """Milliseconds from when each request was due."""
            client, times, start = running.connect(), [], time.perf_counter()
            while goes_on(time.perf_counter() - start):
                due = start + len(times) / rate
                time.sleep(max(0.0, due - time.perf_counter()))
                classify(client, "before", picture)
                times.append((time.perf_counter() - due) * 1e3)
            return times

        quiet, busy, fits = [], [], []
        for _ in range(rounds):
            quiet += steady(lambda seconds: seconds < 10)
            ask(running.connect(), "POST", "/teach/door/fit", b"{}", key=running.key)
            begun, done = time.perf_counter(), threading.Event()

            def watch():
                while state() in ("queued", "running"):
                    time.sleep(0.02)
                fits.append(time.perf_counter() - begun)
                done.set()

            watcher = threading.Thread(target=watch)
            watcher.start()
            busy += steady(lambda _: not done.is_set())
            watcher.join()
        if (ended := state()) != "done":
            sys.exit(f"the fit ended as {ended}")
        alone, during = percentile(quiet, 0.99), percentile(busy, 0.99)
        print(f"{len(images(train))} images, {rounds} fits of {sum(fits) / rounds:.1f} s, {rate} requests/s: p99 {during:.1f} ms of "
              f"{len(busy)} while fits run, {alone:.1f} ms of {len(quiet)} otherwise: {during / alone:.2f}")


def resident(gateway, folder, counts):
    """Copies of one taught set under names of their own, all asked for once."""
    report, _ = gateway.teach(pathlib.Path(folder), "before")
    picture = (ROOT / "tests/images/test-00.png").read_bytes()
    place = pathlib.Path(gateway.store) / "expert-sets"
    names = [f"taught-{number:05}" for number in range(max(counts.values()))]
    for name in names:
        (place / name).mkdir()
        shutil.copy(place / "before/1.safetensors", place / name / "1.safetensors")
    classes = len(report["report"]["classes"])
    for budget, wanted in counts.items():
        with server(gateway, "--memory-budget", f"{budget}MiB", "--compute-threads", "2") as running:
            connection = running.connect()
            for name in names[:wanted]:
                ask(connection, "POST", f"/v2/repository/models/{name}/load", key=running.key)
            kept = sum(1 for view in running.listing()["sets"] if view["resident_bytes"])
            print(f"{kept} of {wanted} sets of {classes} classes, {report['bytes']} bytes each on disk, are resident in {budget} MiB",
                  flush=True)
            if budget == max(counts):
                ratios = []
                for _ in range(5):
                    alone = many_sets.throughput(running, picture, names[:1], 4)
                    mixed = many_sets.throughput(running, picture, names[:100], 4)
                    ratios.append((mixed / alone, mixed, alone))
                ratio, mixed, alone = sorted(ratios)[2]
                print(f"100 of them at random against one: {ratio:.3f} ({mixed:.0f} / {alone:.0f} images/s)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scenes", "against", "upload", "beside", "resident"])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/butterflyvit")
    parser.add_argument("--classes", type=int, default=10, help="of each folder (default 10)")
    parser.add_argument("--per-class", type=int, default=20, help="images to learn from (default 20)")
    parser.add_argument("--tests", type=int, default=20, help="other images of each class (default 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=20, help="requests a second of `beside` (default 20)")
    parser.add_argument("--flag", action="append", default=[], help="passed on to teach, as --flag=--fit=pad")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        gateway = Gateway(arguments.binary.resolve(), store, arguments.flag)
        if arguments.what == "scenes":
            scenes(gateway, arguments.folders)
        elif arguments.what == "against":
            against(gateway, arguments.folders, arguments)
        elif arguments.what == "upload":
            upload(gateway, arguments.folders[0])
        elif arguments.what == "beside":
            beside(gateway, arguments.folders[0], arguments.rate)
        else:
            resident(gateway, arguments.folders[0], {64: 5_000, 128: 12_500})


if __name__ == "__main__":
    main()
