// The settings popover: sampling, system message, colours. Kept in the browser, the same for every conversation.

import { keep, recall } from "./kept.js";

const NAME = "nanoworks.settings";
const form = document.getElementById("settings");
const fields = form.elements;
const NUMBERS = ["top_p", "top_k", "max_tokens", "seed"];

/** Fill the form from what was kept, and keep what the reader changes. */
export function startSettings() {
  restore();
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    keep(NAME, JSON.stringify(Object.fromEntries(new FormData(form))));
    reflect();
  });
  // The form is empty of changes only after the event.
  form.addEventListener("reset", () =>
    setTimeout(() => {
      keep(NAME, null);
      reflect();
    }),
  );
}

export const systemMessage = () => fields.system.value.trim();

/** The fields of a request that the settings decide. Throws an Error that names the field when one is wrong. */
export function samplingFields() {
  const request = { temperature: Number(fields.temperature.value) };
  for (const name of NUMBERS) if (fields[name].value) request[name] = Number(fields[name].value);
  return { ...request, ...moreFields() };
}

function moreFields() {
  const text = fields.more.value.trim();
  if (!text) return {};
  const wrong = new Error("“More request fields” in the settings must be a JSON object, like {\"min_p\": 0.1}.");
  try {
    const more = JSON.parse(text);
    if (more === null || typeof more !== "object" || Array.isArray(more)) throw wrong;
    return more;
  } catch {
    throw wrong;
  }
}

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(recall(NAME)) ?? {};
  } catch {
    // not ours, or of another time: the defaults stand
  }
  for (const [name, value] of Object.entries(kept)) if (fields[name]) fields[name].value = value;
  reflect();
}

/** What follows from the values: the number beside the slider, the colours, a mark on JSON that is none. */
function reflect() {
  document.getElementById("temperature-value").textContent = Number(fields.temperature.value).toFixed(1);
  document.documentElement.style.colorScheme = fields.theme.value === "auto" ? "" : fields.theme.value;
  let problem = "";
  try {
    moreFields();
  } catch (error) {
    problem = error.message;
  }
  fields.more.setCustomValidity(problem);
  const hint = document.getElementById("more-problem");
  hint.hidden = !problem;
  hint.textContent = problem;
}
