// From a message to its element. Answers go through markdown.js; everything else is set as text, never as HTML.

import { plainText, timing } from "./conversation.js";
import { hole, renderMarkdown, withoutHoles } from "./markdown.js";
import { growWithText, sendOnEnter } from "./input.js";

const ENDINGS = { length: "reached the token limit", stopped: "stopped", cut: "cut by a reload" };

export function fromTemplate(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

/** The element of message `index`, complete. */
export function messageElement(conversation, index) {
  const node = conversation.nodes[index];
  const element = fromTemplate(`${node.role}-template`);
  element.dataset.index = index;
  if (node.role === "user") element.querySelector(".bubble").textContent = node.text;
  else if (node.role === "assistant") updateAnswer(element, node);
  else element.querySelector("ul").replaceChildren(...node.results.map(resultElement));
  return element;
}

/** Bring the switch between the versions of a message up to date. */
export function updateVersions(element, conversation, index) {
  const box = element.querySelector(".versions");
  if (!box) return;
  const versions = conversation.versions(index);
  const at = versions.indexOf(index);
  box.hidden = versions.length < 2;
  box.querySelector("output").textContent = `${at + 1} / ${versions.length}`;
  box.querySelector("[data-action=previous]").disabled = at === 0;
  box.querySelector("[data-action=next]").disabled = at === versions.length - 1;
}

/** Bring the element of an answer up to date with a node that has grown or ended. */
export function updateAnswer(element, node) {
  element.dataset.state = node.state;
  const tools = showParts(element.querySelector(".answer"), node.parts);
  element.querySelector(".answer").setAttribute("aria-busy", node.state === "streaming");
  showCalls(element.querySelector(".calls"), node);
  const error = element.querySelector(".error");
  error.hidden = !node.error;
  error.textContent = node.error;
  element.querySelector("[data-action=copy]").hidden = !plainText(node).trim() && !tools;
  element.querySelector(".figures").textContent = figures(node);
}

/** The text as markdown, the calculator's calls in their places in it. Returns how many calls there are. */
function showParts(container, parts) {
  const tools = []; // [{expression, result}]: a call and its result are two parts and one thing on the page
  let text = "";
  for (const part of parts) {
    if (part.type === "text") text += withoutHoles(part.text);
    else if (part.type === "python_output" && tools.length) tools.at(-1).result = part.text;
    else text += hole(tools.push({ expression: part.text, result: "" }) - 1);
  }
  renderMarkdown(container, text);
  for (const place of container.querySelectorAll("[data-hole]")) {
    const tool = tools[place.dataset.hole];
    if (!tool) continue;
    if (!place.firstChild) place.append(fromTemplate("calculator-template"));
    place.querySelector("code").textContent = tool.expression;
    place.querySelector(".result").textContent = tool.result && `= ${tool.result}`;
  }
  return tools.length;
}

/** The functions the model asks for, each with a field for what it returned once the answer has ended. */
function showCalls(container, { calls, state }) {
  container.hidden = calls.length === 0;
  const list = container.querySelector("ul");
  calls.forEach((call, number) => {
    const item = list.children[number] ?? list.appendChild(fromTemplate("call-template"));
    item.querySelector(".tool-name").textContent = call.name;
    item.querySelector("code").textContent = indented(call.arguments);
    item.querySelector("textarea").setAttribute("aria-label", `What ${call.name} returned`);
  });
  container.querySelector("button").hidden = state === "streaming";
}

function resultElement({ name, content }) {
  const item = fromTemplate("result-template");
  item.querySelector(".tool-name").textContent = name;
  item.querySelector("code").textContent = content;
  return item;
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // still streaming, or not JSON
  }
}

/** What stands under an answer: "42 tokens · 0.31 s to the first · 18 tokens/s". */
function figures(node) {
  const { tokens, counted, seconds, speed } = timing(node);
  return [
    tokens > 0 && `${counted ? "" : "about "}${tokens} ${tokens === 1 ? "token" : "tokens"}`,
    seconds !== null && `${seconds.toFixed(2)} s to the first`,
    speed !== null && `${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`,
    ENDINGS[node.state],
  ]
    .filter(Boolean)
    .join(" · ");
}

/** Replace the text of a user message by an editor; `onSend(text)` and `onCancel()` end it. */
export function openEditor(element, text, { onSend, onCancel }) {
  const editor = fromTemplate("editor-template");
  const input = editor.querySelector("textarea");
  input.value = text;
  element.replaceChildren(editor);
  element.classList.add("editing");
  growWithText(input);
  sendOnEnter(input, editor);
  input.focus();
  editor.querySelector("[data-action=cancel]").addEventListener("click", onCancel);
  editor.addEventListener("submit", (event) => {
    event.preventDefault();
    if (input.value.trim()) onSend(input.value.trim());
  });
  editor.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation(); // Esc belongs to the editor here, not to the stop button
    onCancel();
  });
}

/** What the server says of a model, as the terms and descriptions of a list. */
export function aboutModel({ max_model_len: context, run_id: run, lineage = {} }) {
  const facts = { context: `${context.toLocaleString()} tokens, the answer included`, ...(run && { run }), ...lineage };
  return Object.entries(facts).flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const description = document.createElement("dd");
    term.textContent = name.replaceAll("_", " ");
    description.textContent = typeof value === "object" ? JSON.stringify(value) : value;
    return [term, description];
  });
}
