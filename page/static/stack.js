// The LoRAs of a request: sliders for each, blocks and range folded away.

import { h, labelled, say, slider } from "./dom.js";
import { library, onLibrary, stem, wordsOf } from "./loras.js";

export const MOST = 16;
const COMPONENTS = { unet: "UNet", text_encoder: "text encoder", text_encoder_2: "encoder 2" };

/** A stack in an element. `words` takes a set of words that was clicked; `change` hears of every change. */
export function newStack({ words = () => {}, change = () => {} } = {}) {
  let entries = [];
  const list = h("div", {});
  const element = h("div", {}, list);

  const itemOf = (entry) => library().find((item) => item.file && (item.file === entry.path || stem(item.file) === stem(entry.path)));

  function row(entry) {
    const item = itemOf(entry), parts = h("div", { hidden: !entry.components });
    const drawParts = () => parts.replaceChildren(...Object.entries(COMPONENTS).map(([name, title]) =>
      slider(title, entry.components?.[name] ?? entry.scale, [-2, 2, 0.05], (value) => { entry.components[name] = value; change(); })));
    const main = slider("scale", entry.scale, [-2, 2, 0.05], (value) => { entry.scale = value; change(); });
    main.hidden = Boolean(entry.components);
    const each = h("input", { type: "checkbox", checked: Boolean(entry.components), change: () => {
      entry.components = each.checked ? Object.fromEntries(Object.keys(COMPONENTS).map((name) => [name, entry.scale])) : null;
      parts.hidden = !each.checked;
      main.hidden = each.checked;
      drawParts();
      change();
    } });
    drawParts();
    const blocks = h("input", { value: entry.blocks || "", placeholder: "12 or 20 numbers, or IN04:0.5, MID:0", input: () => { entry.blocks = blocks.value; change(); } });
    const more = h("details", { open: Boolean(entry.components || entry.blocks || entry.start > 0 || entry.end < 1) }, h("summary", { class: "soft" }, "components, blocks, range"),
      h("label", { class: "line soft" }, each, "a scale for each component"), parts,
      labelled("blocks", blocks, "A further factor for each block of the UNet"),
      slider("from", entry.start, [0, 1, 0.05], (value) => { entry.start = value; change(); }),
      slider("until", entry.end, [0, 1, 0.05], (value) => { entry.end = value; change(); }));
    const chips = item ? h("div", { class: "chips" }, wordsOf(item).slice(0, 12).map((set) =>
      h("button", { type: "button", class: "chip", click: () => words(set), title: "Add to the prompt" }, set))) : null;
    return h("div", { class: entry.problem ? "entry off" : "entry", "data-lora": entry.path },
      h("div", { class: "line" },
        h("span", { class: "title" }, entry.path),
        h("button", { type: "button", class: "small", "aria-label": `Remove ${entry.path}`, click: () => { entries = entries.filter((one) => one !== entry); draw(); change(); } }, "✕")),
      entry.problem && h("p", { class: "error" }, entry.problem),
      entry.remark && h("p", { class: "warning" }, entry.remark),
      entry.offers?.map((offer) => h("button", { type: "button", class: "small", click: () => { Object.assign(entry, offer.set, { problem: "", offers: null }); draw(); change(); } }, offer.text)),
      main, more, chips);
  }

  const draw = () => list.replaceChildren(...(entries.length ? entries.map(row) : [h("p", { class: "soft" }, "No LoRA: pick a card below.")]));
  onLibrary(() => { if (!list.contains(document.activeElement)) draw(); });
  draw();

  return Object.assign(element, {
    entries: () => entries,
    /** Adds an adapter of the library at its own default scale. */
    add(item) {
      if (!item.file) return say(`${item.name} has no name for jobs yet: activate it in the library.`);
      if (entries.length >= MOST) return say(`A job takes at most ${MOST} LoRAs.`);
      if (itemOf({ path: item.file }) && entries.some((one) => stem(one.path) === stem(item.file))) return say(`${stem(item.file)} is in the stack already.`);
      entries.push({ path: stem(item.file), scale: item.note?.scale ?? 1, start: 0, end: 1 });
      draw();
      return change();
    },
    set(given) { entries = given; draw(); change(); },
    troubled: () => entries.filter((entry) => entry.problem).map((entry) => entry.path),
    request: () => entries.map(asEntry),
  });
}

/** `IN04:0.5, MID:0` as an object; numbers as they are. */
function blocksOf(text) {
  if (!text.includes(":")) return text;
  return Object.fromEntries(text.split(",").map((pair) => pair.split(":")).map(([name, value]) => [name.trim(), Number(value)]));
}

/** An entry as a job's `loras` has it. */
export function asEntry(entry) {
  const made = { path: entry.path, scale: entry.components ? { ...entry.components } : entry.scale };
  if (entry.blocks?.trim()) made.blocks = blocksOf(entry.blocks.trim());
  if (entry.start > 0) made.start = entry.start;
  if (entry.end < 1) made.end = entry.end;
  for (const name of ["weight_name", "revision", "sha256"]) if (entry[name]) made[name] = entry[name];
  return made;
}

/** The entry of a job's `loras` as the page edits it. */
export function fromEntry(given) {
  const one = typeof given === "string" ? { path: given } : given;
  const parts = one.scale && typeof one.scale === "object" ? one.scale : null;
  let blocks = one.blocks ?? "";
  if (Array.isArray(blocks)) blocks = blocks.join(",");
  else if (typeof blocks === "object") blocks = Object.entries(blocks).map(([name, value]) => `${name}:${value}`).join(", ");
  return {
    ...one, path: String(one.path), blocks, start: one.start ?? 0, end: one.end ?? 1,
    scale: parts ? parts.unet ?? 1 : one.scale ?? 1,
    components: parts ? { unet: 1, text_encoder: 1, text_encoder_2: 1, ...parts } : null,
  };
}
