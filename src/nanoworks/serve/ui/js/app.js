// The page: connects the conversations (conversation.js, store.js), the server (api.js) and the elements (view.js).

import { fetchModels, streamChat } from "./api.js";
import { Conversation, applyChunk, newAnswer, plainText } from "./conversation.js";
import { copy, growWithText, notice, sendOnEnter } from "./input.js";
import { startKeyPrompt } from "./key.js";
import { samplingFields, startSettings, systemMessage } from "./settings.js";
import { followEnd, scrollToEnd, startScrolling } from "./scroll.js";
import { closeDrawer, showConversations, startSidebar } from "./sidebar.js";
import * as store from "./store.js";
import { aboutModel, messageElement, openEditor, updateAnswer, updateVersions } from "./view.js";

const $ = (id) => document.getElementById(id);
const list = $("messages");
const input = $("input");

let conversation = new Conversation(); // the one on the page
let elements = new Map(); // its messages' elements, by index
const answering = new Map(); // by id, the conversations with an answer under way: {conversation, controller}
let leaving = false; // the page is being closed, which ends every answer

// ---------------------------------------------------------------------------------------------- the conversation

/** Put the conversation on the page; elements that are there already are kept as they are. */
function render() {
  const path = conversation.path();
  for (const index of path) {
    if (!elements.has(index)) elements.set(index, messageElement(conversation, index));
    updateVersions(elements.get(index), conversation, index);
  }
  // What stays is not touched: it would lose the reader's selection and focus.
  const wanted = path.map((index) => elements.get(index));
  const same = wanted.findIndex((element, place) => list.children[place] !== element);
  const kept = same < 0 ? wanted.length : same;
  while (list.children.length > kept) list.lastElementChild.remove();
  list.append(...wanted.slice(kept));
  $("welcome").hidden = path.length > 0;
  const busy = answering.has(conversation.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  document.title = [conversation.title, "nanoworks"].filter(Boolean).join(" · ");
}

function open(next) {
  conversation = next;
  elements = new Map();
  render();
  scrollToEnd();
  refreshList();
}

/** Send `text` as a new message under `parent`, the last one unless an earlier message was edited. */
function send(text, parent = conversation.last()) {
  answer(conversation.add(parent, { role: "user", text }));
}

/** Stream the model's answer to the message `parent` of the conversation on the page. */
async function answer(parent) {
  stop();
  const asked = conversation; // the reader may open another one meanwhile
  const controller = new AbortController();
  const node = newAnswer($("model").value, performance.now());
  const messages = asked.toRequest(parent, systemMessage());
  const index = asked.add(parent, node);
  const answered = asked.nodes[index];
  answering.set(asked.id, { conversation: asked, controller });
  if (location.hash.slice(1) !== asked.id) history.pushState(null, "", `#${asked.id}`);
  render();
  scrollToEnd();
  save(asked);
  try {
    const request = { model: node.model || undefined, messages, ...samplingFields() };
    for await (const chunk of streamChat(request, controller.signal)) {
      applyChunk(answered, chunk, performance.now());
      show(asked, index);
      saveSoon(asked);
    }
  } catch (error) {
    if (leaving) return; // what was kept last says "streaming", and the page that opens it knows what that means
    answered.state = controller.signal.aborted ? "stopped" : "failed";
    if (answered.state === "failed") answered.error = error.message;
  }
  if (answering.get(asked.id)?.controller === controller) answering.delete(asked.id);
  show(asked, index);
  if (asked === conversation) render();
  save(asked);
}

function stop() {
  answering.get(conversation.id)?.controller.abort();
  answering.delete(conversation.id);
  render();
}

const waiting = new Set(); // answers to be brought up to date
let cost = 0; // milliseconds that the last time took

/** Bring an answer on the page up to date, once a frame however many pieces came; seldomer where it takes long. */
function show(asked, index) {
  const node = asked.nodes[index];
  if (asked !== conversation || waiting.has(node)) return;
  waiting.add(node);
  const update = () => {
    waiting.delete(node);
    if (asked !== conversation || !elements.has(index)) return;
    const started = performance.now();
    followEnd(() => updateAnswer(elements.get(index), node));
    cost = performance.now() - started;
  };
  setTimeout(() => requestAnimationFrame(update), cost > 10 ? 4 * cost : 0);
}

// ---------------------------------------------------------------------------------------------- what is kept

let failedToSave = false;

async function save(changed) {
  clearTimeout(changed.saving);
  changed.saving = 0;
  if (changed.deleted) return; // its last answer has only now ended
  try {
    await store.save(changed);
    refreshList();
  } catch (error) {
    if (!failedToSave) notice(`This conversation cannot be kept: ${error.message}`, { seconds: 8 });
    failedToSave = true;
  }
}

/** While an answer streams, a copy a second is enough. */
function saveSoon(changed) {
  changed.saving ||= setTimeout(() => save(changed), 1000);
}

async function refreshList() {
  showConversations(await store.list(), conversation.id);
}

async function load(id) {
  if (answering.has(id)) return answering.get(id).conversation;
  const record = id && (await store.load(id));
  if (!record) return new Conversation();
  for (const node of record.nodes) if (node.state === "streaming") node.state = "cut"; // the page was closed meanwhile
  return new Conversation(record);
}

/** Open the conversation that the address names. */
async function openAddressed() {
  const id = location.hash.slice(1);
  const next = await load(id);
  if (location.hash.slice(1) !== id) return; // the reader was faster
  if (id && next.id !== id) history.replaceState(null, "", location.pathname + location.search);
  open(next);
}

function goTo(id) {
  if (location.hash.slice(1) === id) return;
  history.pushState(null, "", id ? `#${id}` : location.pathname + location.search);
  return openAddressed();
}

function newChat() {
  closeDrawer();
  goTo("");
  input.focus();
}

const sidebar = {
  onOpen: goTo,
  async onRename(id, title) {
    const renamed = id === conversation.id ? conversation : await load(id);
    renamed.title = title;
    await save(renamed);
    if (renamed === conversation) render();
  },
  async onDelete(id) {
    answering.get(id)?.controller.abort();
    const deleted = id === conversation.id ? conversation : await load(id);
    deleted.deleted = true;
    await store.remove(id);
    if (deleted === conversation) goTo("");
    refreshList();
    notice("Conversation deleted", { button: "Undo", onClick: () => restore(deleted) });
  },
};

async function restore(deleted) {
  deleted.deleted = false;
  await save(deleted);
  goTo(deleted.id);
}

// ---------------------------------------------------------------------------------------------- messages

const actions = {
  edit(index, element) {
    const { text, parent } = conversation.nodes[index];
    const close = () => {
      elements.delete(index); // made anew without the editor
      render();
    };
    openEditor(element, text, {
      onSend(edited) {
        close();
        send(edited, parent);
      },
      onCancel() {
        close();
        elements.get(index).querySelector("[data-action=edit]").focus();
      },
    });
  },
  regenerate: (index) => answer(conversation.nodes[index].parent),
  previous: (index) => step(index, -1),
  next: (index) => step(index, +1),
  copy: (index, _, button) => copy(plainText(conversation.nodes[index]).trim(), button),
  "copy-code": (_, __, button) => copy(button.closest("figure").querySelector("code").textContent, button),
  "send-results"(index, element) {
    const fields = [...element.querySelectorAll(".calls textarea")];
    const results = conversation.nodes[index].calls.map(({ id, name }, i) => ({ id, name, content: fields[i].value }));
    answer(conversation.add(index, { role: "tool", results }));
  },
};

/** Show the version before or after this one, and keep the focus on the button that was pressed. */
function step(index, by) {
  const versions = conversation.versions(index);
  const next = versions[versions.indexOf(index) + by];
  stop();
  conversation.show(next);
  render();
  save(conversation);
  const [back, forth] = elements.get(next).querySelectorAll(".versions button");
  const [pressed, other] = by < 0 ? [back, forth] : [forth, back];
  (pressed.disabled ? other : pressed).focus();
}

list.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (!button || button.closest(".editor")) return;
  const element = button.closest(".message");
  actions[button.dataset.action](Number(element.dataset.index), element, button);
});

// ---------------------------------------------------------------------------------------------- writing

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || answering.has(conversation.id)) return;
  input.value = "";
  input.dispatchEvent(new Event("input"));
  send(text);
});

$("stop").addEventListener("click", () => {
  stop();
  input.focus();
});

for (const button of document.querySelectorAll(".new-chat")) button.addEventListener("click", newChat);
for (const example of document.querySelectorAll(".examples button"))
  example.addEventListener("click", () => send(example.textContent));

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select");
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) stop();
  else if (event.key === "/" && !typing) input.focus();
  else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) newChat();
  else if (event.key === "ArrowUp" && event.target === input && !input.value) editLast();
  else return;
  if (event.key !== "Escape") event.preventDefault();
});

function editLast() {
  const index = conversation.path().findLast((index) => conversation.nodes[index].role === "user");
  if (index) actions.edit(index, elements.get(index));
}

// ---------------------------------------------------------------------------------------------- start

async function connect() {
  try {
    const models = await fetchModels();
    $("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
    $("about").replaceChildren(...aboutModel(models[0]));
    $("model").hidden = false;
    $("trouble").hidden = true;
  } catch (error) {
    $("trouble").hidden = false;
    $("trouble-text").textContent = error.message;
  }
}

startSettings();
startKeyPrompt();
startScrolling();
startSidebar(sidebar);
growWithText(input);
sendOnEnter(input, $("composer"));
// Only now: with `autofocus` in the document an Enter typed before this line would be lost.
if (document.activeElement === document.body) input.focus();
$("reconnect").addEventListener("click", connect);
addEventListener("popstate", openAddressed);
addEventListener("pagehide", () => {
  leaving = true;
  answering.forEach(({ conversation }) => save(conversation));
});
addEventListener("pageshow", () => (leaving = false)); // it came back from the browser's memory
document.addEventListener("visibilitychange", () => document.hidden || refreshList()); // another tab may have added one
if (!store.lasting) notice("This browser keeps no data for this page: conversations end with the tab.", { seconds: 8 });
await openAddressed();
await connect();
