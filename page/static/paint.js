// A picture to start from, and a mask that is painted over it.

import { h, labelled, say } from "./dom.js";

const MOST = 7_000_000;

const asDataUri = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

/** The picker; `request()` has `image_url` and `mask_url` where there are some. */
export function newPainter(change = () => {}) {
  let picture = null, painted = false, width = 30, drawing = null, brush = true;
  const image = h("img", { alt: "The picture to start from" });
  const canvas = h("canvas", { "aria-label": "Mask: what is painted is drawn anew" });
  const spot = h("div", { class: "paint", hidden: true }, image, canvas);
  const input = h("input", { type: "file", accept: "image/*", change: () => input.files[0] && take(input.files[0]) });
  const tools = h("div", { class: "line", hidden: true },
    h("label", { class: "line soft" }, "brush", h("input", { type: "range", min: 2, max: 200, value: "30", "aria-label": "Size of the brush", input: (event) => { width = Number(event.target.value); } })),
    h("label", { class: "line soft" }, h("input", { type: "checkbox", change: (event) => { brush = !event.target.checked; } }), "erase"),
    h("button", { type: "button", class: "small", click: () => fill("#fff") }, "all"),
    h("button", { type: "button", class: "small", click: () => fill(null) }, "no mask"),
    h("button", { type: "button", class: "small", click: () => set(null) }, "no picture"));
  const element = h("details", {}, h("summary", {}, "Picture and mask"), labelled("picture to start from", input), tools, spot);

  function fill(colour) {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (colour) {
      context.fillStyle = colour;
      context.fillRect(0, 0, canvas.width, canvas.height);
    }
    painted = Boolean(colour);
    change();
  }

  function stroke(event) {
    const rect = canvas.getBoundingClientRect(), scale = canvas.width / rect.width;
    const at = [(event.clientX - rect.left) * scale, (event.clientY - rect.top) * scale];
    const context = canvas.getContext("2d");
    context.globalCompositeOperation = brush ? "source-over" : "destination-out";
    context.strokeStyle = "#fff";
    context.lineWidth = width * scale * (rect.width / 400);
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(...(drawing || at));
    context.lineTo(at[0] + 0.01, at[1]);
    context.stroke();
    context.globalCompositeOperation = "source-over";
    drawing = at;
    painted = true;
  }
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); drawing = null; stroke(event); });
  canvas.addEventListener("pointermove", (event) => { if (drawing) stroke(event); });
  canvas.addEventListener("pointerup", () => { drawing = null; change(); });

  function set(url) {
    picture = url;
    painted = false;
    spot.hidden = tools.hidden = !url;
    if (!url) input.value = "";
    else {
      element.open = true;
      image.onload = () => { canvas.width = image.naturalWidth; canvas.height = image.naturalHeight; };
      image.src = url;
    }
    change();
  }

  async function take(file) {
    const url = await asDataUri(file);
    if (url.length > MOST) return say("The picture is over 5 MB: a job takes 10 MB in all. Make it smaller first.");
    return set(url);
  }

  function mask() {
    const flat = h("canvas", { width: canvas.width, height: canvas.height }), context = flat.getContext("2d");
    context.fillRect(0, 0, flat.width, flat.height);
    context.drawImage(canvas, 0, 0);
    return flat.toDataURL("image/png");
  }

  return Object.assign(element, {
    set,
    request: () => (picture ? { image_url: picture, ...(painted ? { mask_url: mask() } : {}) } : {}),
  });
}
