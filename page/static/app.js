// The page: finds out what answers, and makes the tabs that it can serve.

import { about, act } from "./api.js";
import { h, say } from "./dom.js";
import { newCompareTab } from "./compare.js";
import { newImageTab } from "./image.js";
import { newLibraryTab } from "./library.js";
import { newLiveTab } from "./live.js";
import { changed, library, refresh } from "./loras.js";
import { newTextTab } from "./text.js";
import { newWorkerTab } from "./worker.js";

const tabs = document.getElementById("tabs"), main = document.getElementById("main"), where = document.getElementById("where");

function theme() {
  const button = document.getElementById("theme"), root = document.documentElement;
  try { root.dataset.theme = localStorage.getItem("theme") || ""; } catch { /* not kept */ }
  if (!root.dataset.theme) delete root.dataset.theme;
  button.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* not kept */ }
  });
}

function show(name) {
  for (const tab of tabs.children) {
    const chosen = tab.dataset.name === name, panel = document.getElementById(`panel-${tab.dataset.name}`);
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    panel.hidden = !chosen;
    if (chosen) panel.firstElementChild?.shown?.();
  }
  history.replaceState(null, "", `#${name}`);
}

function add(name, title, element) {
  tabs.append(h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}`, "data-name": name, click: () => show(name) }, title));
  main.append(h("section", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}`, hidden: true }, element));
}

tabs.addEventListener("keydown", (event) => {
  const all = [...tabs.children], step = { ArrowRight: 1, ArrowLeft: -1, Home: -99, End: 99 }[event.key];
  if (!step) return;
  event.preventDefault();
  const now = all.indexOf(document.activeElement), next = step === -99 ? 0 : step === 99 ? all.length - 1 : (now + step + all.length) % all.length;
  all[next].focus();
  show(all[next].dataset.name);
});

/** Lists the library; what was never looked at is scanned first, so that cards have bases and words. */
async function readLibrary() {
  await refresh();
  if (!library().some((item) => !item.at)) return;
  await act("library.scan");
  await refresh();
}

async function start() {
  theme();
  const backend = await about();
  where.textContent = `${backend.name}: a worker is asked ...`;
  let health = {};
  try {
    health = await act("health", {}, (state) => { where.textContent = `${backend.name}: ${state.said || (state.status === "IN_QUEUE" ? "a worker starts ..." : "...")}`; });
  } catch (error) { say(error.message, 30); }
  const kind = health.kind || "image", listeners = [];
  let presets = [];
  const context = {
    ...backend, backend: backend.kind, kind, model: health.model || "the model", refresh, changed,
    onPresets(listener) { listeners.push(listener); listener(presets); },
    setPresets(names) { presets = names; for (const listener of listeners) listener(names); },
  };
  where.textContent = `${backend.name}: ${health.model || "no worker answers"}${health.device ? ` on ${health.device}` : ""}${health.version ? `, ${health.version}` : ""}`;
  readLibrary().catch((error) => say(error.message));
  let image = null;
  if (kind === "text") add("text", "Text", newTextTab(context));
  else {
    image = newImageTab(context);
    add("image", "Image", image);
    add("compare", "Compare", newCompareTab(context, image));
    add("live", "Live", newLiveTab(context));
  }
  add("library", "Library", newLibraryTab(context, image));
  add("worker", "Worker", newWorkerTab(context));
  const wanted = location.hash.slice(1);
  show([...tabs.children].some((tab) => tab.dataset.name === wanted) ? wanted : tabs.firstElementChild.dataset.name);
  document.body.dataset.ready = "1";
}

start().catch((error) => { where.textContent = error.message; say(error.message, 60); });
