// A conversation as data: no DOM here. It is a tree, since an edited message or a regenerated answer is a new version
// beside the old one. `nodes[0]` is the root; a node is {role, parent, shown, ...}, where `parent` is an index and
// `shown` the index of the child that is on the page (0: none). What else a node holds is by its role:
//
//   user       text
//   assistant  parts [{type: "text" | "python" | "python_output", text}], calls [{id, name, arguments}],
//              state (newAnswer), error, model, usage, and the times of `timing`
//   tool       results [{id, content}]: what the reader answered to the calls above it

export class Conversation {
  constructor({ id = newId(), title = "", updated = 0, nodes = [{ role: "root", parent: 0, shown: 0 }] } = {}) {
    Object.assign(this, { id, title, updated, nodes });
  }

  /** Append a node under `parent`, show it, and return its index. */
  add(parent, node) {
    const index = this.nodes.push({ ...node, parent, shown: 0 }) - 1;
    this.show(index);
    this.updated = Date.now();
    if (!this.title && node.role === "user") this.title = node.text.replace(/\s+/g, " ").trim().slice(0, 80);
    return index;
  }

  /** Put this version of a message on the page, in place of the one that was there. */
  show(index) {
    this.nodes[this.nodes[index].parent].shown = index;
  }

  /** The indexes of the messages on the page, first to last. */
  path() {
    const path = [];
    for (let index = this.nodes[0].shown; index; index = this.nodes[index].shown) path.push(index);
    return path;
  }

  /** The index of the last message on the page; 0, the root, when there is none. */
  last() {
    return this.path().at(-1) ?? 0;
  }

  /** The indexes of a message and its other versions, oldest first. */
  versions(index) {
    const { parent } = this.nodes[index];
    return this.nodes.flatMap((node, other) => (other && node.parent === parent ? [other] : []));
  }

  /**
   * The messages up to and with `index`, in the API's form. An exchange that ended before its first word is left
   * out: an empty answer would only teach the model to be silent. The calculator's calls go back as they came, in
   * `nanoworks.parts`, so the model sees exactly what it wrote.
   */
  toRequest(index, system) {
    const messages = [];
    for (const node of this.#upTo(index)) {
      if (node.role === "user") messages.push({ role: "user", content: node.text });
      else if (node.role === "tool")
        messages.push(...node.results.map(({ id, content }) => ({ role: "tool", tool_call_id: id, content })));
      else if (node.parts.length || node.calls.length) messages.push(answerInRequest(node));
      else while (messages.length && messages.pop().role !== "user");
    }
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }

  #upTo(index) {
    const nodes = [];
    for (; index; index = this.nodes[index].parent) nodes.unshift(this.nodes[index]);
    return nodes;
  }
}

function answerInRequest({ parts, calls }) {
  const message = { role: "assistant", content: plainText({ parts }) };
  if (parts.some((part) => part.type !== "text")) message.nanoworks = { parts };
  if (calls.length)
    message.tool_calls = calls.map(({ id, name, arguments: args }) => ({
      id,
      type: "function",
      function: { name, arguments: args },
    }));
  return message;
}

/** An answer to come. `state` becomes the finish reason, or "stopped" (by the reader), "failed", or "cut" (by a reload). */
export function newAnswer(model, now) {
  return { role: "assistant", parts: [], calls: [], state: "streaming", error: "", model, usage: null, pieces: 0, sent: now, first: 0, last: 0 };
}

/** Add one chunk of the stream to `answer`; `now` in milliseconds. */
export function applyChunk(answer, chunk, now) {
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  const { content, nanoworks: piece, tool_calls: calls = [] } = choice.delta;
  if (content || piece || calls.length) {
    answer.first ||= now;
    answer.last = now;
    answer.pieces += 1;
  }
  if (content || piece) addPart(answer.parts, piece?.type ?? "text", piece?.text ?? content);
  for (const call of calls) addCall(answer.calls, call);
  if (choice.finish_reason) answer.state = choice.finish_reason;
}

function addPart(parts, type, text) {
  const last = parts.at(-1);
  if (last?.type === type) last.text += text;
  else parts.push({ type, text });
}

function addCall(calls, { index = 0, id, function: called = {} }) {
  const call = (calls[index] ??= { id: "", name: "", arguments: "" });
  if (id) call.id = id;
  call.name += called.name ?? "";
  call.arguments += called.arguments ?? "";
}

/** The answer without its tool calls: what is copied, and what an ordinary client sees. */
export function plainText(answer) {
  return answer.parts.map((part) => (part.type === "text" ? part.text : "")).join("");
}

/**
 * How the answer ran: `tokens` (`counted` is false while only the pieces are known, each about a token), `seconds` to
 * the first one, and tokens a second from the first to the last; null where there is nothing to measure.
 */
export function timing({ usage, pieces, sent, first, last }) {
  const tokens = usage?.completion_tokens ?? pieces;
  return {
    tokens,
    counted: Boolean(usage),
    seconds: first ? (first - sent) / 1000 : null,
    speed: tokens > 1 && last > first ? ((tokens - 1) * 1000) / (last - first) : null,
  };
}

/** crypto.randomUUID is missing on plain HTTP, and the id only has to be new in this browser. */
function newId() {
  return Date.now().toString(36) + Math.random().toString(36).slice(2, 10);
}
