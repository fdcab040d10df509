// The Library tab: what is on the volume, an adapter's own page, presets.

import { act } from "./api.js";
import { doing, h, labelled, s, say, seconds, size, twice } from "./dom.js";
import { cards, changed, gone, library, refresh, wordsOf } from "./loras.js";

const STATES = ["", "discovered", "active", "failed"];

export function newLibraryTab(context, imageTab) {
  const state = h("select", { "aria-label": "State", id: "state" }, STATES.map((name) => h("option", { value: name }, name || "any state")));
  const said = h("p", { class: "soft", role: "status", id: "scanned" });
  const page = h("dialog", { "aria-label": "One adapter", id: "adapter" });
  const grid = cards((item) => open(item.name), { only: (item) => !state.value || item.state === state.value, tall: true });
  state.addEventListener("input", grid.filter);

  const scan = doing(async () => {
    const { warnings, ...counts } = await act("library.scan");
    await refresh();
    said.textContent = [Object.entries(counts).map(([name, count]) => `${count} ${name.replace("_", " ")}`).join(", "), ...warnings].join("; ");
  });

  // --- adding ---

  const source = h("input", { id: "source", placeholder: "URL, user/repo, civitai:123" }), weight = h("input", { id: "weight_name", placeholder: "file, if the source has several" });
  const adding = h("div", { role: "status" });
  async function add() {
    const path = source.value.trim();
    if (!path) return;
    const begun = performance.now(), told = h("span", {}), bar = h("progress", { max: 1, "aria-label": "Progress" }), line = h("p", { class: "line" }, bar, told);
    adding.append(line);
    let said = "";
    const clock = setInterval(() => { told.textContent = `${path}: ${said} ${seconds((performance.now() - begun) / 1000)}`; }, 250);
    try {
      const entry = { path, ...(weight.value.trim() ? { weight_name: weight.value.trim() } : {}) };
      const { loras } = await act("loras.prefetch", { loras: [entry] }, ({ output }) => {
        said = output?.text ? `${output.text},` : "";
        if (output?.fraction) bar.value = output.fraction; else bar.removeAttribute("value");
      });
      await act("library.scan");
      await refresh();
      line.replaceChildren(h("span", { class: "good" }, `${loras[0].file} is here (${loras[0].origin}, ${loras[0].algorithm} ${loras[0].rank ?? ""}).`));
    } catch (error) {
      line.replaceChildren(h("span", { class: "error" }, error.message));
    } finally { clearInterval(clock); }
  }

  const PIECE = 3 << 20;

  /** Sends a file in pieces; the worker keeps it once all are there and its hash is right. */
  async function upload(file) {
    const told = h("span", {}), progress = h("progress", { max: 1, value: "0" }), line = h("p", { class: "line" }, progress, told);
    adding.append(line);
    try {
      told.textContent = `${file.name}: hash ...`;
      const body = await file.arrayBuffer();
      const sha256 = [...new Uint8Array(await crypto.subtle.digest("SHA-256", body))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      for (let start = 0; start < body.byteLength; start += PIECE) {
        told.textContent = `${file.name}: ${size(start)} of ${size(body.byteLength)}`;
        progress.value = start / body.byteLength;
        const piece = new Uint8Array(body, start, Math.min(PIECE, body.byteLength - start));
        let text = "";
        for (let at = 0; at < piece.length; at += 32768) text += String.fromCharCode(...piece.subarray(at, at + 32768));
        await act("library.upload", { name: file.name, data: btoa(text), start, size: body.byteLength, sha256 });
      }
      await act("library.scan");
      await refresh();
      line.replaceChildren(h("span", { class: "good" }, `${file.name} is here.`));
    } catch (error) {
      line.replaceChildren(h("span", { class: "error" }, error.message));
    }
  }
  const sent = h("input", { type: "file", accept: ".safetensors", id: "upload", change: async () => {
    for (const file of [...sent.files]) await upload(file);
    sent.value = "";
  } });

  // --- one adapter ---

  function open(name) {
    const item = library().find((one) => one.name === name);
    if (!item) return;
    page.replaceChildren(...detail(item));
    if (!page.open) page.showModal();
  }

  function update(item) {
    changed(item);
    if (page.open) open(item.name);
  }

  function detail(item) {
    const facts = [["state", `${item.state}${item.reason ? `: ${item.reason}` : ""}`], ["file for jobs", item.file], ["source", item.source], ["base", item.base], ["algorithm", item.algorithm], ["rank", item.rank], ["layers", item.layers], ["size", size(item.bytes)], ["sha256", item.sha256], ["without header (AutoV3)", item.autov3], ["pinned", item.pinned ? "yes" : "no"]];
    const more = h("div", {}, h("p", { class: "soft" }, "..."));
    act("library.describe", { name: item.name }).then((found) => more.replaceChildren(...described(found)), (error) => more.replaceChildren(h("p", { class: "error" }, error.message)));
    return [
      h("div", { class: "line" }, h("h2", {}, item.name), h("button", { type: "button", class: "small", click: () => page.close() }, "Close")),
      h("p", { class: "line" },
        h("button", { type: "button", class: "small", id: "activate", click: doing(async () => update(await act("library.activate", { name: item.name }))) }, "Activate"),
        h("button", { type: "button", class: "small", click: doing(async () => update(await act("library.deactivate", { name: item.name }))) }, "Deactivate"),
        item.file && h("button", { type: "button", class: "small", click: doing(async () => { const { pinned } = await act("loras.pin", { name: item.file, pinned: !item.pinned }); update({ ...item, pinned }); }) }, item.pinned ? "Unpin" : "Pin"),
        item.file && h("button", { type: "button", class: "small", click: () => { imageTab?.stack.add(item); page.close(); } }, "Use it"),
        item.thumbnail && h("button", { type: "button", class: "small", click: doing(async () => { const { picture, ...now } = await act("library.thumbnail", { name: item.name }); update(now); }) }, "Remove thumbnail"),
        twice("Delete", "Delete the file for ever?", async () => { await act("library.delete", { name: item.name }); page.close(); gone(item.name); say(`${item.name} is deleted.`); })),
      h("div", { class: "scroll" }, h("table", {}, facts.filter(([, value]) => value !== null && value !== undefined).map(([title, value]) => h("tr", {}, h("th", { scope: "row" }, title), h("td", {}, String(value)))))),
      note(item), h("h3", {}, "Words"), h("div", { class: "chips" }, wordsOf(item).map((word) => h("span", { class: "chip tag" }, word))), more];
  }

  function note(item) {
    const scale = h("input", { type: "number", step: 0.05, min: -10, max: 10, value: item.note?.scale ?? "" });
    const words = h("textarea", { rows: 3, value: (item.note?.words || []).join("\n") }), text = h("textarea", { rows: 3, value: item.note?.text || "" });
    return h("details", { open: Boolean(item.note) }, h("summary", {}, "Note"),
      h("div", { class: "even" }, labelled("default scale", scale), labelled("sets of words, one a line", words), labelled("what else is to be known", text)),
      h("button", { type: "button", class: "small", click: doing(async () => {
        update(await act("library.note", { name: item.name, scale: scale.value === "" ? null : Number(scale.value), words: words.value.split("\n").map((line) => line.trim()).filter(Boolean), text: text.value }));
        say("The note is kept.");
      }) }, "Keep the note"));
  }

  function described(found) {
    const rows = (values) => h("div", { class: "scroll" }, h("table", {}, Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, String(value))))));
    return [
      found.norms.length ? h("div", {}, h("h3", {}, "How much each block is changed (Frobenius norm at scale 1)"), norms(found.norms)) : "",
      Object.keys(found.training).length ? h("div", {}, h("h3", {}, "Training, as the file says"), rows(found.training)) : "",
      Object.keys(found.words).length ? h("div", {}, h("h3", {}, "Words of its captions"), h("p", { class: "soft" }, Object.entries(found.words).slice(0, 60).map(([word, count]) => (count ? `${word} (${count})` : word)).join(", "))) : "",
      h("div", {}, h("h3", {}, "Hashes"), rows(found.hashes)),
      ...found.warnings.map((text) => h("p", { class: "warning" }, text))];
  }

  function norms(all) {
    const most = Math.max(...all.map((one) => one.norm), 1e-9), line = 18;
    const drawing = s("svg", { viewBox: `0 0 460 ${all.length * line}`, class: "norms", role: "img", "aria-label": all.map((one) => `${one.component} ${one.block} ${one.norm.toPrecision(3)}`).join(", ") });
    all.forEach((one, index) => drawing.append(
      s("text", { x: 0, y: index * line + 13, "font-size": 11, fill: "currentColor" }, `${one.component === "unet" ? "" : `${one.component} `}${one.block}`.slice(0, 28)),
      s("rect", { x: 170, y: index * line + 3, width: Math.max(1, (220 * one.norm) / most), height: 12, rx: 2, fill: one.component === "unet" ? "#4e79c4" : "#e08b3c" }),
      s("text", { x: 400, y: index * line + 13, "font-size": 11, fill: "currentColor" }, one.norm.toPrecision(3))));
    return drawing;
  }

  // --- presets ---

  const presets = h("div", {}), presetName = h("input", { placeholder: "name", id: "preset-name" }), prefix = h("input", { placeholder: "before the prompt" }), suffix = h("input", { placeholder: "after it" });
  async function drawPresets() {
    const { presets: all, faults, default: chosen } = await act("presets.list");
    context.setPresets(Object.keys(all));
    presets.replaceChildren(...Object.entries(all).map(([name, one]) => h("div", { class: "entry" }, h("div", { class: "line" }, h("span", { class: "title" }, `${name}${name === chosen ? " (default)" : ""}`),
      twice("Delete", "Delete the preset?", async () => { await act("presets.delete", { name }); await drawPresets(); })),
      h("p", { class: "soft" }, [one.loras.map((lora) => `${lora.path} ${JSON.stringify(lora.scale ?? 1)}`).join(" + "), one.prompt_prefix, one.prompt_suffix, ...(one.trigger_words || [])].filter(Boolean).join("; ")))),
      ...Object.entries(faults).map(([name, why]) => h("p", { class: "error" }, `${name}: ${why}`)));
  }
  const keepPreset = doing(async () => {
    const loras = imageTab?.stack.request() || [];
    await act("presets.set", { name: presetName.value, loras, prompt_prefix: prefix.value, prompt_suffix: suffix.value });
    await drawPresets();
  });

  drawPresets().catch((error) => presets.replaceChildren(h("p", { class: "error" }, error.message)));
  return h("div", {},
    h("div", { class: "panel" }, h("div", { class: "line" }, h("h2", {}, "Library"), h("button", { type: "button", id: "scan", click: scan }, "Scan"), state), said,
      h("div", { class: "fields" }, labelled("add from", source), labelled("file in it", weight), h("button", { type: "button", click: doing(add), id: "add" }, "Fetch"), labelled("upload a file", sent)), adding, grid),
    h("div", { class: "panel" }, h("h2", {}, "Presets"), presets,
      imageTab && h("div", { class: "line" }, presetName, prefix, suffix, h("button", { type: "button", click: keepPreset }, "Keep the Image tab's LoRAs as a preset"))), page);
}

