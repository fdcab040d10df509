// The Worker tab: what is known of the endpoint and its workers, and how long the last jobs took.

import { act, health } from "./api.js";
import { bar, doing, h, size } from "./dom.js";
import { kept } from "./store.js";

const table = (values) => h("div", { class: "scroll" }, h("table", {}, Object.entries(values).map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value !== null && typeof value === "object" ? JSON.stringify(value) : String(value ?? "-"))))));

function memory({ memory: device, cache }) {
  const drawn = [];
  if (device?.total_gb) drawn.push(h("h3", {}, "Memory of the device"), bar({ used: (device.total_gb - device.free_gb) * 1e9, free: device.free_gb * 1e9 }, size));
  if (cache?.free_gb) drawn.push(h("h3", {}, `Cache: ${cache.files} files`), bar({ LoRAs: cache.gb * 1e9, free: cache.free_gb * 1e9 }, size));
  return drawn;
}

export function newWorkerTab(context) {
  const queue = h("div", { id: "queue" }), worker = h("div", { id: "health" }), jobs = h("div", {});
  const drawQueue = async () => {
    try {
      const now = await health();
      queue.replaceChildren(h("div", { class: "even" }, Object.entries(now).filter(([, one]) => one && typeof one === "object").map(([name, one]) => h("div", {}, h("h3", {}, name), table(one)))));
    } catch (error) { queue.replaceChildren(h("p", { class: "error" }, error.message)); }
  };
  const askWorker = async () => {
    const found = await act("health");
    worker.replaceChildren(table(found), ...memory(found));
    if (context.kind === "text") worker.append(h("h3", {}, "Statistics"), table(Object.fromEntries(Object.entries(await act("statistics")).filter(([name]) => name !== "prometheus"))));
  };
  const drawJobs = async () => {
    const records = (await kept()).slice(0, 20);
    jobs.replaceChildren(...records.map(({ request, output, id }) => h("div", { class: "entry" }, h("span", { class: "soft" }, `${new Date(Number(id.split("-")[0])).toLocaleTimeString()}  ${(request.prompt || "").slice(0, 60)}`), bar(output.timings || {}))));
    if (!records.length) jobs.replaceChildren(h("p", { class: "soft" }, "No picture was drawn from this browser yet."));
  };
  const element = h("div", {},
    h("div", { class: "panel" }, h("h2", {}, "Queue and workers"), queue),
    h("div", { class: "panel" }, h("div", { class: "line" }, h("h2", {}, "One worker"), h("button", { type: "button", class: "small", id: "ask", click: doing(askWorker) }, "Ask")), worker),
    h("div", { class: "panel" }, h("h2", {}, "The last jobs"), jobs));
  element.shown = () => {
    drawQueue();
    drawJobs().catch(() => {});
    if (!worker.children.length) askWorker().catch((error) => worker.replaceChildren(h("p", { class: "error" }, error.message)));
    clearInterval(element.timer);
    element.timer = setInterval(() => (element.closest("[hidden]") || document.hidden ? null : drawQueue()), 3000);
  };
  return element;
}
