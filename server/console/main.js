// The page: one clock that asks the server how it is, and the sections that show the answers.

import * as api from "./api.js";
import { byId, say } from "./dom.js";
import * as cameras from "./cameras.js";
import * as classify from "./classify.js";
import * as live from "./live.js";
import * as routing from "./routing.js";
import * as sets from "./sets.js";
import * as teach from "./teach.js";

const EVERY_MS = 2000;
/** The listing may be long; it is asked for on every third turn, and after every action. */
const LISTING_TURNS = 3;
/** A server that takes longer than this for a metric is not there for people. */
const TIMEOUT_MS = 5000;

let lastSeen = null;
let turn = 0;

const STATES = {
  ready: "The server is ready.",
  draining: "The server is shutting down: it finishes what it has and takes nothing new.",
  not_ready: "The server is starting.",
};

function showState(state, health) {
  const status = byId("status");
  status.dataset.state = state;
  say(byId("status-word"), state === "not_ready" ? "starting" : state);
  const banner = byId("banner");
  banner.hidden = state === "ready";
  if (state === "ready") {
    lastSeen = new Date();
    say(byId("version"), `version ${health.version}`);
    return;
  }
  const seen = lastSeen ? ` It last answered at ${lastSeen.toLocaleTimeString("en-GB")}.` : "";
  say(banner, STATES[state] ?? `The server cannot be reached.${seen} Trying again every ${EVERY_MS / 1000} seconds.`);
}

async function refreshSets() {
  try {
    const listing = await api.json("GET", "/sets", undefined, TIMEOUT_MS);
    sets.update(listing);
    classify.setNames(sets.names(), listing.default);
  } catch {
    // The clock's other question says what is wrong.
  }
}

async function tick() {
  const wasUnreachable = byId("status").dataset.state !== "ready";
  const [health, metrics] = await Promise.allSettled([
    api.json("GET", "/health", undefined, TIMEOUT_MS),
    api.text("GET", "/metrics", undefined, TIMEOUT_MS),
  ]);
  live.add(metrics.status === "fulfilled" ? metrics.value : null);
  if (health.status === "fulfilled") showState("ready", health.value);
  else showState(health.reason.code in STATES ? health.reason.code : "unreachable");
  if (health.status === "fulfilled" && (wasUnreachable || turn % LISTING_TURNS === 0)) await refreshSets();
  if (health.status === "fulfilled") await cameras.refresh(wasUnreachable || turn % LISTING_TURNS === 0);
  turn += 1;
}

async function run() {
  // A page in the background has nobody to tell.
  if (!document.hidden) await tick();
  setTimeout(run, EVERY_MS);
}

byId("key").addEventListener("input", (event) => {
  api.useKey(event.target.value);
  cameras.keyChanged();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) cameras.pause();
  else tick();
});
classify.start();
routing.start();
sets.start(classify.chooseSet, refreshSets);
teach.start(refreshSets);
cameras.start(teach.changed);
live.start();
run();
