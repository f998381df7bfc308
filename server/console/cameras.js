// Cameras: the last picture of each, what it shows, and when that changed.

import * as api from "./api.js";
import { byId, keep, make, notify, say } from "./dom.js";
import { ago, percent } from "./format.js";

/** Changes in the timeline. */
const SHOWN = 20;
/** Cameras whose earlier changes are asked for. */
const SEEDED = 16;
const TIMEOUT_MS = 5000;

/** Changes of all cameras, the newest first. */
let changes = [];
/** What each camera showed last, to tell a change from a repetition. */
const known = new Map();
/** When the picture was taken that each card shows. */
const drawn = new Map();
/** The open stream of events. */
let stream = null;
let isDrawing = false;
/** Whether the server wants another key; asking again would only fill the browser's log. */
let isRefused = false;
/** The frame that waits for a label: what is shown is what is kept, whatever the camera sends meanwhile. */
let chosen = null;
let taught = () => {};
/** Whether the server keeps examples; null before it has said so. */
let keepsExamples = null;

const CONDITIONS = {
  starting: "no picture yet",
  ok: "ok",
  dark: "dark: the pictures show nothing",
  frozen: "frozen: the picture never changes",
  silent: "silent: no pictures come",
  disabled: "disabled",
};

const words = ({ condition, state }) => (condition === "ok" ? (state ?? "not decided yet") : condition);

function card({ name: camera }) {
  const picture = make("canvas", { role: "img", "aria-label": "", width: 320, height: 240 });
  const name = make("h3");
  const state = make("p", { className: "state" });
  const teach = make("button", { type: "button", hidden: true }, "teach from this frame");
  teach.setAttribute("aria-label", `Teach from this frame of ${camera}`);
  teach.addEventListener("click", () => choose(camera, node.dataset.set));
  const node = make("li", {}, picture, name, state, make("p", { className: "hint" }), make("p", { className: "message", dataset: { kind: "error" } }), teach);
  return node;
}

function fill(node, camera) {
  const [picture, name, state, details, error, teach] = node.children;
  node.dataset.set = camera.set ?? "";
  teach.hidden = !keepsExamples || camera.last_frame === null;
  node.dataset.condition = camera.condition;
  picture.setAttribute("aria-label", `The last picture of ${camera.name}`);
  say(name, camera.name);
  say(state, camera.condition === "ok" ? words(camera) : CONDITIONS[camera.condition]);
  const score = camera.score === null ? "" : `${camera.label} ${percent(camera.score)}, `;
  say(details, `${score}${camera.last_frame === null ? "" : `${ago(camera.last_frame)}, `}expert set ${camera.set ?? "not known yet"}`);
  say(error, camera.error ?? "");
}

function note(camera) {
  const before = known.get(camera.name);
  known.set(camera.name, words(camera));
  if (before !== undefined && before !== words(camera)) add([{ ...camera, at: camera.since }]);
}

function add(more) {
  const all = new Map([...more, ...changes].map((change) => [`${change.at} ${change.name}`, change]));
  changes = [...all.values()].sort((one, other) => other.at - one.at).slice(0, SHOWN);
  const place = byId("camera-changes");
  const time = ({ at }) => new Date(at * 1000).toLocaleString("en-GB", { dateStyle: "short", timeStyle: "medium" });
  const line = (change) => make("li", {}, make("time", { className: "number", dateTime: new Date(change.at * 1000).toISOString() }, time(change)), ` ${change.name}: `, make("strong", {}, words(change)));
  keep(place, changes, (change) => `${change.at} ${change.name}`, line, () => {});
  byId("timeline").hidden = changes.length === 0;
}

async function seed(cameras) {
  for (const { name } of cameras.slice(0, SEEDED)) {
    try {
      const detail = await api.json("GET", api.path("cameras", name), undefined, TIMEOUT_MS);
      add(detail.changes.map((change) => ({ ...change, name })));
    } catch {
      // It has left the file meanwhile, or the server is away; the clock asks again.
    }
  }
}

async function follow(cameras) {
  const mine = new AbortController();
  stream = mine;
  try {
    await seed(cameras);
    await api.events("/events", mine.signal, (camera) => {
      note(camera);
      const node = [...byId("camera-list").children].find((node) => node.dataset.key === camera.name);
      if (node) fill(node, camera);
    });
  } catch {
    // The next turn of the clock opens another.
  } finally {
    if (stream === mine) stream = null;
  }
}

function paint(canvas, picture) {
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").drawImage(picture, 0, 0);
  picture.close();
}

async function draw(cameras) {
  if (isDrawing) return;
  isDrawing = true;
  try {
    for (const camera of cameras) {
      const node = [...byId("camera-list").children].find((node) => node.dataset.key === camera.name);
      if (!node || camera.last_frame === null || drawn.get(camera.name) === camera.last_frame) continue;
      const picture = await createImageBitmap(await api.blob("GET", `${api.path("cameras", camera.name)}/frame`, TIMEOUT_MS));
      paint(node.firstElementChild, picture);
      drawn.set(camera.name, camera.last_frame);
    }
  } catch {
    // A picture too many is no matter.
  } finally {
    isDrawing = false;
  }
}

/** Shows the last frame as the camera sent it, and asks what it shows. */
async function choose(camera, set) {
  const message = byId("frame-teaching");
  try {
    chosen = await api.blob("GET", `${api.path("cameras", camera)}/frame?whole=true`, TIMEOUT_MS);
    paint(byId("frame-picture"), await createImageBitmap(chosen));
  } catch (failure) {
    return say(message, `${camera}: ${failure.advice ?? failure}`);
  }
  say(message, "");
  say(byId("frame-title"), `Teach from this frame of ${camera}`);
  byId("frame-set").value = set;
  byId("frame-label").value = "";
  notify(byId("frame-message"), "");
  byId("frame-dialog").showModal();
  offerLabels();
}

/** The labels that the set has examples of. */
async function offerLabels() {
  const set = byId("frame-set").value.trim();
  if (!byId("frame-set").checkValidity()) return;
  try {
    const { labels } = await api.json("GET", api.path("teach", set));
    keep(byId("frame-labels"), Object.keys(labels), (label) => label, (label) => make("option", { value: label }), () => {});
  } catch (failure) {
    notify(byId("frame-message"), "error", failure.advice ?? String(failure));
  }
}

async function teach(event) {
  event.preventDefault();
  const [set, label] = [byId("frame-set").value.trim(), byId("frame-label").value.trim()];
  notify(byId("frame-message"), "busy", "sending …");
  try {
    const target = `${api.path("teach", set)}/examples?${new URLSearchParams({ label })}`;
    const [{ new: isNew }] = await api.json("POST", target, chosen);
    notify(byId("frame-message"), "ok", isNew ? `The frame is kept as ${label} for ${set}.` : `${set} had this frame as ${label} already.`);
    taught(set);
  } catch (failure) {
    notify(byId("frame-message"), "error", failure.advice ?? String(failure));
  }
}

/** Asks what the cameras show; with new pictures when `withPictures`. */
export async function refresh(withPictures) {
  if (isRefused) return;
  let listing;
  try {
    listing = await api.json("GET", "/cameras", undefined, TIMEOUT_MS);
  } catch (failure) {
    isRefused = failure.code === "unauthorized";
    if (isRefused) byId("cameras").hidden = true;
    return;
  }
  const { cameras, file_error: fileError, mqtt, examples } = listing;
  byId("cameras").hidden = cameras.length === 0 && !fileError && !mqtt;
  if (examples !== keepsExamples) say(byId("frame-teaching"), examples ? "" : "No set can be taught from these frames: the server keeps no examples. Start it with --examples DIR.");
  keepsExamples = examples;
  keep(byId("camera-list"), cameras, (camera) => camera.name, card, fill);
  cameras.forEach(note);
  for (const name of known.keys()) if (!cameras.some((camera) => camera.name === name)) known.delete(name);
  say(byId("cameras-message"), fileError ? `The changed file is not in force: ${fileError}` : "");
  const broker = mqtt && (mqtt.connected ? `MQTT: connected to ${mqtt.broker}` : `MQTT: ${mqtt.broker} is not connected${mqtt.error ? `: ${mqtt.error}` : ""}`);
  say(byId("broker"), broker ?? "");
  if (cameras.length > 0 && !stream) follow(cameras);
  if (withPictures) draw(cameras);
}

/** Wires the section's controls; `changed` hears of sets that have a new example. */
export function start(changed) {
  taught = changed;
  byId("frame-set").addEventListener("change", offerLabels);
  byId("frame-form").addEventListener("submit", teach);
  byId("frame-close").addEventListener("click", () => byId("frame-dialog").close());
}

/** Another key may open what was closed. */
export function keyChanged() {
  isRefused = false;
}

/** Nobody looks: the stream's place is for others. */
export function pause() {
  stream?.abort();
}
