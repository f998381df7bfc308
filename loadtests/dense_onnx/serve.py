"""FastAPI and ONNX Runtime as one would write it: an image in the body, labels out.

    python3 serve.py MODEL.onnx
"""
import io
import json
import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
properties = session.get_modelmeta().custom_metadata_map
labels, side = json.loads(properties["labels"]), int(properties["side"])
app = FastAPI()


def classify(body):
    image = Image.open(io.BytesIO(body)).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    pixels = (np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
    scores = session.run(None, {"pixels": pixels})[0][0]
    best = np.argsort(scores)[::-1][:5]
    return {"predictions": [{"label": labels[i], "score": float(scores[i])} for i in best]}


@app.post("/classify")
async def answer(request: Request):
    return await run_in_threadpool(classify, await request.body())


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=0, log_level="info", access_log=False)
