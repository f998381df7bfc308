// Teaching a set on the gateway: pictures by label, a fit, its report, what the set did not know, and the way back.

import * as api from "./api.js";
import { byId, keep, make, notify, say } from "./dom.js";
import { ago, bytes, percent } from "./format.js";

const POLL_MS = 500;
/** Pictures in one request: few, so that the counts move on a slow link. */
const AT_ONCE = 4;
/** Uploads may take long on a slow link. */
const UPLOAD_TIMEOUT_MS = 600_000;
/** A picture of an example is there in this time, or not shown. */
const TIMEOUT_MS = 30_000;
/** Side of a small picture in pixels. */
const SMALL = 192;

/** Versions that are compared: the newest ones. */
const COMPARED = 6;
const within = (share) => (share ? `${percent(share.share)} of ${share.of} (${percent(share.low)} to ${percent(share.high)})` : "–");
/** What versions are compared by: the heading of a column, and what a report says under it. */
const COMPARISON = [
  ["Right when held out", ({ accuracy }) => within(accuracy)],
  ["Called unknown", ({ unknown }) => within(unknown?.refused)],
  ["Of a class left out, known", ({ unknown }) => within(unknown?.class_passes)],
  ["Most often confused", ({ confusions = [] }) => confusions.slice(0, 2).map((c) => `${c.label} taken for ${c.taken_for}: ${c.images}`).join("; ") || "none"],
];

const REASONS = { unfamiliar: "unlike the pictures it was taught", unsure: "no label was sure enough" };

let set = "";
let listing = null;
// Labels that were named here and have no picture yet.
let named = new Set();
let fit = { state: "none" };
let refreshSets = () => {};

const labels = () => [...new Set([...Object.keys(listing?.labels ?? {}), ...named])].sort();
const tell = (kind, text) => notify(byId("teach-message"), kind, text);

/** Runs an action and says what became of it; the view follows. */
async function act(what, run) {
  tell("busy", `${what} …`);
  try {
    const said = await run();
    tell("ok", typeof said === "string" ? said : `${what}: done.`);
  } catch (failure) {
    tell("error", `${what}: ${failure.advice ?? failure}`);
  }
  await refresh();
}

async function open(event) {
  event.preventDefault();
  const wanted = byId("teach-set").value.trim();
  if (wanted !== set) [set, listing, named, fit] = [wanted, null, new Set(), { state: "none" }];
  tell("");
  await refresh(true);
  if (fit.state === "running") follow();
}

async function refresh(isAsked = false) {
  const asked = set;
  try {
    const [examples, state] = await Promise.all([
      api.json("GET", api.path("teach", asked)),
      api.json("GET", `${api.path("teach", asked)}/fit`),
    ]);
    if (asked !== set) return;
    [listing, fit] = [examples, state];
  } catch (failure) {
    if (isAsked) tell("error", failure.advice ?? String(failure));
  }
  let versions = [];
  try {
    // A set that was not fitted yet has none.
    const known = await api.json("GET", "/sets");
    if (known.sets.some(({ name }) => name === asked)) versions = await api.json("GET", api.path("sets", asked));
  } catch {
    // The page's clock says when the server cannot be reached.
  }
  if (asked === set) draw(versions);
}

function draw(versions) {
  byId("teach-work").hidden = listing === null;
  if (listing === null) return;
  say(byId("teach-room"), `Pictures take ${bytes(listing.used_bytes)} of ${bytes(listing.budget_bytes)}.`);
  keep(byId("teach-labels"), labels(), (label) => label, createLabel, (item, label) => {
    const count = listing.labels[label] ?? 0;
    say(item.querySelector(".count"), count === 1 ? "1 picture" : `${count} pictures`);
  });
  const unsure = [...listing.unsure].reverse();
  byId("teach-unsure").hidden = unsure.length === 0;
  keep(byId("teach-review"), unsure, ({ id }) => id, (frame) => createReview(frame.id, `${REASONS[frame.reason]}, ${ago(frame.at)}`), updateReview);
  drawFit();
  drawVersions(versions);
}

function createLabel(label) {
  const input = make("input", { type: "file", accept: "image/*", multiple: true });
  input.addEventListener("change", async () => {
    const files = [...input.files];
    await add(label, files);
    input.value = "";
  });
  const item = make(
    "li",
    {},
    make("span", {}, make("strong", {}, label), " ", make("span", { className: "hint count" })),
    make("label", { className: "button" }, `add to ${label}`, input),
  );
  item.addEventListener("dragover", (event) => {
    event.preventDefault();
    item.classList.add("over");
  });
  item.addEventListener("dragleave", () => item.classList.remove("over"));
  item.addEventListener("drop", (event) => {
    event.preventDefault();
    // The section above takes pictures that are dropped beside it.
    event.stopPropagation();
    item.classList.remove("over");
    add(label, [...event.dataTransfer.files]);
  });
  return item;
}

async function add(label, files) {
  if (files.length === 0) return;
  await act(`adding to ${label}`, async () => {
    const [refused, target] = [[], `${api.path("teach", set)}/examples?${new URLSearchParams({ label })}`];
    let kept = 0;
    for (let first = 0; first < files.length; first += AT_ONCE) {
      const form = new FormData();
      const some = files.slice(first, first + AT_ONCE);
      some.forEach((file, at) => form.append(`image${at}`, file));
      let outcomes = [];
      try {
        outcomes = await api.json("POST", target, form, UPLOAD_TIMEOUT_MS);
      } catch (failure) {
        // Of a single picture the refusal is the answer.
        if (some.length > 1 || failure.code === "unreachable") throw failure;
        outcomes = [{ error: failure.message }];
      }
      outcomes.forEach(({ error }, at) => (error ? refused.push(`${some[at].name}: ${error}`) : (kept += 1)));
      tell("busy", `adding to ${label}: ${first + some.length} of ${files.length}`);
    }
    if (refused.length > 0) throw new api.Failure("refused", `${kept} of ${files.length} pictures are kept. ${refused.join("; ")}`);
    return `${kept} pictures are kept as ${label}.`;
  });
}

/** A picture to be looked at by a person, who gives it a label or takes it away. */
function createReview(id, text) {
  const path = api.path("teach", set, "examples", id);
  const canvas = make("canvas", { width: SMALL, height: SMALL, role: "img", "aria-label": text });
  paint(canvas, path);
  const choice = make("select", { "aria-label": `Label of the picture: ${text}` });
  const label = make("button", { type: "button" }, "label it");
  label.addEventListener("click", () => act("labelling", () => api.json("PATCH", `${path}?${new URLSearchParams({ label: choice.value })}`)));
  const forget = make("button", { type: "button" }, "delete it");
  forget.addEventListener("click", () => act("deleting", () => api.json("DELETE", path)));
  return make("li", {}, canvas, make("p", { className: "hint" }, text), make("div", { className: "actions" }, choice, label, forget));
}

function updateReview(item) {
  keep(item.querySelector("select"), labels(), (label) => label, (label) => make("option", { value: label }, label), () => {});
}

/** Draws the centred square of a picture; its address alone would not do, because the server wants the key. */
async function paint(canvas, path) {
  try {
    const bitmap = await createImageBitmap(await api.blob("GET", path, TIMEOUT_MS));
    const side = Math.min(bitmap.width, bitmap.height);
    const [left, top] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
    canvas.getContext("2d").drawImage(bitmap, left, top, side, side, 0, 0, SMALL, SMALL);
    bitmap.close();
  } catch {
    // It was deleted meanwhile, or the browser cannot show it.
  }
}

async function begin() {
  await act("beginning the fit", () => api.json("POST", `${api.path("teach", set)}/fit`).then(() => ""));
  follow();
}

async function follow() {
  const asked = set;
  while (asked === set && fit.state === "running") {
    await new Promise((done) => setTimeout(done, POLL_MS));
    try {
      const state = await api.json("GET", `${api.path("teach", asked)}/fit`);
      if (asked !== set) return;
      fit = state;
    } catch {
      // The page's clock says when the server cannot be reached; the fit goes on.
    }
    drawFit();
  }
  await Promise.all([refresh(), refreshSets()]);
}

const SAID = {
  none: () => "",
  running: ({ progress, images }) => `Fitting to ${images} pictures: ${Math.round(progress * 100)}%`,
  done: ({ version }) => `Version ${version} answers now.`,
  failed: ({ reason }) => `Nothing has changed: ${reason}.`,
  cancelled: () => "Cancelled; nothing has changed.",
};

function drawFit() {
  const isRunning = fit.state === "running";
  byId("teach-fit").disabled = isRunning;
  byId("teach-cancel").hidden = !isRunning;
  byId("teach-progress").hidden = !isRunning;
  byId("teach-progress").value = fit.progress ?? 0;
  notify(byId("teach-state"), { done: "ok", failed: "error" }[fit.state] ?? "busy", SAID[fit.state](fit));
  byId("teach-report").hidden = !fit.report;
  if (fit.report) drawReport(fit.report);
}

function drawReport({ accuracy, unknown, classes, confusions, suspects }) {
  say(
    byId("teach-accuracy"),
    `${percent(accuracy.share)} of ${accuracy.of} pictures are right when they are held out (true share: ${percent(accuracy.low)} to ${percent(accuracy.high)}). ${percent(unknown.refused.share)} of them are called unknown.`,
  );
  const lines = [
    ...classes.map(({ label, correct, images, few }) => `${label}: ${correct} of ${images} right${few ? " (few: take more)" : ""}`),
    ...confusions.map(({ label, taken_for, images }) => `${label} taken for ${taken_for}: ${images}`),
    ...fit.left_out,
  ];
  keep(byId("teach-lines"), lines, (line) => line, () => make("li"), say);
  // Those that were labelled anew or deleted since are settled.
  const still = suspects.filter(({ example, label }) => listing?.examples.some((other) => other.id === example && other.label === label));
  byId("teach-suspects-title").hidden = still.length === 0;
  const create = ({ example, label, taken_for, score }) => createReview(example, `in ${label}, looks like ${taken_for} (${percent(score)})`);
  keep(byId("teach-suspects"), still, ({ example, label }) => `${example} ${label}`, create, updateReview);
}

function drawVersions(versions) {
  const newest = [...versions].reverse().slice(0, COMPARED);
  byId("teach-compare").hidden = newest.length === 0;
  keep(byId("teach-versions"), newest, ({ generation }) => generation, createVersion, (row, { version, current }) => {
    say(row.firstElementChild, `version ${version}${current ? " (answers now)" : ""}`);
    row.querySelector("button").hidden = !current || newest.length < 2;
  });
}

/** A row that fills itself: what a version's report says never changes. */
function createVersion({ version }) {
  const back = make("button", { type: "button", className: "back" }, "roll back");
  back.setAttribute("aria-label", `Roll back: delete version ${version}`);
  back.addEventListener("click", async () => {
    if (!window.confirm(`Delete version ${version} of ${set}, so that the one before answers again?`)) return;
    await act("rolling back", () => api.json("DELETE", api.path("sets", set, version)).then(() => `Version ${version} is gone.`));
    await refreshSets();
  });
  const cells = COMPARISON.map(([column]) => make("td", { dataset: { column } }, "–"));
  const actions = make("td", { dataset: { column: "Actions" } }, make("div", { className: "actions" }, back));
  const fill = ({ report }) => report?.accuracy && COMPARISON.forEach(([, told], at) => say(cells[at], told(report)));
  // A set that was not taught has no report, and one that is gone no row before long.
  api.json("GET", api.path("sets", set, version)).then(fill, () => {});
  return make("tr", {}, make("th", { scope: "row" }), ...cells, actions);
}

/** A set has examples that did not come from this section. */
export function changed(name) {
  if (name === set) refresh();
}

/** Wires the section's controls; `changed` asks for the listing of sets again. */
export function start(changed) {
  refreshSets = changed;
  byId("teach-version-columns").append(...["Version", ...COMPARISON.map(([column]) => column), "Actions"].map((text) => make("th", { scope: "col" }, text)));
  byId("teach-open").addEventListener("submit", open);
  byId("teach-new").addEventListener("submit", (event) => {
    event.preventDefault();
    named.add(byId("teach-label").value.trim());
    byId("teach-label").value = "";
    refresh();
  });
  byId("teach-fit").addEventListener("click", begin);
  byId("teach-cancel").addEventListener("click", () => act("cancelling", () => api.json("DELETE", `${api.path("teach", set)}/fit`)));
}
