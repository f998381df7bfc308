"""Generates a client from a server's OpenAPI document and drives the server with it. Usage: generated.py HOST:PORT PNG LABEL."""

import base64
import importlib
import pathlib
import subprocess
import sys
import tempfile

address, path, label = sys.argv[1:]
url, image = f"http://{address}", pathlib.Path(path).read_bytes()
generator = pathlib.Path(sys.executable).with_name("openapi-python-client")
with tempfile.TemporaryDirectory() as folder:
    sys.path.insert(0, folder)
    out = pathlib.Path(folder, "made")
    command = [generator, "generate", "--url", f"{url}/openapi.json", "--meta", "none", "--output-path", out]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Endpoint will not be generated" not in said, said
    made = importlib.import_module("made")
    models, types = importlib.import_module("made.models"), importlib.import_module("made.types")
    classify = importlib.import_module("made.api.classify.classify").sync
    show = importlib.import_module("made.api.sets.show_set").sync

    # Without a key where the server asks for none, and with one all the same.
    for client in made.Client(base_url=url), made.AuthenticatedClient(base_url=url, token="any"):
        in_json = models.JsonRequest(inputs=base64.b64encode(image).decode())
        for body in types.File(payload=image), in_json:
            answer = classify(client=client, body=body, set_="photos", top_k=2)
            assert isinstance(answer, models.Classification), answer
            assert answer.predictions[0].label == label and len(answer.predictions) == 2, answer
        assert {version.name for version in show("photos", client=client)} == {"photos"}
    answer = classify(client=client, body=types.File(payload=b"no image"))
    assert isinstance(answer, models.ErrorBody) and answer.error_type.value == "unsupported_media_type", answer
print("generated client: ok")
