"""The examples of docs/clients.md, against a server with the camera `garage`.

Arguments: address of the server, an image, the label that the default set gives it and the camera shows.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request

import jinja2
import yaml

ADDRESS, IMAGE, LABEL = sys.argv[1:]
PAGE = pathlib.Path(__file__).parent.parent.parent / "docs/clients.md"
BLOCKS = [(language, text.replace("GATEWAY:8000", ADDRESS))
          for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)]


def blocks(language):
    return [text for known, text in BLOCKS if known == language]


def get(url):
    return json.load(urllib.request.urlopen(url, timeout=30))


def shell_and_python(folder):
    once, stream = blocks("bash")
    said = subprocess.run(["bash", "-c", once], cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said.strip() == LABEL, said
    with subprocess.Popen(["bash", "-c", stream], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        said = process.stdout.readline()
        # It goes on by itself, with all that it has started.
        os.killpg(process.pid, signal.SIGTERM)
    assert said == f"garage {LABEL}\n", said
    python, = blocks("python")
    said = subprocess.run([sys.executable, "-c", python], cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert re.fullmatch(rf"{LABEL} 0\.\d\d\n|{LABEL} 1\.00\n", said), said


def home_assistant(folder):
    text, = blocks("yaml")
    configuration = yaml.safe_load(text)
    rest, = configuration["rest"]
    answer = get(rest["resource"])
    sensor, = rest["sensor"]
    render = lambda template: jinja2.Template(template).render(value_json=answer)
    assert (render(sensor["value_template"]), render(sensor["availability"])) == (LABEL, "True")
    assert set(sensor["json_attributes"]) <= set(answer), answer
    for command in configuration["shell_command"].values():
        said = subprocess.run(command.replace("/config/door.jpg", "photo.jpg").split(), cwd=folder, stdout=subprocess.PIPE, check=True)
        assert json.loads(said.stdout)["predictions"][0]["label"] == LABEL


def node_red():
    """Follows the wires as Node-RED does."""
    text, = blocks("json")
    nodes = {node["id"]: node for node in json.loads(text)}
    message, at, seen = None, "every", []
    while True:
        node = nodes[at]
        seen.append(at)
        if node["type"] == "http request":
            message = {"payload": get(node["url"])}
        elif node["type"] == "change":
            rule, = node["rules"]
            value = message
            for key in rule["p"].split("."):
                value = value[key]
            message[rule["to"]] = value
        if not node["wires"]:
            break
        at = node["wires"][0][0]
    assert set(seen) == set(nodes) and message["payload"] == LABEL, (seen, message)


with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "photo.jpg").write_bytes(pathlib.Path(IMAGE).read_bytes())
    shell_and_python(folder)
    home_assistant(folder)
node_red()
print(f"{len(BLOCKS)} examples")
