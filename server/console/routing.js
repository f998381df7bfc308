// The routing map: the image's patches coloured by the expert each went to, layer by layer.

import { byId, keep, make, say } from "./dom.js";
import { percent } from "./format.js";

// Neighbouring expert numbers get colours far apart: the golden angle spreads any count evenly round the circle, and
// three lightnesses tell near hues apart. All are light enough for black text.
export const colour = (expert) => `hsl(${(expert * 137.508) % 360} 70% ${[78, 68, 86][expert % 3]}%)`;

/** Most distinct experts listed below the map. */
const LEGEND = 12;
/** Widest grid whose cells have room for a number. */
const NUMBERED = 16;

let map = null;
let pinnedCell = 0;

const layer = () => map.layers[byId("layer").valueAsNumber - 1];
const first = (experts) => experts[0];

/** Shows the map of an answer; `null`, or one of a model without routers, hides it. */
export function show(routing) {
  map = routing?.layers.length ? routing : null;
  byId("routing").hidden = !map;
  if (!map) return;
  const slider = byId("layer");
  slider.max = map.layers.length;
  slider.value = Math.min(slider.valueAsNumber || 1, map.layers.length);
  build();
  drawLayer();
}

/** Puts a copy of the image beside the map. */
export function showImage(source) {
  const canvas = byId("map-image");
  [canvas.width, canvas.height] = [source.width, source.height];
  canvas.getContext("2d").drawImage(source, 0, 0);
}

function build() {
  const [rows, columns] = map.grid;
  pinnedCell = 0;
  const cell = (index) =>
    make("span", { role: "gridcell", tabIndex: index === 0 ? 0 : -1, className: "cell", dataset: { index } });
  const row = (r) => make("div", { role: "row" }, ...Array.from({ length: columns }, (_, c) => cell(r * columns + c)));
  const grid = byId("map");
  grid.style.setProperty("--columns", columns);
  grid.classList.toggle("numbered", columns <= NUMBERED);
  grid.replaceChildren(...Array.from({ length: rows }, (_, r) => row(r)));
}

const cells = () => [...byId("map").querySelectorAll(".cell")];

function drawLayer() {
  const { experts, neighbour_agreement: agreement, chance_agreement: chance } = layer();
  const number = byId("layer").valueAsNumber;
  say(byId("layer-name"), `Layer ${number} of ${map.layers.length}`);
  byId("layer").setAttribute("aria-valuetext", `layer ${number} of ${map.layers.length}`);
  cells().forEach((cell, index) => {
    say(cell, String(first(experts[index])));
    cell.style.setProperty("background-color", colour(first(experts[index])));
    cell.setAttribute("aria-label", describe(index));
  });
  say(byId("agreement"), agreement === null ? "–" : percent(agreement));
  say(byId("chance"), chance === null ? "–" : percent(chance));
  drawLegend(experts);
  highlight(null);
}

function drawLegend(experts) {
  const counts = new Map();
  for (const chosen of experts) counts.set(first(chosen), (counts.get(first(chosen)) ?? 0) + 1);
  const busiest = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const items = busiest.slice(0, LEGEND);
  const create = ([expert]) => make("li", {}, make("span", { className: "swatch", style: { "background-color": colour(expert) } }), make("span"));
  keep(byId("experts"), items, ([expert]) => String(expert), create, (item, [expert, count]) => say(item.lastElementChild, `expert ${expert}: ${count}`));
  const hidden = busiest.length - items.length;
  const more = hidden > 0 ? `, ${hidden} of them not listed` : "";
  say(byId("experts-used"), `${busiest.length} of ${map.num_experts} experts are some patch's first choice${more}`);
}

function describe(index) {
  const [row, column] = [Math.floor(index / map.grid[1]) + 1, (index % map.grid[1]) + 1];
  const [chosen, ...others] = layer().experts[index];
  return `Row ${row}, column ${column}: expert ${chosen}${others.length ? `, then ${others.join(", ")}` : ""}`;
}

/** Points out a patch, in map and image, and all patches with the same first choice; `null` none. */
function highlight(index) {
  const chosen = index === null ? null : first(layer().experts[index]);
  const same = layer().experts.map((experts) => first(experts) === chosen);
  cells().forEach((cell, i) => cell.classList.toggle("other", chosen !== null && !same[i]));
  const count = same.filter(Boolean).length;
  const hint = "Point at a patch, or use the arrow keys in the map, to see its experts.";
  say(byId("patch"), index === null ? hint : `${describe(index)} (the first choice of ${count} of ${same.length} patches)`);
  const marker = byId("marker");
  marker.hidden = index === null;
  if (index === null) return;
  const [rows, columns] = map.grid;
  const style = {
    left: `${((index % columns) * 100) / columns}%`,
    top: `${(Math.floor(index / columns) * 100) / rows}%`,
    width: `${100 / columns}%`,
    height: `${100 / rows}%`,
  };
  for (const [name, value] of Object.entries(style)) marker.style.setProperty(name, value);
}

const indexOf = (event) => {
  const cell = event.target.closest(".cell");
  return cell ? Number(cell.dataset.index) : null;
};

function moveFocus(event) {
  const index = indexOf(event);
  if (index === null) return;
  const [rows, columns] = map.grid;
  const [row, column] = [Math.floor(index / columns), index % columns];
  const target = {
    ArrowLeft: [row, Math.max(column - 1, 0)],
    ArrowRight: [row, Math.min(column + 1, columns - 1)],
    ArrowUp: [Math.max(row - 1, 0), column],
    ArrowDown: [Math.min(row + 1, rows - 1), column],
    Home: [row, 0],
    End: [row, columns - 1],
  }[event.key];
  if (!target) return;
  event.preventDefault();
  const all = cells();
  all[pinnedCell].tabIndex = -1;
  pinnedCell = target[0] * columns + target[1];
  all[pinnedCell].tabIndex = 0;
  all[pinnedCell].focus();
}

/** Wires the section's controls. */
export function start() {
  byId("layer").addEventListener("input", drawLayer);
  const grid = byId("map");
  grid.addEventListener("pointerover", (event) => highlight(indexOf(event)));
  grid.addEventListener("pointerleave", () => highlight(null));
  grid.addEventListener("focusin", (event) => highlight(indexOf(event)));
  grid.addEventListener("focusout", () => highlight(null));
  grid.addEventListener("keydown", moveFocus);
}
