// From a message to its element. Everything is set through textContent: model output is never parsed as HTML.

import { tokensPerSecond } from "./conversation.js";

const ENDINGS = {
  streaming: "",
  stop: "",
  length: "reached the token limit",
  stopped: "stopped",
  failed: "",
};

function fromTemplate(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

export function userElement(message) {
  const element = fromTemplate("user-template");
  element.querySelector(".bubble").textContent = message.text;
  return element;
}

export function assistantElement(message) {
  const element = fromTemplate("assistant-template");
  updateAssistant(element, message);
  return element;
}

/** Bring `element` up to date with a message that has grown or ended. */
export function updateAssistant(element, message) {
  element.dataset.state = message.state;
  element.querySelector(".answer").replaceChildren(...partElements(message.parts));
  const error = element.querySelector(".error");
  error.hidden = !message.error;
  error.textContent = message.error;
  element.querySelector(".figures").textContent = figures(message);
}

/** A tool call and its result are two parts of the message and one block on the page. */
function partElements(parts) {
  const elements = [];
  let tool = null;
  for (const { type, text } of parts) {
    if (type === "python_output" && tool) {
      tool.querySelector(".result").textContent = `= ${text}`;
      tool = null;
    } else if (type === "text") {
      elements.push(document.createTextNode(text));
      tool = null;
    } else {
      tool = fromTemplate("tool-template");
      tool.querySelector("code").textContent = text;
      elements.push(tool);
    }
  }
  return elements;
}

function figures(message) {
  const speed = tokensPerSecond(message);
  return [
    message.usage && `${message.usage.completion_tokens} tokens`,
    speed && `${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`,
    ENDINGS[message.state],
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

/** Keep a textarea as tall as its text, up to the limit the stylesheet sets. */
export function growWithText(textarea) {
  const grow = () => {
    textarea.style.height = "auto";
    textarea.style.height = `${textarea.scrollHeight}px`;
  };
  textarea.addEventListener("input", grow);
  grow();
}

/** Enter submits, Shift+Enter is a new line, and Enter that ends an input method's composition is neither. */
export function sendOnEnter(textarea, form) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}
