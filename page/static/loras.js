// The library as the page knows it: one list for all tabs, cards, thumbnails as they come into view.

import { act } from "./api.js";
import { h, size } from "./dom.js";

let items = [], asked = null;
const listeners = new Set(), pictures = new Map();

export const library = () => items;
export const onLibrary = (listener) => { listeners.add(listener); listener(items); };

/** Reads the whole list anew. */
export async function refresh() {
  asked ??= (async () => {
    const found = [];
    for (let page = 1; ; page++) {
      const answer = await act("library.list", { page, per_page: 1000 });
      found.push(...answer.loras);
      if (page >= answer.pages) break;
    }
    items = found;
    for (const listener of listeners) listener(items);
  })().finally(() => { asked = null; });
  return asked;
}

/** Puts one adapter's new state into the list. */
export function changed(item) {
  items = items.some((one) => one.name === item.name) ? items.map((one) => (one.name === item.name ? item : one)) : [...items, item];
  for (const listener of listeners) listener(items);
}

export function gone(name) {
  items = items.filter((one) => one.name !== name);
  for (const listener of listeners) listener(items);
}

export const stem = (name) => String(name).replace(/\.(safetensors|pt|pth|bin|ckpt)$/i, "");
export const shown = (item) => stem(item.name);

/** The words of an adapter to choose from: a person's sets first, then what the file says. */
export const wordsOf = (item) => [...(item.note?.words || []), ...(item.words || [])];

let waiting = [], timer = 0;

function fetchPictures() {
  const spots = waiting.slice(0, 100);
  waiting = waiting.slice(100);
  timer = waiting.length ? setTimeout(fetchPictures, 100) : 0;
  act("library.thumbnails", { names: [...new Set(spots.map((image) => image.dataset.name))] }).then(({ thumbnails }) => {
    for (const image of spots) {
      const { name, version } = image.dataset, url = thumbnails[name];
      if (!url) continue;
      pictures.set(`${name} ${version}`, url);
      image.src = url;
    }
  }).catch(() => {});
}

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    waiting.push(target);
    timer ||= setTimeout(fetchPictures, 50);
  }
});

function thumbnail(item) {
  const image = h("img", { class: "pic", alt: "", "data-name": item.name, "data-version": item.thumbnail });
  const known = pictures.get(`${item.name} ${item.thumbnail}`);
  if (known) image.src = known;
  else if (item.thumbnail) seen.observe(image);
  return item.thumbnail ? image : h("div", { class: "pic", "aria-hidden": "true" });
}

function card(item, pick) {
  const button = h("button", { type: "button", class: "card", click: () => pick(item), "data-name": item.name },
    thumbnail(item),
    h("span", { class: "title" }, shown(item)),
    h("span", {}, h("span", { class: `tag ${item.state}` }, item.state), " ",
      item.base && h("span", { class: "tag" }, item.base), " ",
      item.algorithm && h("span", { class: "tag" }, `${item.algorithm}${item.rank ? ` ${item.rank}` : ""}`), " ",
      typeof item.note?.scale === "number" && h("span", { class: "tag" }, `at ${item.note.scale}`)),
    h("span", { class: "soft" }, item.state === "failed" ? item.reason || "" : wordsOf(item).slice(0, 3).join(", ") || size(item.bytes)));
  if (item.state === "failed") button.classList.add("off");
  return button;
}

/** A searchable grid of cards; `pick` gets the item. `only`: which are shown at all. */
export function cards(pick, { only = () => true, tall = false } = {}) {
  const grid = h("div", { class: tall ? "cards tall" : "cards", role: "group", "aria-label": "LoRAs" });
  const found = h("span", { class: "soft", role: "status" });
  const search = h("input", { type: "search", placeholder: "name, word, source or note", "aria-label": "Search LoRAs" });
  let made = [];
  const filter = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const one of made) {
      const fits = wanted.every((word) => one.text.includes(word)) && only(one.item);
      if (one.fits !== fits) one.node.hidden = !fits;
      one.fits = fits;
      count += fits;
    }
    found.textContent = `${count} of ${made.length}`;
  };
  search.addEventListener("input", filter);
  onLibrary((all) => {
    const before = new Map(made.map((one) => [one.item, one]));
    made = all.map((item) => before.get(item) || {
      item, fits: true, node: card(item, pick),
      text: [item.name, item.source, item.base, item.algorithm, item.note?.text, ...wordsOf(item)].join("\n").toLowerCase(),
    });
    grid.replaceChildren(...made.map((one) => one.node));
    filter();
  });
  const element = h("div", {}, h("div", { class: "line" }, search, found), grid);
  element.filter = filter;
  return element;
}
