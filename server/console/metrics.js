// Reading the Prometheus text of /metrics, and rates and percentiles from two readings.

/** `name{label="value"} number` lines as [labels, number] by name, for the names that are wanted. */
export function parse(text, wanted) {
  const series = new Map(wanted.map((name) => [name, []]));
  for (const line of text.split("\n")) {
    const match = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    const found = match && series.get(match[1]);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    found.push([labels, match[3] === "+Inf" ? Infinity : Number(match[3])]);
  }
  return series;
}

/** Sum of a metric's series whose labels pass. */
export function total(series, passes = () => true) {
  return series.reduce((sum, [labels, value]) => (passes(labels) ? sum + value : sum), 0);
}

/** A histogram's cumulative counts by upper bound, over the series whose labels pass. */
export function buckets(series, passes) {
  const counts = new Map();
  for (const [labels, value] of series) {
    if (!passes(labels)) continue;
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return counts;
}

/** The `q` quantile of what a histogram gained between two readings, linear within a bucket; `null` if nothing. */
export function quantile(before, after, q) {
  const bounds = [...after.keys()].sort((a, b) => a - b);
  const gained = bounds.map((bound) => after.get(bound) - (before.get(bound) ?? 0));
  const rank = q * (gained.at(-1) ?? 0);
  if (rank <= 0) return null;
  const at = gained.findIndex((count) => count >= rank);
  // Beyond the last finite bound nothing more is known than that bound.
  if (bounds[at] === Infinity) return bounds[at - 1] ?? null;
  const [low, below] = at === 0 ? [0, 0] : [bounds[at - 1], gained[at - 1]];
  return low + ((bounds[at] - low) * (rank - below)) / (gained[at] - below);
}
