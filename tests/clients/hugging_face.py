"""Drives a running server with Hugging Face's own client. Usage: hugging_face.py HOST:PORT PNG LABEL."""

import sys

from huggingface_hub import InferenceClient

address, path, label = sys.argv[1:]
client = InferenceClient(model=f"http://{address}/hf/photos")
for image in [path, open(path, "rb").read()]:
    found = client.image_classification(image)
    assert found[0].label == label and 0 < found[0].score <= 1, found
    assert [label.score for label in found] == sorted((label.score for label in found), reverse=True)
assert len(client.image_classification(path, top_k=3)) == 3
try:
    client.image_classification(b"no image")
except Exception as error:
    assert "415" in str(error), error
else:
    raise AssertionError("text was taken for an image")
print("hugging face client: ok")
