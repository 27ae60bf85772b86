// The conversation as data: no DOM here. A user message is {role, text}; an answer is {role, parts, ...}, where a part
// is {type, text} and type is "text", "python" (what the model asks the calculator) or "python_output" (its result).

export class Conversation {
  messages = [];

  addUser(text) {
    this.messages.push({ role: "user", text });
  }

  /** Append an empty answer and return it; the caller feeds it chunks. */
  addAnswer() {
    const answer = { role: "assistant", parts: [], state: "streaming", error: "", usage: null, started: 0, ended: 0 };
    this.messages.push(answer);
    return answer;
  }

  /** Drop message `index` and everything after it. */
  truncate(index) {
    this.messages.length = index;
  }

  /**
   * The messages in the API's form, to be taken before the new answer is added. An exchange that ended before its
   * first word is left out: an empty answer would only teach the model to be silent. Tool calls go back as they
   * came, in `nanoworks.parts`, so the model sees exactly what it wrote.
   */
  toRequest(system) {
    const request = system ? [{ role: "system", content: system }] : [];
    for (const message of this.messages) {
      if (message.role === "user") request.push({ role: "user", content: message.text });
      else if (message.parts.length === 0) request.pop();
      else request.push({ role: "assistant", content: plainText(message), nanoworks: { parts: message.parts } });
    }
    return request;
  }
}

/** Add one chunk of the stream to `answer`. */
export function applyChunk(answer, chunk, now) {
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  const { content, nanoworks: tool } = choice.delta;
  if (content || tool) {
    answer.started ||= now;
    answer.ended = now;
    addPart(answer.parts, tool?.type ?? "text", tool?.text ?? content);
  }
  if (choice.finish_reason) answer.state = choice.finish_reason;
}

function addPart(parts, type, text) {
  const last = parts.at(-1);
  if (last?.type === type) last.text += text;
  else parts.push({ type, text });
}

/** The answer without its tool calls: what is copied, and what an ordinary client sees. */
export function plainText(answer) {
  return answer.parts.filter((part) => part.type === "text").map((part) => part.text).join("");
}

/** Tokens a second from the first to the last token, or null when there is nothing to measure. */
export function tokensPerSecond({ usage, started, ended }) {
  return usage?.completion_tokens > 1 && ended > started
    ? ((usage.completion_tokens - 1) * 1000) / (ended - started)
    : null;
}
