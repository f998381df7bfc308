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

async function send(method, path, body, signal) {
  // Pages of other sites cannot send this header, so the server knows its console by it, also behind a proxy.
  const headers = { "X-Requested-With": "console", ...(key && { Authorization: `Bearer ${key}` }) };
  try {
    return await fetch(path, { method, body, headers, cache: "no-store", signal });
  } catch (error) {
    throw new Failure(error.name === "TimeoutError" ? "timeout" : "unreachable", "the server did not answer");
  }
}

async function refusal(response) {
  let failure = {};
  try {
    failure = JSON.parse(await response.text());
  } catch {
    // Not our server's words: a proxy in between.
  }
  const message = failure.error ?? `the server answered ${response.status}`;
  return new Failure(failure.error_type ?? "unknown", message, response.headers.get("Retry-After"));
}

/** An answer as text. Throws `Failure`. */
export async function text(method, path, body = undefined, timeoutMs = 30_000) {
  const response = await send(method, path, body, AbortSignal.timeout(timeoutMs));
  if (!response.ok) throw await refusal(response);
  try {
    return await response.text();
  } catch {
    throw new Failure("unreachable", "the answer broke off");
  }
}

/** An answer as bytes of some type. Throws `Failure`. */
export async function blob(method, path, timeoutMs) {
  const response = await send(method, path, undefined, AbortSignal.timeout(timeoutMs));
  if (!response.ok) throw await refusal(response);
  return response.blob();
}

/** Hands the data of each server-sent event to `each`, until the stream ends or `signal` ends it. `EventSource` sends no key. */
export async function events(path, signal, each) {
  const response = await send("GET", path, undefined, signal);
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:"));
      if (data.length > 0) each(JSON.parse(data.map((line) => line.slice(5)).join("\n")));
    }
  }
}

/** An answer as JSON, `null` when it is empty. Throws `Failure`. */
export async function json(method, path, body = undefined, timeoutMs = 30_000) {
  const content = await text(method, path, body, timeoutMs);
  return content === "" ? null : JSON.parse(content);
}

/** A path from its segments, each escaped. */
export const path = (...segments) => segments.map((segment) => `/${encodeURIComponent(segment)}`).join("");
