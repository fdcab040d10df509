// The Compare tab: a grid over two axes, one job for each cell, one sheet to save.

import { cancel, follow, run } from "./api.js";
import { doing, h, isShowable, labelled, save, seconds } from "./dom.js";
import { SAMPLERS } from "./image.js";
import { library, onLibrary, stem } from "./loras.js";

const AT_ONCE = 4, CELLS = 144;
/** Axis -> [title, what to write, how a value changes the request]. */
const AXES = {
  "": ["nothing", "", () => {}],
  lora: ["LoRA", "one name a line, NAME:0.8 for a scale, none for no LoRA", (request, text) => {
    if (text === "none") return;
    const [, path, scale] = /^(.*?)(?::(-?[\d.]+))?$/.exec(text);
    request.loras = [...(request.loras || []), { path, scale: scale === undefined ? 1 : Number(scale) }];
  }],
  scale: ["scale of the last LoRA", "numbers", (request, text) => {
    const loras = request.loras || [];
    if (!loras.length) return; // the cell without a LoRA of the other axis
    request.loras = [...loras.slice(0, -1), { ...loras.at(-1), scale: number(text) }];
  }],
  preset: ["preset", "names, none for no preset", (request, text) => { request.lora_selection = text; }],
  seed: ["seed", "whole numbers", (request, text) => { request.seed = number(text); }],
  steps: ["steps", "whole numbers", (request, text) => { request.num_inference_steps = number(text); }],
  sampler: ["sampler", SAMPLERS.join(", "), (request, text) => { request.scheduler = text; }],
  words: ["words", "the first is in the prompt, the others take its place", null],
};

function number(text) {
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value)) throw new Error(`${text} is no number.`);
  return value;
}

const valuesOf = (text) => text.split(text.includes("\n") ? "\n" : ",").map((one) => one.trim()).filter(Boolean);

/** The request of one cell. LoRAs come before scales, so that a scale means the cell's own LoRA. */
export function cellOf(base, changes) {
  const request = structuredClone(base);
  const order = ["lora", "preset", "seed", "steps", "sampler", "words", "scale", ""];
  for (const { axis, value, first } of [...changes].sort((a, b) => order.indexOf(a.axis) - order.indexOf(b.axis))) {
    if (axis !== "words") AXES[axis][2](request, value);
    else if (!request.prompt?.includes(first)) throw new Error(`The prompt does not have "${first}".`);
    else request.prompt = request.prompt.replaceAll(first, value);
  }
  return request;
}

export function newCompareTab(context, imageTab) {
  const axes = ["across", "down"].map((title, index) => {
    const kind = h("select", { id: `axis-${title}` }, Object.entries(AXES).map(([name, [words]]) => h("option", { value: name }, words)));
    const values = h("textarea", { rows: 4, id: `values-${title}` });
    const hint = h("p", { class: "soft" });
    const all = h("button", { type: "button", class: "small", hidden: true, click: () => { values.value = library().filter((one) => one.file && one.state !== "failed").map((one) => stem(one.file)).join("\n"); } }, "All LoRAs");
    const told = () => { hint.textContent = AXES[kind.value][1]; all.hidden = kind.value !== "lora"; };
    kind.addEventListener("input", told);
    kind.value = ["lora", "scale"][index];
    told();
    if (index) values.value = "0.25, 0.5, 0.75, 1";
    return { title, kind, values, element: h("div", { class: "panel" }, labelled(title, kind), labelled("values, by commas or lines", values), hint, all) };
  });
  onLibrary((all) => { if (!axes[0].values.value) axes[0].values.value = all.filter((one) => one.file && one.state !== "failed").slice(0, 4).map((one) => stem(one.file)).join("\n"); });
  const table = h("table", { class: "grid", id: "grid" }), said = h("p", { class: "soft", role: "status", id: "compared" });
  const trouble = h("p", { class: "error", role: "alert" });
  let going = null, sheet = null;

  const go = h("button", { type: "button", class: "main", id: "compare" }, "Draw the grid");
  const stop = h("button", { type: "button", hidden: true, click: () => going?.stop() }, "Stop");
  const keepIt = h("button", { type: "button", disabled: true, id: "sheet", click: doing(async () => save(await sheet(), "grid.png")) }, "Save the sheet");

  async function start() {
    trouble.textContent = "";
    const [across, down] = axes.map(({ kind, values }) => (kind.value ? valuesOf(values.value) : [""]));
    if (!across.length || !down.length) throw new Error("An axis has no values.");
    if (across.length * down.length > CELLS) throw new Error(`${across.length * down.length} cells: at most ${CELLS} are drawn.`);
    const [kindX, kindY] = axes.map(({ kind }) => kind.value);
    if (kindX && kindX === kindY) throw new Error("Both axes change the same.");
    if (imageTab.stack.troubled().length) throw new Error("The Image tab has LoRAs that do not fit.");
    const base = { ...imageTab.request(), num_images: 1 };
    if (![kindX, kindY].includes("seed") && base.seed === undefined) base.seed = Math.floor(Math.random() * 2 ** 32);
    if ([kindX, kindY].includes("scale") && ![kindX, kindY].includes("lora") && !base.loras?.length) throw new Error("A scale needs a LoRA, of the Image tab or of the other axis.");
    const cells = down.flatMap((y, row) => across.map((x, column) => ({ row, column, request: cellOf(base, [{ axis: kindX, value: x, first: across[0] }, { axis: kindY, value: y, first: down[0] }]) })));
    await draw(across, down, cells);
  }

  async function draw(across, down, cells) {
    const spots = down.map(() => []), ids = new Set(), begun = performance.now();
    let stopped = false, done = 0, failed = 0;
    going = { stop: () => { stopped = true; for (const id of ids) cancel(id).catch(() => {}); } };
    stop.hidden = false;
    table.replaceChildren(h("thead", {}, h("tr", {}, h("td", {}), across.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, down.map((text, row) => h("tr", {}, h("th", { scope: "row" }, text), across.map((_, column) => (spots[row][column] = h("td", { class: "soft" }, "·")))))));
    const told = () => { said.textContent = `${done} of ${cells.length}${failed ? `, ${failed} failed` : ""}, ${seconds((performance.now() - begun) / 1000)}`; };
    const left = [...cells];
    const one = async () => {
      for (let cell = left.shift(); cell && !stopped; cell = left.shift()) {
        const spot = spots[cell.row][cell.column];
        let id = null;
        try {
          spot.textContent = "queued";
          ids.add((id = await run(cell.request)));
          const output = await follow(id, (state) => { spot.textContent = `${state.lost ? "again: " : ""}${state.output?.text || ""}` || state.status.toLowerCase().replace("_", " "); });
          const [url] = output.images;
          cell.output = output;
          spot.replaceChildren(isShowable(url) ? h("img", { src: url, alt: `${down[cell.row]} ${across[cell.column]}`, title: (output.warnings || []).join("\n") }) : "in the bucket");
          done += 1;
        } catch (error) {
          failed += 1;
          spot.replaceChildren(h("span", { class: "error" }, error.message));
        } finally { ids.delete(id); }
        told();
      }
    };
    told();
    await Promise.all(Array.from({ length: AT_ONCE }, one));
    stop.hidden = true;
    going = null;
    keepIt.disabled = !done;
    sheet = () => asSheet(across, down, cells);
  }

  async function asSheet(across, down, cells) {
    const pictures = await Promise.all(cells.filter((cell) => cell.output && isShowable(cell.output.images[0])).map(async (cell) => {
      const image = new Image();
      image.src = cell.output.images[0];
      await image.decode();
      return { ...cell, image };
    }));
    const width = Math.max(...pictures.map(({ image }) => image.naturalWidth), 64), height = Math.max(...pictures.map(({ image }) => image.naturalHeight), 64);
    const size = Math.max(11, Math.round(width / 24)), head = size * 2, side = size * 9;
    const canvas = h("canvas", { width: side + across.length * width, height: head + down.length * height }), draw2d = canvas.getContext("2d");
    draw2d.fillStyle = "#fff";
    draw2d.fillRect(0, 0, canvas.width, canvas.height);
    draw2d.fillStyle = "#111";
    draw2d.font = `${size}px system-ui, sans-serif`;
    across.forEach((text, column) => draw2d.fillText(text, side + column * width + 4, head - size / 2, width - 8));
    down.forEach((text, row) => draw2d.fillText(text, 4, head + row * height + height / 2, side - 8));
    for (const { row, column, image } of pictures) draw2d.drawImage(image, side + column * width, head + row * height);
    return canvas.toDataURL("image/png");
  }

  go.addEventListener("click", doing(async () => { try { await start(); } catch (error) { trouble.textContent = error.message; } }));
  return h("div", {}, h("p", { class: "soft" }, "Every cell is a job of its own: the Image tab's request with what the two axes change. A random seed is chosen once for all cells."),
    h("div", { class: "even" }, axes.map(({ element }) => element)), h("p", { class: "line" }, go, stop, keepIt), trouble, said, h("div", { class: "scroll" }, table));
}
