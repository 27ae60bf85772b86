// Small values kept in the browser's storage. One that refuses (cookies blocked) only forgets them.

/** @param {"localStorage" | "sessionStorage"} area for good, or until the tab closes */
export function recall(name, area = "localStorage") {
  try {
    return globalThis[area].getItem(name);
  } catch {
    return null;
  }
}

/** Keep `value`; null forgets it. */
export function keep(name, value, area = "localStorage") {
  try {
    if (value === null) globalThis[area].removeItem(name);
    else globalThis[area].setItem(name, value);
  } catch {
    // nothing to be done, and nothing is lost but the memory of it
  }
}
