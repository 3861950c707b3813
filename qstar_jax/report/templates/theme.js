"use strict";
// The theme follows the system until the button says otherwise. The choice is kept where pages may keep something.
const THEMES = ["auto", "light", "dark"];
const themeStore = {
  get() { try { return localStorage.getItem("qstar-theme"); } catch { return null; } },
  set(theme) { try { localStorage.setItem("qstar-theme", theme); } catch { /* then it holds for this page only */ } },
};

function setTheme(theme) {
  const root = document.documentElement, button = document.getElementById("theme");
  if (theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = theme;
  if (!button) return;
  button.hidden = false;
  button.textContent = `Theme: ${theme}`;
  button.onclick = () => {
    const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    themeStore.set(next);
    setTheme(next);
  };
}

const keptTheme = THEMES.includes(themeStore.get()) ? themeStore.get() : "auto";
setTheme(keptTheme);  // before anything is painted; there is no button yet
document.addEventListener("DOMContentLoaded", () => setTheme(keptTheme));
