// Loaded before the page is painted, so that it never flashes in the other colours.
try {
  const theme = JSON.parse(localStorage.getItem("nanoworks.settings") ?? "{}").theme;
  if (theme && theme !== "auto") document.documentElement.style.colorScheme = theme;
} catch {
  // storage is blocked or holds something else: the colours follow the system
}
