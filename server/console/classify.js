// Choosing an image and a set, and showing what the server makes of it.

import * as api from "./api.js";
import { byId, keep, make, notify, say } from "./dom.js";
import { milliseconds, percent } from "./format.js";
import * as routing from "./routing.js";

/** The samples' files with what they show and the set that is for such images. Those of 32 pixels are test images of CIFAR-100. */
const SAMPLES = {
  "photo-coffee.jpg": ["a cup of coffee", "imagenet"],
  "photo-cat.jpg": ["a cat", "imagenet"],
  "test-01.png": ["a lawn mower", "cifar100"],
  "test-09.png": ["a bowl of fruit", "cifar100"],
  "test-10.png": ["a streetcar", "cifar100"],
  "test-00.png": ["a hamster", "cifar100"],
};

/** Side of the preview in pixels. */
const PREVIEW = 512;

// What people are told of a picture that is unknown.
const UNKNOWN = {
  flat: "Unknown: the picture shows nothing but one colour. Is something in front of the lens?",
  unfamiliar: "Unknown: the picture is unlike those that this expert set was made for.",
  unsure: "Unknown: no label is sure enough.",
};

const STAGES = [
  ["decode", "decode and resize"],
  ["queue", "wait for a thread"],
  ["inference", "forward pass"],
  ["rest", "the rest of the server"],
  ["network", "network and browser"],
];

let image = null;
// Answers may overtake each other; only the newest request's is shown.
let newest = 0;

/** Keeps the choice of sets in step with the registry. */
export function setNames(names, defaultName) {
  const select = byId("set");
  const isGone = !names.includes(select.value);
  if (isGone) delete select.dataset.touched;
  const create = () => make("option");
  keep(select, names, (name) => name, create, (option, name) => {
    option.value = name;
    say(option, name === defaultName ? `${name} (default)` : name);
    if (select.dataset.touched === undefined) option.selected = name === defaultName;
  });
}

/** Chooses a set by name, and asks it about the image on show. */
export function chooseSet(name) {
  byId("set").value = name;
  byId("set").dataset.touched = "";
  classify();
}

/** Chooses a set if there is one of that name. */
function prefer(name) {
  const select = byId("set");
  if (![...select.options].some((option) => option.value === name)) return;
  select.value = name;
  select.dataset.touched = "";
}

async function choose(blob, name) {
  if (!blob) return;
  image = blob;
  say(byId("image-name"), name || "pasted image");
  await Promise.all([preview(blob), classify()]);
}

/** Draws the centred square the model sees; the browser applies the EXIF orientation as the server does. */
async function preview(blob) {
  const canvas = byId("preview");
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, PREVIEW, PREVIEW);
  byId("drop").dataset.filled = "";
  try {
    const bitmap = await createImageBitmap(blob);
    const side = Math.min(bitmap.width, bitmap.height);
    context.imageSmoothingEnabled = side > PREVIEW / 4;
    context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, PREVIEW, PREVIEW);
    bitmap.close();
  } catch {
    // The server has the last word on whether this is an image; the browser just cannot show it.
  }
  routing.showImage(canvas);
}

async function classify() {
  if (!image) return;
  newest += 1;
  const request = newest;
  const message = byId("classify-message");
  byId("result").setAttribute("aria-busy", "true");
  const query = new URLSearchParams({ top_k: byId("top-k").value, routing: "true" });
  const started = performance.now();
  try {
    const set = byId("set").value;
    const answer = await api.json("POST", `/classify${set && api.path(set)}?${query}`, image);
    if (request !== newest) return;
    notify(message, "");
    show(answer, performance.now() - started);
  } catch (failure) {
    if (request !== newest) return;
    notify(message, "error", failure.advice ?? String(failure));
    byId("result").hidden = true;
    routing.show(null);
  } finally {
    if (request === newest) byId("result").removeAttribute("aria-busy");
  }
}

function show(answer, roundTrip) {
  byId("result").hidden = false;
  say(byId("generation"), answer.generation);
  byId("unknown").hidden = answer.unknown !== true;
  say(byId("unknown"), answer.unknown ? UNKNOWN[answer.unknown_reason] : "");
  const create = () => make("li", {}, make("span", { className: "label" }), make("span", { className: "score" }), make("span", { className: "bar" }, make("span")));
  keep(byId("labels"), answer.predictions, ({ index }) => String(index), create, (item, { label, score }) => {
    const [name, number, bar] = item.children;
    say(name, label);
    say(number, percent(score));
    bar.firstElementChild.style.setProperty("width", percent(score));
  });
  showTimings(answer.timings_ms, roundTrip);
  routing.show(answer.routing);
}

function showTimings({ decode, queue, inference, total }, roundTrip) {
  const rest = Math.max(0, total - decode - queue - inference);
  const times = { decode, queue, inference, rest, network: Math.max(0, roundTrip - total) };
  say(byId("round-trip"), milliseconds(roundTrip));
  const create = ([stage]) => make("span", { className: `stage-${stage}` });
  keep(byId("timing-bar"), STAGES, ([stage]) => stage, create, (part, [stage]) => part.style.setProperty("flex-grow", times[stage]));
  const createRow = ([stage, name]) => make("li", {}, make("span", { className: `swatch stage-${stage}` }), make("span", {}, name), make("span", { className: "number" }));
  keep(byId("timings"), STAGES, ([stage]) => stage, createRow, (row, [stage]) => say(row.lastElementChild, milliseconds(times[stage])));
}

const imageIn = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/") || file.type === "");

function startDropping() {
  const drop = byId("drop");
  const over = (event) => {
    event.preventDefault();
    drop.classList.add("over");
  };
  drop.addEventListener("dragenter", over);
  drop.addEventListener("dragover", over);
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const file = event.dataTransfer.files[0];
    choose(file, file?.name);
  });
  document.addEventListener("paste", (event) => {
    const file = imageIn(event.clipboardData);
    if (file) choose(file, file.name);
  });
}

function startSamples() {
  const button = ([file, [what, set]]) => {
    const picture = make("img", { src: `/console/samples/${file}`, alt: what, width: 32, height: 32 });
    const sample = make("button", { type: "button", className: "sample", title: what }, picture);
    sample.addEventListener("click", async () => {
      const response = await fetch(picture.src).catch(() => null);
      if (response?.ok) {
        prefer(set);
        choose(await response.blob(), what);
      }
      else notify(byId("classify-message"), "error", "The server cannot be reached.");
    });
    return sample;
  };
  byId("samples").append(...Object.entries(SAMPLES).map(button));
}

/** Wires the section's controls. */
export function start() {
  const canvas = byId("preview");
  canvas.width = PREVIEW;
  canvas.height = PREVIEW;
  byId("file").addEventListener("change", (event) => choose(event.target.files[0], event.target.files[0]?.name));
  byId("set").addEventListener("change", (event) => chooseSet(event.target.value));
  byId("top-k").addEventListener("change", classify);
  byId("again").addEventListener("click", classify);
  startDropping();
  startSamples();
}
