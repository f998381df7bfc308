// The table of expert sets, what can be done with them, and the memory they take.

import * as api from "./api.js";
import { byId, keep, make, notify, say } from "./dom.js";
import { ago, bytes } from "./format.js";

/** Rows shown at once; the filter finds the others. */
const MAX_ROWS = 200;
/** Uploads may take long on a slow link. */
const UPLOAD_TIMEOUT_MS = 600_000;

const KINDS = ["backbone", "sets", "scratch", "queue"];
const COLUMNS = ["Set", "Version", "State", "Memory", "File", "Requests", "Last used", "Pinned", "Actions"];

let listing = { default: "", sets: [], memory: null };
let choose = () => {};
let refresh = () => {};

const keyOf = (set) => `${set.name}/${set.version}`;

/** Takes in the answer of GET /sets. */
export function update(answer) {
  listing = answer;
  drawTable();
  drawMemory();
}

/** Names of the sets, each once, in order. */
export const names = () => [...new Set(listing.sets.map(({ name }) => name))];

function drawTable() {
  const wanted = byId("filter").value.trim().toLowerCase();
  const found = listing.sets.filter(({ name }) => name.toLowerCase().includes(wanted));
  const shown = found.slice(0, MAX_ROWS);
  keep(byId("sets"), shown, keyOf, createRow, updateRow);
  const cut = shown.length < found.length ? `, the first ${shown.length} shown` : "";
  say(byId("set-count"), `${found.length} of ${listing.sets.length} versions${cut}`);
  const broken = listing.broken ?? [];
  byId("broken").hidden = broken.length === 0;
  keep(byId("broken-files"), broken, ({ file }) => file, () => make("li"), (item, { file, reason }) => say(item, `${file}: ${reason}`));
}

const ACTIONS = [
  { name: "load", shown: (set) => set.state !== "resident" && set.current },
  { name: "unload", shown: (set) => set.state === "resident" && !set.pinned },
  { name: "pin", shown: (set) => !set.pinned && set.current },
  { name: "unpin", shown: (set) => set.pinned },
];

function createRow(set) {
  const action = (name, run) => {
    const button = make("button", { type: "button", dataset: { action: name } }, name);
    button.setAttribute("aria-label", `${name} ${set.name}, version ${set.version}`);
    button.addEventListener("click", run);
    return button;
  };
  const buttons = [
    action("try", () => choose(set.name)),
    ...ACTIONS.map(({ name }) => action(name, () => act(name, set, "POST", `${api.path("sets", set.name)}/${name}`))),
    action("delete", () => {
      if (window.confirm(`Delete version ${set.version} of ${set.name} from the store?`)) {
        act("delete", set, "DELETE", api.path("sets", set.name, set.version));
      }
    }),
  ];
  const cell = (column) => make("td", { dataset: { column } });
  const row = make("tr", {}, make("th", { scope: "row" }), ...COLUMNS.slice(1).map(cell));
  row.lastElementChild.append(make("div", { className: "actions" }, ...buttons));
  return row;
}

function updateRow(row, set) {
  const [name, version, state, memory, file, hits, lastUsed, pinned, actions] = row.children;
  say(name, set.name);
  say(version, set.current ? `${set.version}` : `${set.version} (not current)`);
  say(state, set.reason ? `${set.state}: ${set.reason}` : set.state);
  // Unloading by hand is no failure.
  state.dataset.state = set.reason && set.reason !== "unloaded" ? "failed" : set.state;
  say(memory, set.resident_bytes ? bytes(set.resident_bytes) : "–");
  say(file, bytes(set.file_bytes));
  say(hits, set.hits.toLocaleString("en"));
  say(lastUsed, ago(set.last_used));
  say(pinned, set.pinned ? "yes" : "no");
  for (const { name: action, shown } of ACTIONS) actions.querySelector(`[data-action=${action}]`).hidden = !shown(set);
}

async function act(name, set, method, path, body = undefined, timeoutMs = undefined) {
  const message = byId("sets-message");
  notify(message, "busy", `${name} ${set.name} …`);
  try {
    await api.json(method, path, body, timeoutMs);
    notify(message, "ok", `${name} ${set.name}: done.`);
  } catch (failure) {
    notify(message, "error", `${name} ${set.name}: ${failure.advice ?? failure}`);
  }
  await refresh();
}

async function upload(event) {
  event.preventDefault();
  const [name, version, file] = [byId("upload-name").value.trim(), byId("upload-version").value, byId("upload-file").files[0]];
  await act("upload", { name }, "PUT", api.path("sets", name, version), file, UPLOAD_TIMEOUT_MS);
}

function drawMemory() {
  const { budget_bytes: budget, accounted_bytes: accounted, kinds } = listing.memory;
  say(byId("memory-total"), `${bytes(accounted)} of ${bytes(budget)} are spoken for`);
  const parts = [...KINDS.map((kind) => [kind, kinds[kind]]), ["free", Math.max(0, budget - accounted)]];
  keep(byId("memory-bar"), parts, ([kind]) => kind, ([kind]) => make("span", { className: `kind-${kind}` }), (part, [, count]) => part.style.setProperty("flex-grow", count));
  const create = ([kind]) => make("li", {}, make("span", { className: `swatch kind-${kind}` }), make("span", {}, kind), make("span", { className: "number" }));
  keep(byId("memory"), parts, ([kind]) => kind, create, (item, [, count]) => say(item.lastElementChild, bytes(count)));
}

/** Wires the section's controls: `chooseSet` shows a set above, `refreshSets` asks for the listing again. */
export function start(chooseSet, refreshSets) {
  [choose, refresh] = [chooseSet, refreshSets];
  byId("filter").addEventListener("input", drawTable);
  byId("upload").addEventListener("submit", upload);
  byId("set-columns").append(...COLUMNS.map((name) => make("th", { scope: "col" }, name)));
}
