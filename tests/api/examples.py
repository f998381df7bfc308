"""Every documented example works as pasted: commands and programs of README.md and docs/api.md, of /openapi.json and
of /docs, and the requests and answers shown in /openapi.json, which is itself valid OpenAPI 3.1.

Arguments: the address of a server with a model store whose default set is `cifar100`; the project's folder; a folder
with `cat.jpg`, `cam.jpg`, `flowers.safetensors` and `photo.safetensors` to work in. The variable `BVIT_ADMIN_KEY_OUT` names the file of the
server's admin key, and `butterflyvit` is on the path.
"""

import html.parser
import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jsonschema_rs
import openapi_spec_validator

ADDRESS, ROOT, WORK = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
ADMIN_KEY = pathlib.Path(os.environ["BVIT_ADMIN_KEY_OUT"]).read_text().strip()
DOCUMENTED = "127.0.0.1:8000"


def fetch(path, method="GET", body=None, headers=None):
    request = urllib.request.Request(f"http://{ADDRESS}{path}", data=body, method=method, headers={"X-Api-Key": ADMIN_KEY, **(headers or {})})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.status, response.read()


def blocks(markdown):
    """Code blocks: runs of lines indented by four spaces."""
    block = []
    for line in [*markdown.splitlines(), "."]:
        if line.startswith("    ") or (block and not line):
            block.append(line[4:])
        elif block:
            yield "\n".join(block).strip()
            block = []


class Preformatted(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.inside = [], False

    def handle_starttag(self, tag, attributes):
        if tag == "pre":
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def renew_flowers():
    """Examples start from `flowers` being there and not pinned, whichever ran before."""
    artifact = (WORK / "flowers.safetensors").read_bytes()
    fetch("/sets/flowers/1", "PUT", artifact)
    fetch("/sets/flowers/unpin", "POST")


def renew_door():
    """Examples fit `door` to examples of two labels, and no fit is under way."""
    for number, label in enumerate(["open", "open", "closed", "closed"]):
        picture = (ROOT / f"tests/images/test-{number + 1:02}.png").read_bytes()
        fetch(f"/teach/door/examples?label={label}", "POST", picture)
    while json.loads(fetch("/teach/door/fit")[1])["state"] == "running":
        time.sleep(0.1)


def run(example, folder):
    if "-X POST" in example and example.endswith("/door/fit"):
        renew_door()
    if "flowers" in example:
        renew_flowers()
    is_python = example.startswith(("from ", "import "))
    command = [sys.executable, "-"] if is_python else ["bash", "-euo", "pipefail", "-"]
    done = subprocess.run(command, input=example.replace(DOCUMENTED, ADDRESS), cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{example}\n{done.stdout}{done.stderr}"
    if not is_python:
        assert done.stdout and not done.stdout.startswith('{"error":'), f"{example}\n{done.stdout}{done.stderr}"
    else:
        assert "print(" not in example or done.stdout.strip(), f"{example} printed nothing"


def examples_of(text):
    """Commands, one a line, and programs."""
    for block in blocks(text):
        if block.startswith("curl"):
            yield from block.splitlines()
        elif block.startswith(("from ", "import ")):
            yield block


def is_example(block):
    return block.startswith(("curl", "from ", "import "))


def operations(document):
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method.upper(), operation


def check_shown(document):
    """Requests shown in the document are answered as it says, and the answers shown are of the shape it says."""
    checked = 0
    for path, method, operation in operations(document):
        for status, response in operation["responses"].items():
            for content in response.get("content", {}).values():
                shown = [content["example"]] if "example" in content else []
                shown += [example["value"] for example in content.get("examples", {}).values()]
                for example in shown:
                    jsonschema_rs.validate({**content["schema"], "components": document["components"]}, example)
                    checked += 1
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" in body:
            concrete = path.replace("{set}", "cifar100").replace("{version}", "1")
            status, answer = fetch(concrete, method, json.dumps(body["example"]).encode(), {"Content-Type": "application/json"})
            schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
            jsonschema_rs.validate({**schema, "components": document["components"]}, json.loads(answer))
            checked += 1
    return checked


def main():
    document = json.loads(fetch("/openapi.json")[1])
    openapi_spec_validator.validate(document, cls=openapi_spec_validator.OpenAPIV31SpecValidator)
    commands = [sample["source"] for *_, operation in operations(document) for sample in operation.get("x-codeSamples", [])]
    page = Preformatted()
    page.feed(fetch("/docs")[1].decode())
    guide = list(examples_of((ROOT / "docs/api.md").read_text()))
    shown = [block.strip() for block in page.found]
    for command in commands:
        assert command in shown, f"/docs does not show: {command}"
    on_page = [line for block in shown if is_example(block) for line in (block.splitlines() if block.startswith("curl") else [block])]
    assert len(on_page) >= len(set(commands)) + len(guide), "examples are missing on the page"
    readme = [example for example in examples_of((ROOT / "README.md").read_text())]
    assert commands and guide and readme
    for example in dict.fromkeys([*commands, *guide, *on_page]):
        run(example, WORK)
    for example in readme:
        run(example, ROOT)
    shown_values = check_shown(document)
    assert shown_values > 100, shown_values
    print(f"{len(set([*commands, *guide, *on_page, *readme]))} examples ran, {shown_values} shown requests and answers hold")


main()
