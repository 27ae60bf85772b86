// The calls the page makes: which models are served, and a streamed chat completion. Every call carries the key.

import { keep, recall } from "./kept.js";

const KEY = "nanoworks.key";
const LOST = "The connection closed before the answer was complete.";

/** An error the server told about. `message` may be shown to the reader. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let key = recall(KEY, "sessionStorage") ?? recall(KEY);

export const hasKey = () => key !== null;

/** Use `value` from now on: in this tab, or with `remember` in this browser. null forgets it everywhere. */
export function setKey(value, remember = false) {
  key = value;
  keep(KEY, value, "sessionStorage");
  keep(KEY, remember ? value : null);
}

/** Set by the page: asks the reader for a key and resolves to whether there is one to try. */
let askForKey = async () => false;
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** @returns {Promise<{id: string, max_model_len: number}[]>} the models behind this server */
export async function fetchModels() {
  return (await (await call("v1/models")).json()).data;
}

/**
 * Stream one answer. Yields each chunk of the completion as the server sends it; aborting `signal` closes the
 * connection, which is what stops the model. Throws an Error whose message may be shown to the reader.
 */
export async function* streamChat(request, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, chunk.error.message);
    yield chunk;
  }
  throw new Error(LOST);
}

/** fetch with the key; a 401 asks the reader for one and tries again. */
async function call(path, options = {}) {
  for (;;) {
    const sent = key;
    const headers = { "Content-Type": "application/json", ...(sent && { Authorization: `Bearer ${sent}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      if (error.name === "AbortError") throw error;
      // fetch says no more than "Failed to fetch" when nobody listens at the other end.
      throw new Error("The server cannot be reached. Is it still running?");
    });
    if (response.ok) return response;
    const error = await errorFrom(response);
    if (response.status !== 401 || !(await askForKey(sent ? error.message : ""))) throw error;
    options.signal?.throwIfAborted();
  }
}

async function errorFrom(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`;
  return new ApiError(response.status, message);
}

/** Yield the `data` of each event. Only what our server sends: one `data:` line an event. */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(LOST);
    });
    if (done) return;
    const lines = (buffer + value).split("\n");
    buffer = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice("data: ".length);
  }
}
