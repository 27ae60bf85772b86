// What every text field, button and notice of the page shares.

const touch = matchMedia("(pointer: coarse)");

/** Keep a textarea as tall as its text, up to the limit the stylesheet sets. */
export function growWithText(textarea) {
  const grow = () => {
    textarea.style.height = "auto";
    textarea.style.height = `${textarea.scrollHeight}px`;
  };
  textarea.addEventListener("input", grow);
  grow();
}

/**
 * Enter submits and Shift+Enter is a new line. Enter that ends an input method's composition is neither, and where
 * there is no keyboard but the one on the glass, Enter is a new line: there is no Shift+Enter there.
 */
export function sendOnEnter(textarea, form) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

/** Put `text` on the clipboard and say so on `button`. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text); // plain HTTP from another machine has no navigator.clipboard
  }
  button.classList.add("done");
  notice("Copied");
  setTimeout(() => button.classList.remove("done"), 1500);
}

function copyBySelection(text) {
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "unseen";
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

const noticeElement = document.getElementById("notice");
let noticeEnds = 0;

/** Show a short notice for `seconds`, with a button when there is something to do about it. */
export function notice(text, { button = "", onClick = () => {}, seconds = button ? 8 : 2.5 } = {}) {
  const [words, action] = noticeElement.children;
  words.textContent = text;
  action.textContent = button;
  action.hidden = !button;
  action.onclick = () => {
    notice("");
    onClick();
  };
  clearTimeout(noticeEnds);
  if (text) noticeEnds = setTimeout(() => notice(""), seconds * 1000);
}
