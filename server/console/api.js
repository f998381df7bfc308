// The one place that talks to the server. The key lives in this module's memory and is gone with the page.

let key = "";

/** Requests from now on present this key; none when empty. */
export function useKey(text) {
  key = text.trim();
}

/** What went wrong with a request: the server's own `error_type` and sentence, or "unreachable". */
export class Failure extends Error {
  constructor(code, message, retryAfter) {
    super(message);
    this.code = code;
    this.retryAfter = retryAfter;
  }

  /** A sentence that says what the person in front of the page can do. */
  get advice() {
    const wait = this.retryAfter ? ` Try again in ${this.retryAfter} s.` : "";
    switch (this.code) {
      case "unreachable":
        return "The server cannot be reached.";
      case "unauthorized":
      case "forbidden":
        return `The server refuses${key ? " this key" : ""}: ${this.message}.`;
      case "queue_full":
        return `The server is overloaded: ${this.message}.${wait}`;
      case "draining":
      case "not_ready":
        return `Not now: ${this.message}.${wait}`;
      default:
        return `${this.message}.${wait}`;
    }
  }
}

async function send(method, path, body, timeoutMs) {
  // Pages of other sites cannot send this header, so the server knows its console by it, also behind a proxy.
  const headers = { "X-Requested-With": "console", ...(key && { Authorization: `Bearer ${key}` }) };
  try {
    return await fetch(path, { method, body, headers, cache: "no-store", signal: AbortSignal.timeout(timeoutMs) });
  } catch (error) {
    throw new Failure(error.name === "TimeoutError" ? "timeout" : "unreachable", "the server did not answer");
  }
}

/** An answer as text. Throws `Failure`. */
export async function text(method, path, body = undefined, timeoutMs = 30_000) {
  const response = await send(method, path, body, timeoutMs);
  let content;
  try {
    content = await response.text();
  } catch {
    throw new Failure("unreachable", "the answer broke off");
  }
  if (response.ok) return content;
  let failure = {};
  try {
    failure = JSON.parse(content);
  } catch {
    // Not our server's words: a proxy in between.
  }
  const message = failure.error ?? `the server answered ${response.status}`;
  throw new Failure(failure.error_type ?? "unknown", message, response.headers.get("Retry-After"));
}

/** An answer as JSON, `null` when it is empty. Throws `Failure`. */
export async function json(method, path, body = undefined, timeoutMs = 30_000) {
  const content = await text(method, path, body, timeoutMs);
  return content === "" ? null : JSON.parse(content);
}

/** A path from its segments, each escaped. */
export const path = (...segments) => segments.map((segment) => `/${encodeURIComponent(segment)}`).join("");
