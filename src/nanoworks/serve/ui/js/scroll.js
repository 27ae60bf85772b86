// Where the conversation is scrolled to: it follows its end only while the reader is there.

const scroller = document.getElementById("scroller");
const jump = document.getElementById("jump");

export function startScrolling() {
  scroller.addEventListener("scroll", showJump, { passive: true });
  new ResizeObserver(showJump).observe(scroller);
  jump.addEventListener("click", scrollToEnd);
}

export function scrollToEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  showJump();
}

/** Run `change`, which makes the conversation longer, and stay at its end if that is what was to be seen. */
export function followEnd(change) {
  const atEnd = isAtEnd();
  change();
  if (atEnd) scrollToEnd();
  else showJump();
}

const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;

function showJump() {
  jump.hidden = isAtEnd();
}
