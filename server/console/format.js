// Numbers for people.

/** Bytes in binary units. */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? count : count.toFixed(count < 10 ? 2 : 1)} ${units[unit]}`;
}

/** A share in 0..=1. */
export const percent = (share) => `${(share * 100).toFixed(1)}%`;

/** Milliseconds, with three significant digits where they mean something. */
export function milliseconds(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return `${ms.toFixed(ms < 10 ? 2 : ms < 100 ? 1 : 0)} ms`;
}

/** How long ago a moment was, given in seconds since 1970. */
export function ago(seconds, now = Date.now() / 1000) {
  if (seconds === null) return "never";
  const passed = Math.max(0, now - seconds);
  if (passed < 2) return "now";
  if (passed < 120) return `${Math.floor(passed)} s ago`;
  if (passed < 7200) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 172800) return `${Math.floor(passed / 3600)} h ago`;
  return `${Math.floor(passed / 86400)} days ago`;
}
