// The list of conversations: open, rename, delete with a way back. On a narrow page it is a drawer.

import { keep, recall } from "./kept.js";
import { fromTemplate } from "./view.js";

const CLOSED = "nanoworks.sidebar";
const sidebar = document.getElementById("sidebar");
const listElement = document.getElementById("conversations");
const toggle = document.getElementById("sidebar-button");
const closer = document.getElementById("sidebar-close");
const narrow = matchMedia("(max-width: 52rem)");

let shown = "";

/** `onOpen(id)`, `onRename(id, title)` and `onDelete(id)` are told what the reader chose. */
export function startSidebar({ onOpen, onRename, onDelete }) {
  listElement.addEventListener("click", (event) => {
    const item = event.target.closest("li");
    const action = event.target.closest("[data-action]")?.dataset.action;
    if (action === "open") {
      onOpen(item.dataset.id);
      closeDrawer();
    }
    if (action === "rename") rename(item, onRename);
    if (action === "delete") onDelete(item.dataset.id);
  });
  for (const button of [toggle, closer]) button.addEventListener("click", () => turn(!isOpen()));
  document.getElementById("backdrop").addEventListener("click", closeDrawer);
  sidebar.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !narrow.matches) return;
    event.stopPropagation();
    closeDrawer();
  });
  narrow.addEventListener("change", adapt);
  adapt();
}

/** Show `conversations` ([{id, title}], newest first), the one with the id `current` marked. */
export function showConversations(conversations, current) {
  const now = JSON.stringify([current, conversations.map(({ id, title }) => [id, title])]);
  if (now === shown || listElement.querySelector("input")) return; // nothing new, or the reader is renaming one
  shown = now;
  listElement.replaceChildren(
    ...conversations.map(({ id, title }) => {
      const item = fromTemplate("conversation-template");
      item.dataset.id = id;
      const name = title || "New chat";
      const open = item.querySelector("[data-action=open]");
      open.textContent = name;
      open.title = name;
      if (id === current) open.setAttribute("aria-current", "true");
      item.querySelector("[data-action=rename]").setAttribute("aria-label", `Rename “${name}”`);
      item.querySelector("[data-action=delete]").setAttribute("aria-label", `Delete “${name}”`);
      return item;
    }),
  );
}

export function closeDrawer() {
  if (narrow.matches && isOpen()) turn(false);
}

function turn(open) {
  setOpen(open);
  if (!narrow.matches) keep(CLOSED, open ? null : "closed");
  (open ? closer : toggle).focus();
}

function rename(item, onRename) {
  const input = document.createElement("input");
  const before = item.querySelector("[data-action=open]").title;
  Object.assign(input, { value: before, maxLength: 80 });
  input.setAttribute("aria-label", "Title of the conversation");
  item.replaceChildren(input);
  input.select();
  let ended = false;
  const end = (title) => {
    if (ended) return; // taking the field away blurs it
    ended = true;
    shown = "";
    input.remove();
    onRename(item.dataset.id, title.trim() || before);
  };
  input.addEventListener("blur", () => end(input.value));
  input.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && !event.isComposing) end(input.value);
    if (event.key === "Escape") end(before);
  });
}

const isOpen = () => document.body.classList.contains("with-sidebar");

function setOpen(open) {
  document.body.classList.toggle("with-sidebar", open);
  toggle.setAttribute("aria-expanded", open);
  // Behind an open drawer nothing can be reached; a closed sidebar hides itself in the stylesheet.
  document.getElementById("chat").inert = open && narrow.matches;
}

/** As the page is wide or narrow: beside the chat unless the reader closed it, or a closed drawer. */
function adapt() {
  setOpen(!narrow.matches && recall(CLOSED) === null);
}
