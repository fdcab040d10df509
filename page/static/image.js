// The Image tab: a request, its picture, and what was drawn before.

import { act, cancel, follow, readPicture, run } from "./api.js";
import { curl, json, python } from "./code.js";
import { bar, doing, h, isShowable, labelled, save, say, seconds, twice } from "./dom.js";
import { cards, library, stem } from "./loras.js";
import { newPainter } from "./paint.js";
import { recalled } from "./recall.js";
import { fromEntry, newStack } from "./stack.js";
import { forget, forgetAll, keep, kept, own } from "./store.js";

export const SAMPLERS = ["DDIM", "PNDM", "KLMS", "K_EULER", "K_EULER_ANCESTRAL", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPC", "Euler Karras", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE Karras", "LCM", "TCD"];
const DEMO = { prompt: "a big red circle on a blue background", num_inference_steps: 20, guidance_scale: 3, scheduler: "K_EULER" };
/** Field -> [title, kind, the schema's own default]; what has the default is not sent. */
const FIELDS = {
  width: ["width", { type: "number", step: 8, min: 8, placeholder: "the model's" }, null],
  height: ["height", { type: "number", step: 8, min: 8, placeholder: "the model's" }, null],
  num_inference_steps: ["steps", { type: "number", min: 1, max: 1000 }, 25],
  guidance_scale: ["guidance", { type: "number", step: 0.5 }, 7.5],
  scheduler: ["sampler", SAMPLERS, "DDIM"],
  seed: ["seed", { inputmode: "numeric", placeholder: "random", pattern: "-?[0-9]*" }, null],
  num_images: ["pictures", { type: "number", min: 1, max: 4 }, 1],
  seed_mode: ["their seeds", ["batch", "each"], "batch"],
  strength: ["strength", { type: "number", min: 0, max: 1, step: 0.05, placeholder: "0.3, mask 1" }, null],
  mask_blur: ["mask blur", { type: "number", min: 0, max: 256 }, 0],
  resize_mode: ["resize", ["cover", "contain", "stretch"], "cover"],
  clip_skip: ["clip skip", { type: "number", min: 1, max: 12, placeholder: "2" }, null],
  refiner_mode: ["refiner", ["img2img", "ensemble", "none"], "img2img"],
  lora_mode: ["LoRA mode", ["", "auto", "dynamic", "merged"], ""],
  output_format: ["format", ["png", "webp", "jpeg"], "png"],
  lora_selection: ["preset", [""], ""],
};
const FOLDED = ["strength", "mask_blur", "resize_mode", "clip_skip", "refiner_mode", "lora_mode", "output_format"];
const WITH_PICTURE = ["strength", "resize_mode"];

export function newImageTab(context) {
  const prompt = h("textarea", { rows: 3, id: "prompt", placeholder: "What to draw" });
  const negative = h("textarea", { rows: 1, id: "negative", placeholder: "What not to draw" });
  const counted = h("span", { class: "soft", role: "status" });
  const fields = Object.fromEntries(Object.entries(FIELDS).map(([name, [, kind, value]]) => [name, Array.isArray(kind)
    ? h("select", { id: name }, kind.map((one) => h("option", { value: one }, one || "-")))
    : h("input", { id: name, value: value ?? "", ...kind })]));
  const extra = {};
  const stack = newStack({ words: addWords, change: changed });
  const painter = newPainter(changed);
  const result = h("div", { class: "panel", id: "result" }, h("h2", {}, "Picture"), h("p", { class: "soft" }, "Nothing was drawn yet. Drop a picture of this worker or of a web UI anywhere to take its settings."));
  const running = h("div", {});
  const gallery = h("div", { class: "gallery" });
  const codes = { JSON: (request) => json({ input: request }, 1), curl: (request) => curl(request, context.url), Python: (request) => python(request, context.url) };
  const code = h("pre", { id: "code", tabindex: 0 }), kind = h("select", { "aria-label": "Language" }, Object.keys(codes).map((name) => h("option", {}, name)));
  const draw = h("button", { type: "button", class: "main", id: "draw" }, "Draw");
  const trouble = h("p", { class: "error", id: "trouble", role: "status" });
  const restored = h("div", { role: "status" });

  const has = (name) => { const value = fields[name].value; return value !== "" && value !== String(FIELDS[name][2] ?? ""); };

  function request() {
    const made = { prompt: prompt.value };
    if (negative.value.trim()) made.negative_prompt = negative.value;
    const pictured = painter.request();
    for (const [name, [, kind]] of Object.entries(FIELDS)) {
      if (!has(name) || (WITH_PICTURE.includes(name) && !pictured.image_url) || (name === "mask_blur" && !pictured.mask_url)) continue;
      const text = fields[name].value;
      made[name] = name === "seed" ? (Number.isSafeInteger(Number(text)) ? Number(text) : text.trim()) : kind.type === "number" ? Number(text) : text;
    }
    const loras = stack.request();
    if (loras.length) made.loras = loras;
    return { ...made, ...extra, ...pictured };
  }

  function set(input) {
    prompt.value = input.prompt || "";
    negative.value = input.negative_prompt || "";
    for (const name of Object.keys(FIELDS)) {
      const value = input[name] ?? FIELDS[name][2] ?? "";
      if (name === "lora_selection" && value && ![...fields[name].options].some((option) => option.value === value)) fields[name].append(h("option", { value }, value));
      fields[name].value = value;
    }
    for (const name of Object.keys(extra)) delete extra[name];
    const ours = [...Object.keys(FIELDS), "prompt", "negative_prompt", "loras", "image_url", "mask_url", "preview"];
    for (const [name, value] of Object.entries(input)) if (!ours.includes(name)) extra[name] = value;
    painter.set(input.image_url || null);
    changed();
  }

  function changed() {
    const troubled = stack.troubled();
    draw.disabled = troubled.length > 0;
    trouble.textContent = troubled.length ? `Not drawn as long as these do not fit: ${troubled.join(", ")}. Remove them, or choose what to use.` : "";
    const made = request();
    for (const name of ["image_url", "mask_url"]) if (made[name]?.startsWith("data:") && kind.value === "JSON") made[name] = `${made[name].slice(0, 40)}...`;
    code.textContent = codes[kind.value](made);
    own.set("draft", { ...request(), image_url: undefined, mask_url: undefined });
  }

  // --- the prompt ---

  function addWords(words) {
    if (prompt.value.includes(words)) return say("The prompt has these words already.");
    prompt.value = prompt.value.trim() ? `${prompt.value.trimEnd().replace(/,$/, "")}, ${words}` : words;
    return typed();
  }

  let counting = 0;
  function typed() {
    changed();
    clearTimeout(counting);
    counting = setTimeout(async () => {
      const text = prompt.value;
      try {
        const one = await act("prompts.measure", { prompt: text });
        if (text === prompt.value) counted.textContent = `${one.tokens} tokens, ${one.chunks} of 75${one.warnings.length ? `; ${one.warnings.join("; ")}` : ""}`;
      } catch (error) { counted.textContent = error.message; }
    }, 500);
  }

  /** Control with an arrow changes the weight of what is marked, as in web UIs. */
  function weigh(event) {
    const step = { ArrowUp: 0.1, ArrowDown: -0.1 }[event.key], field = event.target;
    if (!step || !(event.ctrlKey || event.metaKey)) return;
    let { selectionStart: start, selectionEnd: end } = field;
    if (start === end) return;
    event.preventDefault();
    const text = field.value, around = /^\(([\s\S]*):(-?[\d.]+)\)$/.exec(text.slice(start, end));
    const outer = !around && text[start - 1] === "(" ? /^:(-?[\d.]+)\)/.exec(text.slice(end)) : null;
    const inside = around ? around[1] : text.slice(start, end);
    const weight = Math.round(10 * (Number((around || []).at(2) ?? outer?.[1] ?? 1) + step)) / 10;
    if (outer) { start -= 1; end += outer[0].length; }
    const made = weight === 1 ? inside : `(${inside}:${weight})`;
    field.setRangeText(made, start, end, "select");
    if (weight !== 1) field.setSelectionRange(start + 1, start + 1 + inside.length);
    typed();
  }

  // --- a job ---

  async function start() {
    const asked = request(), id = await run({ ...asked, preview: true });
    const jobs = own.get("jobs") || {};
    own.set("jobs", { ...jobs, [id]: { ...asked, ...(asked.image_url ? { image_url: "not kept" } : {}), mask_url: undefined } });
    watch(id, asked);
  }

  async function watch(id, asked) {
    const line = h("progress", { max: 1, "aria-label": "Progress" }), said = h("span", { class: "soft", role: "status" }, "queued"), lost = h("p", { class: "warning", role: "status" });
    const preview = h("img", { class: "preview", alt: "Preview", hidden: true }), begun = performance.now();
    const box = h("div", { class: "panel", "data-job": id },
      h("div", { class: "line" }, said, h("button", { type: "button", class: "small", click: doing(() => cancel(id)) }, "Cancel")), lost, line, preview);
    running.append(box);
    try {
      const output = await follow(id, (state) => {
        const now = state.output || {};
        said.textContent = state.said || (state.status === "IN_QUEUE" ? "queued" : now.text || state.status.toLowerCase().replace("_", " "));
        lost.textContent = state.lost || "";
        if (typeof now.fraction === "number") line.value = now.fraction; else line.removeAttribute("value");
        if (now.preview && isShowable(now.preview)) { preview.src = now.preview; preview.hidden = false; }
      });
      const record = { id: `${Date.now()}-${id}`, request: asked, output, seconds: (performance.now() - begun) / 1000 };
      show(record);
      await keep(record);
      await drawGallery();
    } catch (error) {
      result.replaceChildren(h("h2", {}, "No picture"), h("p", { class: "error", role: "alert" }, error.message));
    } finally {
      box.remove();
      const jobs = own.get("jobs") || {};
      delete jobs[id];
      own.set("jobs", jobs);
    }
  }

  function show({ request: asked, output, id, seconds: took }) {
    const pictures = (output.images || []).map((url, index) => isShowable(url)
      ? h("figure", {}, h("img", { src: url, alt: `${asked.prompt || "picture"}, seed ${output.seeds?.[index] ?? output.seed}` }),
        h("figcaption", { class: "line" },
          h("button", { type: "button", class: "small", click: () => save(url, `${id}-${index + 1}.${asked.output_format || "png"}`) }, "Save"),
          h("button", { type: "button", class: "small", click: () => painter.set(url) }, "Start from it"),
          (output.loras || []).slice(0, 3).map((lora) => h("button", { type: "button", class: "small", click: doing(() => makeThumbnail(lora.file, url)) }, `Thumbnail of ${stem(lora.file)}`))))
      : h("p", { class: "soft" }, "The picture is in the bucket: ", h("a", { href: /^https?:/.test(url) ? url : null, rel: "noreferrer noopener", target: "_blank" }, "open it")));
    result.replaceChildren(h("h2", {}, "Picture"), h("div", { class: "pictures" }, pictures),
      h("p", { class: "line" }, h("span", { class: "soft", id: "drawn" }, `seed ${output.seed}, ${output.model || ""}${took ? `, ${seconds(took)} as seen here` : ""}`),
        h("button", { type: "button", class: "small", click: () => reuse(asked, output.seed) }, "Use these settings")),
      (output.warnings || []).map((text) => h("p", { class: "warning" }, text)),
      h("h3", {}, "Time"), bar(output.timings || {}),
      output.loras?.length ? h("div", { class: "scroll" }, h("table", {}, h("tr", {}, ["LoRA", "scale", "status", "layers", "mode", "sha256"].map((title) => h("th", { scope: "col" }, title))),
        output.loras.map((one) => h("tr", {}, [one.file, typeof one.scale === "object" ? JSON.stringify(one.scale) : one.scale, one.status, one.layers, one.mode, one.sha256.slice(0, 12)].map((cell) => h("td", {}, String(cell ?? "-"))))))) : null);
  }

  async function makeThumbnail(file, url) {
    const item = library().find((one) => one.file === file);
    if (!item) throw new Error(`${file} is not in the library's list.`);
    const { picture, ...now } = await act("library.thumbnail", { name: item.name, picture: url });
    context.changed(now);
    say(`${item.name} has this picture now${picture ? "" : ", which cannot be shown"}.`);
  }

  function reuse(asked, seed) {
    set({ ...asked, seed: asked.seed ?? seed });
    stack.set((asked.loras || []).map(fromEntry));
    if (asked.image_url && !isShowable(asked.image_url)) painter.set(null);
  }

  async function drawGallery() {
    const records = await kept();
    gallery.replaceChildren(...records.filter((one) => isShowable(one.output.images?.[0] || "")).map((record) =>
      h("button", { type: "button", title: record.request.prompt || "", "aria-label": `Show: ${record.request.prompt || "picture"}`, click: () => show(record),
        keydown: async (event) => { if (event.key === "Delete") { await forget(record.id); await drawGallery(); } } }, h("img", { src: record.output.images[0], alt: "", loading: "lazy" }))));
  }

  // --- a dropped picture ---

  async function restore(file) {
    const found = await readPicture(file);
    await context.refresh();
    set(found.input);
    const entries = await recalled(found.input.loras, found.hashes);
    stack.set(entries);
    const named = new Set((found.input.loras || []).map((one) => stem(one.path ?? one).split("/").pop()));
    const others = Object.keys(found.hashes).filter((name) => !named.has(stem(name).split("/").pop()));
    restored.replaceChildren(h("p", { class: "good" }, "The picture's settings are here."),
      ...found.warnings.map((text) => h("p", { class: "warning" }, text)),
      others.length ? h("p", { class: "warning" }, `The picture has hashes of ${others.join(", ")}, which its prompt does not use: not applied.`) : "",
      found.unused.length ? h("p", { class: "soft" }, `Not used: ${found.unused.join(", ")}`) : "");
  }

  const picked = h("input", { type: "file", accept: "image/png,image/jpeg,image/webp", id: "recall", change: async () => {
    if (picked.files[0]) await restore(picked.files[0]).catch((error) => say(error.message));
    picked.value = "";
  } });

  const element = h("div", { class: "two" },
    h("div", {},
      h("div", { class: "panel" },
        h("label", { for: "prompt" }, h("span", { class: "name" }, "prompt (Ctrl and an arrow weigh what is marked)")), prompt, counted,
        h("label", { for: "negative" }, h("span", { class: "name" }, "negative prompt")), negative,
        h("div", { class: "fields" }, Object.keys(FIELDS).filter((name) => !FOLDED.includes(name)).map((name) => labelled(FIELDS[name][0], fields[name]))),
        h("details", {}, h("summary", {}, "More"), h("div", { class: "fields" }, FOLDED.map((name) => labelled(FIELDS[name][0], fields[name])))),
        painter,
        h("p", { class: "line" }, draw, h("button", { type: "button", class: "small", click: () => { fields.seed.value = ""; changed(); } }, "Random seed"), labelled("settings of a picture", picked)),
        trouble, restored),
      h("div", { class: "panel" }, h("h2", {}, "LoRAs"), stack, cards((item) => stack.add(item), { only: (item) => item.state !== "failed" }))),
    h("div", {}, running, result,
      h("details", { class: "panel" }, h("summary", {}, "The request as code"), h("p", { class: "line" }, kind, h("button", { type: "button", class: "small", click: doing(() => copy()) }, "Copy")), code),
      h("div", { class: "panel" }, h("div", { class: "line" }, h("h2", {}, "Drawn before"), twice("Forget all", "Forget all?", async () => { await forgetAll(); await drawGallery(); })), gallery)));

  async function copy() {
    await navigator.clipboard.writeText(codes[kind.value](request()));
    say("Copied.");
  }

  prompt.addEventListener("input", typed);
  for (const field of [prompt, negative]) field.addEventListener("keydown", weigh);
  for (const field of [negative, kind, ...Object.values(fields)]) field.addEventListener("input", changed);
  draw.addEventListener("click", doing(async () => { try { await start(); } finally { setTimeout(changed); } }));
  for (const name of ["dragover", "drop"]) {
    document.addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files") || element.closest("[hidden]")) return;
      event.preventDefault();
      element.classList.toggle("drop", name === "dragover");
      if (name === "drop" && event.dataTransfer.files[0]) restore(event.dataTransfer.files[0]).catch((error) => say(error.message));
    });
  }
  document.addEventListener("dragleave", () => element.classList.remove("drop"));

  const draft = own.get("draft");
  set(draft || (context.model === "demo" ? DEMO : {}));
  if (draft) stack.set((draft.loras || []).map(fromEntry));
  typed();
  drawGallery().catch(() => {});
  for (const [id, asked] of Object.entries(own.get("jobs") || {})) watch(id, asked);
  context.onPresets((names) => {
    const now = fields.lora_selection.value;
    fields.lora_selection.replaceChildren(...["", "none", ...names].map((name) => h("option", { value: name }, name || "-")));
    fields.lora_selection.value = now;
  });
  return Object.assign(element, { request, stack, set });
}
