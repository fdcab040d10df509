// The Live tab: frames of a camera, the screen, a file or a moving drawing, drawn under what is chosen now.

import { doing, h, labelled } from "./dom.js";
import { cards, stem } from "./loras.js";
import { newStack } from "./stack.js";

const MOST_WAITING = 3000;
const NO_LIVE = "A queue passes nothing on to a job that runs, so live frames need a worker's own server: start a worker with WORKER_SERVE=http and open this page with --url and its address, or with --local.";

/** A message: two bytes of length, so many of JSON, then the picture. */
export async function pack(about, picture) {
  const text = new TextEncoder().encode(JSON.stringify(about)), head = new Uint8Array(2);
  new DataView(head.buffer).setUint16(0, text.length);
  return new Blob([head, text, ...(picture ? [picture] : [])]).arrayBuffer();
}

export function unpack(data) {
  const length = new DataView(data).getUint16(0);
  return { about: JSON.parse(new TextDecoder().decode(data.slice(2, 2 + length))), picture: data.slice(2 + length) };
}

/** A drawing that moves, so that a session can be tried without a camera. */
function drawMoving(context, time, side) {
  context.fillStyle = "#2040c0";
  context.fillRect(0, 0, side, side);
  context.fillStyle = "#d02020";
  context.beginPath();
  context.arc(side * (0.5 + 0.25 * Math.cos(time)), side * (0.5 + 0.25 * Math.sin(time)), side * 0.2, 0, 7);
  context.fill();
}

const percentile = (values, share) => (values.length ? [...values].sort((a, b) => a - b)[Math.floor(share * (values.length - 1))] : 0);

export function newLiveTab(context) {
  if (!context.live) return h("div", { class: "panel" }, h("p", { id: "no-live" }, NO_LIVE));
  const video = h("video", { muted: true, playsinline: "", hidden: true, loop: true });
  const frame = h("canvas", { hidden: true }), shown = h("canvas", { class: "live", id: "live", width: 64, height: 64, role: "img", "aria-label": "The frames as they come" });
  const source = h("select", { id: "live-source" }, [["drawing", "a moving drawing"], ["camera", "camera"], ["screen", "screen"], ["file", "a video file"], ["text", "the prompt alone"]].map(([value, text]) => h("option", { value }, text)));
  const file = h("input", { type: "file", accept: "video/*", "aria-label": "Video file", hidden: true });
  source.addEventListener("input", () => { file.hidden = source.value !== "file"; });
  const prompt = h("textarea", { rows: 2, id: "live-prompt", value: context.model === "demo" ? "a big red circle on a blue background" : "" });
  const fields = { size: h("input", { type: "number", min: 64, max: 1536, step: 8, value: context.model === "demo" ? "64" : "512" }), steps: h("input", { type: "number", min: 1, max: 8, value: "2" }), strength: h("input", { type: "number", min: 0.02, max: 1, step: 0.02, value: "0.5" }), seed: h("input", { inputmode: "numeric", value: "1" }), "at most fps": h("input", { type: "number", min: 1, max: 60, value: "30" }) };
  const figures = h("p", { class: "soft", id: "live-figures", role: "status" }), applied = h("p", { class: "soft", id: "live-applied" }), trouble = h("p", { class: "error", id: "live-trouble", role: "alert" });
  const buttons = h("div", { class: "chips", role: "group", "aria-label": "Presets" });
  const stack = newStack({ change: () => changed({ loras: stack.request() }), words: (words) => { prompt.value = `${prompt.value}, ${words}`; changed({ prompt: prompt.value }); } });
  const go = h("button", { type: "button", class: "main", id: "live-start" }, "Start"), stop = h("button", { type: "button", id: "live-stop", disabled: true }, "Stop");
  let socket = null, changes = {}, presets = [], chosen = "";

  function changed(what) {
    changes = { ...changes, ...what };
  }

  function choose(name) {
    chosen = chosen === name ? "" : name;
    changed({ lora_selection: chosen || "none" });
    drawButtons();
  }

  function drawButtons() {
    buttons.replaceChildren(...presets.map((name, index) => h("button", { type: "button", class: "chip", "aria-pressed": String(chosen === name), click: () => choose(name) }, `${index < 9 ? `${index + 1} ` : ""}${name}${chosen === name ? " ●" : ""}`)));
  }
  context.onPresets((names) => { presets = names; drawButtons(); });
  document.addEventListener("keydown", (event) => {
    if (element.closest("[hidden]") || event.target.matches("input, textarea, select") || event.ctrlKey || event.altKey || event.metaKey) return;
    const name = presets[Number(event.key) - 1];
    if (/^[1-9]$/.test(event.key) && name) choose(name);
  });
  prompt.addEventListener("input", () => changed({ prompt: prompt.value }));
  fields.seed.addEventListener("input", () => { if (/^\d+$/.test(fields.seed.value)) changed({ seed: Number(fields.seed.value) }); });

  async function capture() {
    if (["drawing", "text"].includes(source.value)) return;
    if (source.value === "file") {
      if (!file.files[0]) throw new Error("Choose a video file first.");
      video.src = URL.createObjectURL(file.files[0]);
    } else {
      const media = navigator.mediaDevices;
      video.srcObject = source.value === "camera" ? await media.getUserMedia({ video: true }) : await media.getDisplayMedia({ video: true });
    }
    await video.play();
  }

  /** The next picture to be drawn over, as a JPEG. */
  function picture([width, height]) {
    frame.width = width;
    frame.height = height;
    const pen = frame.getContext("2d");
    if (source.value === "drawing") drawMoving(pen, performance.now() / 700, Math.min(width, height));
    else {
      const scale = Math.max(width / video.videoWidth, height / video.videoHeight);
      pen.drawImage(video, (width - video.videoWidth * scale) / 2, (height - video.videoHeight * scale) / 2, video.videoWidth * scale, video.videoHeight * scale);
    }
    return new Promise((resolve) => frame.toBlob(resolve, "image/jpeg", 0.85));
  }

  async function start() {
    trouble.textContent = "";
    await capture();
    const drawsText = source.value === "text", begun = {
      prompt: prompt.value, source: drawsText ? "text" : "image", size: Number(fields.size.value), steps: Number(fields.steps.value),
      seed: Number(fields.seed.value) || 0, presets: presets.slice(0, 9), loras: stack.request(), ...(drawsText ? {} : { strength: Number(fields.strength.value) }),
      ...(chosen ? { lora_selection: chosen } : {}),
    };
    changes = {};
    const own = (socket = new WebSocket(`ws://${location.host}/api/live`));
    own.binaryType = "arraybuffer";
    const state = { own, seq: 0, done: 0, waiting: new Map(), times: [], trips: [], size: null, room: 2, drawsText };
    own.onopen = async () => own.send(JSON.stringify(begun));
    own.onmessage = ({ data }) => take(state, data).catch((error) => { trouble.textContent = error.message; });
    own.onclose = ({ reason }) => ended(own, reason);
    go.disabled = true;
    stop.disabled = false;
  }

  function leave(own) {
    own.over = true;
    own.close();
  }

  function ended(own, reason) {
    if (socket !== own) return;
    socket = null;
    for (const track of video.srcObject?.getTracks() || []) track.stop();
    video.srcObject = null;
    go.disabled = false;
    stop.disabled = true;
    if (reason || !own.over) trouble.textContent = reason || "The connection to the worker was lost. Start begins anew.";
  }

  async function take(state, data) {
    const { about, picture: body } = unpack(data);
    if (about.error) trouble.textContent = about.error;
    if (about.type === "ready") {
      Object.assign(state, { size: about.size, room: Math.max(1, about.in_flight || 2) });
      [shown.width, shown.height] = about.size;
      loop(state);
    } else if (about.type === "frame") await taken(state, about, body);
    else if (about.type === "monitor") state.monitor = about;
    else if (about.type === "end") {
      if (about.reason) trouble.textContent = `The session is over: ${about.reason}.`;
      leave(state.own);
    }
    else if (about.type === "error" && !state.size) leave(state.own);
  }

  async function taken(state, about, body) {
    const sent = state.waiting.get(about.seq), now = performance.now();
    state.waiting.delete(about.seq);
    if (!body.byteLength) return;
    state.done += 1;
    state.times = [...state.times.filter((time) => now - time < 2000), now];
    if (sent) state.trips = [...state.trips.slice(-119), now - sent];
    const image = await createImageBitmap(new Blob([body]));
    shown.getContext("2d").drawImage(image, 0, 0, shown.width, shown.height);
    image.close();
    if (!about.error) trouble.textContent = "";
    const loras = (about.loras || []).map((one) => `${stem(one.name)} ${JSON.stringify(one.scale)} ${one.mode || ""}`).join(" + ");
    applied.textContent = `frame ${about.seq}: ${(about.presets || []).join(", ")} ${loras || "no LoRA"}${about.loading ? ", the next is loading" : ""}; switch ${about.switch_ms ?? 0} ms`;
    const monitor = state.monitor?.ms?.frame;
    figures.textContent = `${state.done} frames, ${(state.times.length / 2).toFixed(1)} fps; there and back p50 ${percentile(state.trips, 0.5).toFixed(0)} ms, p95 ${percentile(state.trips, 0.95).toFixed(0)} ms${monitor ? `; the worker p50 ${monitor.p50} ms, p95 ${monitor.p95} ms` : ""}`;
    shown.dataset.done = state.done;
    shown.dataset.presets = (about.presets || []).join(",");
  }

  /** Sends the next frame as soon as fewer than the worker takes are under way. */
  async function loop(state) {
    let last = 0;
    while (socket === state.own && state.own.readyState === WebSocket.OPEN) {
      const now = performance.now(), rest = 1000 / Math.max(1, Number(fields["at most fps"].value) || 30);
      for (const [seq, sent] of state.waiting) if (now - sent > MOST_WAITING * 10) state.waiting.delete(seq);
      if (state.waiting.size >= state.room || now - last < rest) {
        await new Promise((resolve) => setTimeout(resolve, 4));
        continue;
      }
      last = now;
      const seq = state.seq++, given = changes;
      changes = {};
      state.waiting.set(seq, now);
      const message = await pack({ ...given, seq }, state.drawsText ? null : await picture(state.size));
      if (state.own.readyState === WebSocket.OPEN) state.own.send(message);
    }
  }

  go.addEventListener("click", doing(async () => { try { await start(); } catch (error) { trouble.textContent = error.message; } finally { setTimeout(() => { go.disabled = Boolean(socket); }); } }));
  stop.addEventListener("click", () => { if (socket) leave(socket); });

  const element = h("div", { class: "two" },
    h("div", {}, h("div", { class: "panel" }, labelled("source", source), file, labelled("prompt", prompt),
      h("div", { class: "fields" }, Object.entries(fields).map(([name, field]) => labelled(name, field))), h("p", { class: "line" }, go, stop), trouble),
    h("div", { class: "panel" }, h("h2", {}, "Presets (keys 1 to 9)"), buttons, h("h2", {}, "LoRAs"), stack, cards((item) => stack.add(item), { only: (item) => item.state !== "failed" }))),
    h("div", { class: "panel" }, shown, figures, applied, video));
  return element;
}
