// The dialog that asks for an API key, when the server wants one.

import { hasKey, onKeyNeeded, setKey } from "./api.js";

const dialog = document.getElementById("key-dialog");
const form = dialog.querySelector("form");
const forget = document.getElementById("forget-key");
let asking = null; // one question for all requests that were refused meanwhile

export function startKeyPrompt() {
  onKeyNeeded((refusal) => (asking ??= ask(refusal).finally(() => (asking = null))));
  forget.addEventListener("click", () => {
    setKey(null);
    location.reload();
  });
  forget.hidden = !hasKey();
}

/** Resolve to whether the reader gave a key. `refusal` is what the server said of the one before. */
function ask(refusal) {
  const problem = document.getElementById("key-problem");
  problem.hidden = !refusal;
  problem.textContent = refusal;
  form.reset();
  dialog.showModal();
  return new Promise((resolve) => {
    const given = (event) => {
      event.preventDefault();
      const { key, remember } = form.elements;
      setKey(key.value.trim(), remember.checked);
      dialog.close("given");
    };
    form.addEventListener("submit", given);
    dialog.addEventListener(
      "close",
      () => {
        form.removeEventListener("submit", given);
        form.reset(); // the key does not stay in the page
        forget.hidden = !hasKey();
        resolve(dialog.returnValue === "given");
        dialog.returnValue = "";
      },
      { once: true },
    );
  });
}
