// The page: connects the conversation (conversation.js), the server (api.js) and the elements (view.js).

import { fetchModel, streamChat } from "./api.js";
import { Conversation, applyChunk, plainText } from "./conversation.js";
import { assistantElement, growWithText, openEditor, sendOnEnter, updateAssistant, userElement } from "./view.js";

const $ = (id) => document.getElementById(id);
const list = $("messages");
const scroller = $("scroller");
const input = $("input");
const settings = $("settings");

const conversation = new Conversation();
let answering = null; // the AbortController of the answer being streamed

// ---------------------------------------------------------------------------------------------- the conversation

function render() {
  list.replaceChildren(
    ...conversation.messages.map((message) => (message.role === "user" ? userElement : assistantElement)(message)),
  );
  $("welcome").hidden = conversation.messages.length > 0;
  scroller.scrollTop = scroller.scrollHeight;
}

function send(text) {
  stop();
  conversation.addUser(text);
  answer();
}

/** Stream the model's answer to the conversation as it stands. */
async function answer() {
  const controller = new AbortController();
  const messages = conversation.toRequest(settings.elements.system.value.trim());
  const message = conversation.addAnswer();
  render();
  setAnswering(controller);
  try {
    for await (const chunk of streamChat({ messages, ...samplingSettings() }, controller.signal)) {
      applyChunk(message, chunk, performance.now());
      show(message);
    }
  } catch (error) {
    message.state = controller.signal.aborted ? "stopped" : "failed";
    // fetch says no more than "Failed to fetch" when nobody listens at the other end.
    const reason = error instanceof TypeError ? "The server cannot be reached. Is it still running?" : error.message;
    if (message.state === "failed") message.error = reason;
  }
  show(message);
  if (answering === controller) setAnswering(null);
}

function stop() {
  answering?.abort();
  setAnswering(null);
}

function setAnswering(controller) {
  answering = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  document.body.classList.toggle("answering", controller !== null);
}

/** Bring an answer on the page up to date; the page follows its end only if the reader was there. */
function show(message) {
  const element = list.children[conversation.messages.indexOf(message)];
  if (!element) return; // it was dropped meanwhile
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
  updateAssistant(element, message);
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

const actions = {
  edit(index) {
    openEditor(list.children[index], conversation.messages[index].text, {
      onSend(text) {
        stop();
        conversation.truncate(index);
        send(text);
      },
      onCancel: render,
    });
  },
  regenerate(index) {
    stop();
    conversation.truncate(index);
    answer();
  },
  async copy(index, button) {
    await navigator.clipboard.writeText(plainText(conversation.messages[index]));
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  },
};

list.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (!button || button.closest(".editor")) return;
  actions[button.dataset.action]([...list.children].indexOf(button.closest(".message")), button);
});

// ---------------------------------------------------------------------------------------------- input and settings

function samplingSettings() {
  const { temperature, top_k, max_tokens } = settings.elements;
  const request = { temperature: Number(temperature.value) };
  if (top_k.value) request.top_k = Number(top_k.value);
  if (max_tokens.value) request.max_tokens = Number(max_tokens.value);
  return request;
}

function showTemperature() {
  $("temperature-value").textContent = Number(settings.elements.temperature.value).toFixed(1);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || answering) return;
  input.value = "";
  input.dispatchEvent(new Event("input"));
  send(text);
});

$("stop").addEventListener("click", () => {
  stop();
  input.focus();
});

$("new").addEventListener("click", () => {
  stop();
  conversation.truncate(0);
  render();
  input.focus();
});

for (const example of document.querySelectorAll(".examples button"))
  example.addEventListener("click", () => send(example.textContent));

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !settings.matches(":popover-open")) stop();
});

settings.addEventListener("submit", (event) => event.preventDefault());
settings.elements.temperature.addEventListener("input", showTemperature);
growWithText(input);
sendOnEnter(input, $("composer"));
showTemperature();

try {
  const model = await fetchModel();
  $("model").textContent = model.id;
  $("context-hint").textContent = `The context holds ${model.max_model_len.toLocaleString()} tokens.`;
  document.title = `${model.id} · nanoworks`;
} catch (error) {
  $("model").textContent = error.message;
}
