// The two calls the page makes: which model is served, and a streamed chat completion.

/** @returns {Promise<{id: string, max_model_len: number}>} the model behind this server */
export async function fetchModel() {
  const response = await fetch("v1/models");
  if (!response.ok) throw new Error(await errorMessage(response));
  return (await response.json()).data[0];
}

/**
 * Stream one answer. Yields each chunk of the completion as the server sends it; aborting `signal` closes the
 * connection, which is what stops the model. Throws an Error whose message may be shown to the reader.
 */
export async function* streamChat(request, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw new Error(await errorMessage(response));
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("The connection closed before the answer was complete.");
}

/** Yield the `data` of each event. Only what our server sends: one `data:` line an event. */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (buffer + value).split("\n");
    buffer = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice("data: ".length);
  }
}

async function errorMessage(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}
