"""The add-on's folder: its options are settings of the server, each is described, and its script starts the server.

Argument: the server's binary.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import yaml

ADDON = pathlib.Path(__file__).parent.parent.parent / "deploy/home-assistant"
BINARY = pathlib.Path(sys.argv[1]).resolve()
# One that every option takes.
VALUES = {"admin_keys": "operator:it's-an admin key", "user_keys": "viewer:a-user-key-1", "default_set": "cifar100",
          "compute_threads": 1, "log": "info"}
KEY = {"X-Api-Key": VALUES["admin_keys"].split(":")[1]}

config = yaml.safe_load((ADDON / "config.yaml").read_text())
schema, options = config["schema"], config["options"]
described = yaml.safe_load((ADDON / "translations/en.yaml").read_text())
assert {"name", "version", "slug", "description", "arch"} <= set(config), "what Home Assistant requires"
assert set(described["configuration"]) == set(schema), set(described["configuration"]) ^ set(schema)
assert set(described["network"]) == set(config["ports"]), "ports"
required = {name for name, kind in schema.items() if not kind.endswith("?")}
assert required <= set(options) <= set(schema), "what is required has a default"
assert re.fullmatch(schema["memory_budget"].removeprefix("match(").removesuffix(")"), options["memory_budget"])
assert set(options | VALUES) == set(schema), "every option is tried"


def get(address, path, headers):
    return urllib.request.urlopen(urllib.request.Request(address + path, headers=headers), timeout=10).read()


def start(options, check):
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        folder = pathlib.Path(folder)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        for name in ("data", "config", "bin"):
            (folder / name).mkdir()
        (folder / "bin/butterflyvit").symlink_to(BINARY)
        (folder / "data/options.json").write_text(json.dumps(options))
        environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "DATA": f"{folder}/data", "CONFIG": f"{folder}/config",
                       "BVIT_LISTEN": f"127.0.0.1:{port}"}
        with open(folder / "log", "w+") as log:
            server = subprocess.Popen([ADDON / "run.sh"], env=environment, stdout=log, stderr=log)
            try:
                until = time.monotonic() + 60
                while True:
                    try:
                        get(f"http://127.0.0.1:{port}", "/v2/health/ready", {})
                        break
                    except OSError as error:
                        ended = server.poll() is not None or time.monotonic() > until
                        assert not ended, f"{error}\n{(folder / 'log').read_text()}"
                        time.sleep(0.1)
                check(f"http://127.0.0.1:{port}", folder / "config")
            finally:
                server.terminate()
                assert server.wait(60) == 0
            said = (folder / "log").read_text()
            assert "no setting is called" not in said, said


def all_options(address, _):
    assert json.loads(get(address, "/sets", KEY))["default"] == "cifar100"
    assert json.loads(get(address, "/cameras", KEY))["examples"]


def defaults(address, config):
    assert json.loads(get(address, "/cameras", {}))["file_error"] is None
    get(address, "/teach/door", {"X-Api-Key": (config / "admin-key").read_text().strip()})


start(options | VALUES, all_options)
start(options, defaults)
print(f"{len(schema)} options, each a setting of the server")
