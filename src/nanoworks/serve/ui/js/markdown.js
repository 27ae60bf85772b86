// From markdown to elements: marked parses, highlight.js colours code, DOMPurify decides what may enter the page.
// HTML that a model writes is shown as the text it is. Pictures become links: loading one would tell another host.

import hljs from "../vendor/highlight.js";
import { Marked } from "../vendor/marked.js";
import DOMPurify from "../vendor/purify.js";

// A tool call stands in the text as its number between two characters of the private use area.
const HOLE = "\uE000";
export const hole = (number) => `${HOLE}${number}${HOLE}`;
export const withoutHoles = (text) => text.replaceAll(HOLE, "");

const escape = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => {
      const language = (lang ?? "").trim().split(/\s/)[0].toLowerCase();
      const known = hljs.getLanguage(language);
      const html = known ? hljs.highlight(text, { language, ignoreIllegals: true }).value : escape(text);
      return `<pre data-language="${escape(language)}"><code>${html}</code></pre>`;
    },
  },
  extensions: [
    {
      name: "hole",
      level: "inline",
      start: (source) => source.indexOf(HOLE),
      tokenizer(source) {
        const match = /^\uE000(\d+)\uE000/.exec(source);
        return match ? { type: "hole", raw: match[0], number: match[1] } : undefined;
      },
      renderer: ({ number }) => `<span data-hole="${number}"></span>`,
    },
  ],
});

const ALLOWED = {
  ALLOWED_TAGS: "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["align", "class", "href", "start", "title", "data-hole", "data-language"],
  ALLOW_DATA_ATTR: false,
  // DOMPurify holds every other attribute to the pattern below, as if it were an address.
  ADD_URI_SAFE_ATTR: ["align", "start", "data-hole", "data-language"],
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

/**
 * Show `text` in `container`. Called again with more text, it renders anew only the blocks that changed, so a long
 * answer streams at a constant cost a block and what the reader has selected above stays selected.
 */
export function renderMarkdown(container, text) {
  const blocks = parse(text);
  const children = [...container.children];
  blocks.forEach((block, number) => {
    if (children[number]?.source === block.raw) return;
    const element = document.createElement("div");
    element.className = "block";
    element.source = block.raw;
    element.append(block.fragment());
    decorate(element);
    if (children[number]) children[number].replaceWith(element);
    else container.append(element);
  });
  for (const extra of children.slice(blocks.length)) extra.remove();
}

/** The blocks of a text, each with its source and a function that makes its elements. */
function parse(text) {
  try {
    const tokens = marked.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
    return tokens.map((token) => ({ raw: token.raw, fragment: () => fragmentOf(token) }));
  } catch {
    return [{ raw: text, fragment: () => document.createTextNode(text) }]; // nested too deep for the parser
  }
}

function fragmentOf(token) {
  try {
    return DOMPurify.sanitize(marked.parser([token]), ALLOWED);
  } catch {
    return document.createTextNode(token.raw);
  }
}

/** What markdown does not say: links open elsewhere, code can be copied, what is too wide can be scrolled. */
function decorate(element) {
  for (const link of element.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const table of element.querySelectorAll("table")) {
    const box = document.createElement("div");
    box.className = "wide";
    box.tabIndex = 0;
    table.replaceWith(box);
    box.append(table);
  }
  for (const code of element.querySelectorAll("pre")) {
    const figure = document.getElementById("code-template").content.firstElementChild.cloneNode(true);
    figure.querySelector(".language").textContent = code.dataset.language || "text";
    code.tabIndex = 0;
    code.replaceWith(figure);
    figure.append(code);
  }
}
