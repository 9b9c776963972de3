// What the page asks of the server: JSON, streams, and the API key where one is needed.

import { $ } from "./dom.js";

export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const KEY = "jaxkv-api-key";
let asking = null; // one dialog at a time, however many requests were refused

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("#key");
    const why = wrong ? "The server does not know that key." : "This server asks for a key.";
    $("#keywhy").textContent = `${why} It is kept until the tab is closed.`;
    dialog.addEventListener("close", () => {
      asking = null;
      const key = $("#keyvalue").value;
      $("#keyvalue").value = "";
      if (dialog.returnValue === "use" && key) sessionStorage.setItem(KEY, key);
      resolve(dialog.returnValue === "use" && key);
    }, { once: true });
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

// The response of a request that succeeded. Throws ApiError with the server's own words, AbortError when aborted.
async function request(path, { body, signal, ask = true } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...(body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server cannot be reached.");
    }
    if (response.ok) return response;
    if (response.status === 401 && ask && await askForKey(Boolean(key))) continue;
    const answer = await response.json().catch(() => null);
    const after = response.headers.get("retry-after");
    throw new ApiError(response.status, answer?.error?.message ?? response.statusText, after);
  }
}

export const getJson = async (path, options) => (await request(path, options)).json();
export const postJson = async (path, body) => (await request(path, { body })).json();

// The events of a streamed answer, one parsed object each. Throws when the server reports an error or goes away.
export async function* stream(path, body, signal) {
  const streaming = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const response = await request(path, { body: { ...body, ...streaming }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data:")) continue; // a comment that keeps the connection open
        const data = event.slice(5).trim();
        if (data === "[DONE]") return;
        const parsed = JSON.parse(data);
        if (parsed.error) throw new ApiError(0, parsed.error.message);
        yield parsed;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(0, "The connection broke before the answer was complete.");
  }
  throw new ApiError(0, "The server ended the answer before it was complete.");
}
