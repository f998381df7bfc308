// Live charts of the last minutes, from /metrics.

import { byId, say } from "./dom.js";
import { milliseconds } from "./format.js";
import { buckets, parse, quantile, total } from "./metrics.js";

const { uPlot } = window;

/** Readings kept: five minutes at one every two seconds. */
const KEPT = 150;
/** Percentiles look back over this many readings: one alone holds too few requests. */
const WINDOW = 5;

const NAMES = ["bvit_images_total", "bvit_request_duration_seconds_bucket", "bvit_queue_depth", "bvit_requests_in_flight"];
const isClassify = ({ route }) => route.startsWith("/classify");

const readings = [];
const points = { time: [], images: [], p50: [], p95: [], p99: [], queue: [], inFlight: [] };
const charts = [];

/** Takes in the text of /metrics, read now; `null` leaves a gap where the server could not be reached. */
export function add(text) {
  const time = Date.now() / 1000;
  if (text === null) {
    readings.length = 0;
    push(time, {});
    return;
  }
  const series = parse(text, NAMES);
  readings.push({
    time,
    images: total(series.get("bvit_images_total"), ({ result }) => result === "ok"),
    latency: buckets(series.get("bvit_request_duration_seconds_bucket"), isClassify),
    queue: total(series.get("bvit_queue_depth")),
    inFlight: total(series.get("bvit_requests_in_flight")),
  });
  if (readings.length > WINDOW + 1) readings.shift();
  const now = readings.at(-1);
  const before = readings.at(-2);
  const percentile = (q) => {
    const seconds = quantile(readings[0].latency, now.latency, q);
    return seconds === null ? null : seconds * 1000;
  };
  // A counter that fell belongs to a new process.
  const restarted = before && now.images < before.images;
  push(time, {
    images: before && !restarted ? (now.images - before.images) / (now.time - before.time) : null,
    p50: percentile(0.5),
    p95: percentile(0.95),
    p99: percentile(0.99),
    queue: now.queue,
    // The page's own reading is in flight while it is answered.
    inFlight: Math.max(0, now.inFlight - 1),
  });
  if (restarted) readings.splice(0, readings.length - 1);
}

function push(time, values) {
  for (const [name, list] of Object.entries(points)) {
    list.push(name === "time" ? time : (values[name] ?? null));
    if (list.length > KEPT) list.shift();
  }
  for (const { plot, names } of charts) plot.setData([points.time, ...names.map((name) => points[name])]);
  const text = (value, show) => (value === null || value === undefined ? "–" : show(value));
  say(byId("now-images"), text(values.images, (rate) => `${rate.toFixed(1)} per second`));
  const latency = [values.p50, values.p95, values.p99].map((ms) => text(ms, milliseconds));
  say(byId("now-latency"), `p50 ${latency[0]}, p95 ${latency[1]}, p99 ${latency[2]}`);
  say(byId("now-queue"), `${text(values.queue, String)} waiting, ${text(values.inFlight, String)} in flight`);
}

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function chart(id, series) {
  const place = byId(id);
  const axis = { stroke: () => variable("--muted"), grid: { stroke: () => variable("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const options = {
    width: place.clientWidth || 300,
    height: 170,
    legend: { show: false },
    cursor: { show: false },
    scales: { y: { range: (_, min, max) => [0, Math.max(max * 1.1, 1)] } },
    axes: [{ ...axis, size: 32, space: 90, values: "{HH}:{mm}:{ss}" }, { ...axis, size: 46 }],
    series: [{}, ...series.map(({ label, colour }) => ({ label, stroke: () => variable(colour), width: 2, spanGaps: false, points: { show: false } }))],
  };
  const names = series.map(({ name }) => name);
  const plot = new uPlot(options, [[], ...names.map(() => [])], place);
  charts.push({ plot, names });
  new ResizeObserver(() => plot.setSize({ width: place.clientWidth, height: 170 })).observe(place);
}

/** Makes the charts. */
export function start() {
  chart("chart-images", [{ name: "images", label: "images/s", colour: "--chart-1" }]);
  chart("chart-latency", [
    { name: "p50", label: "p50", colour: "--chart-1" },
    { name: "p95", label: "p95", colour: "--chart-2" },
    { name: "p99", label: "p99", colour: "--chart-3" },
  ]);
  chart("chart-queue", [
    { name: "queue", label: "waiting", colour: "--chart-1" },
    { name: "inFlight", label: "in flight", colour: "--chart-2" },
  ]);
  // Canvases do not follow style sheets by themselves.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(({ plot }) => plot.redraw()));
}
