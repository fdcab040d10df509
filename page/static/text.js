// The Text tab: one or two adapters answer the same question, piece by piece, with what it took.

import { act, cancel, Failure, follow, pieces, run } from "./api.js";
import { doing, h, labelled, seconds } from "./dom.js";
import { onLibrary, stem } from "./loras.js";

const PARAMETERS = { max_tokens: [128, { type: "number", min: 1 }], temperature: [0.7, { type: "number", min: 0, step: 0.1 }], top_p: ["", { type: "number", min: 0, max: 1, step: 0.05 }], top_k: ["", { type: "number" }], repetition_penalty: ["", { type: "number", step: 0.05 }], seed: [1, { inputmode: "numeric" }] };

/** The events of a stream so far: `take` gets each as an object, however the pieces cut them. */
function reader(take) {
  let left = "";
  return (piece) => {
    const parts = (left + piece).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") take(JSON.parse(data));
    }
  };
}

/** Streams a job: `take` gets its events; throws what failed. */
async function stream(id, take) {
  const read = reader(take);
  for (let failures = 0; ;) {
    let state;
    try {
      state = await pieces(id);
      failures = 0;
    } catch (error) {
      if (error.status === 404 || ++failures > 8) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
      continue;
    }
    for (const { output } of state.stream || []) {
      if (typeof output === "string") read(output);
      else if (output?.error) throw new Failure(output.error.message || String(output.error));
    }
    if (!["IN_QUEUE", "IN_PROGRESS"].includes(state.status) && !(state.stream || []).length) {
      if (state.status !== "COMPLETED") await follow(id); // throws the reason
      return;
    }
  }
}

function column(number, context) {
  const adapter = h("select", { id: `adapter-${number}` }), scale = h("input", { type: "number", step: 0.1, value: "1", id: `scale-${number}` });
  const answer = h("div", { class: "answer", "aria-live": "polite", id: `answer-${number}` }), told = h("div", { class: "soft", id: `told-${number}` });
  onLibrary((all) => {
    const now = adapter.value;
    adapter.replaceChildren(h("option", { value: "" }, `${context.model} alone`), ...all.filter((one) => one.file && one.state !== "failed").map((one) => h("option", { value: one.file }, `${stem(one.name)}${one.base ? ` (${one.base})` : ""}`)));
    adapter.value = now;
  });
  const stop = h("button", { type: "button", class: "small", hidden: true }, "Stop");
  async function ask(body) {
    const begun = performance.now();
    let first = 0, last = {}, finish = "";
    answer.textContent = told.textContent = "";
    const loras = adapter.value ? [{ path: adapter.value, scale: Number(scale.value) }] : [];
    const id = await run({ openai_route: "/v1/chat/completions", openai_input: { ...body, loras, stream: true, stream_options: { include_usage: true } } });
    stop.hidden = false;
    stop.onclick = () => cancel(id).catch(() => {});
    try {
      await stream(id, (event) => {
        if (event.error) throw new Failure(event.error.message || String(event.error));
        const [choice] = event.choices || [];
        if (choice?.delta?.content) {
          first ||= performance.now();
          answer.append(choice.delta.content);
        }
        finish = choice?.finish_reason || finish;
        last = { ...last, ...event };
      });
      const times = last.timings || {}, tokens = last.usage?.completion_tokens;
      const facts = { "load of adapters": times.load !== undefined && seconds(times.load), "first token": times.first_token !== undefined && seconds(times.first_token), "seen here": seconds((performance.now() - begun) / 1000), "tokens/s": tokens && times.decode ? (tokens / times.decode).toFixed(1) : null, length: tokens && `${tokens} tokens, prompt ${last.usage.prompt_tokens}`, ended: finish, seed: last.seed, memory: await memory() };
      told.replaceChildren(h("table", {}, Object.entries(facts).filter(([, value]) => value !== false && value !== null && value !== undefined && value !== "").map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, String(value))))),
        ...(last.loras || []).map((one) => h("p", {}, `${one.file}: scale ${JSON.stringify(one.scale)}, ${one.status || ""} ${one.mode || ""}`)), ...(last.warnings || []).map((text) => h("p", { class: "warning" }, text)));
    } catch (error) {
      told.replaceChildren(h("p", { class: "error", role: "alert" }, error.message));
    } finally { stop.hidden = true; }
  }
  return { ask, element: h("div", { class: "panel" }, h("div", { class: "fields" }, labelled("adapter", adapter), labelled("scale", scale)), answer, stop, told) };
}

async function memory() {
  try {
    const found = await act("health");
    return found.memory?.total_gb ? `${(found.memory.total_gb - found.memory.free_gb).toFixed(1)} of ${found.memory.total_gb} GB` : null;
  } catch { return null; }
}

export function newTextTab(context) {
  const system = h("textarea", { rows: 2, id: "system" }), question = h("textarea", { rows: 3, id: "question" });
  const fields = Object.fromEntries(Object.entries(PARAMETERS).map(([name, [value, props]]) => [name, h("input", { ...props, value: String(value), id: name })]));
  const columns = [column(1, context), column(2, context)];
  const second = h("input", { type: "checkbox", id: "beside", change: () => { columns[1].element.hidden = !second.checked; } });
  columns[1].element.hidden = true;
  const ask = doing(async () => {
    const body = { messages: [...(system.value.trim() ? [{ role: "system", content: system.value }] : []), { role: "user", content: question.value }] };
    for (const [name, field] of Object.entries(fields)) if (field.value !== "") body[name] = Number(field.value);
    await Promise.all(columns.filter((_, index) => index === 0 || second.checked).map((one) => one.ask(body)));
  });
  return h("div", {},
    h("div", { class: "panel" }, labelled("system prompt", system), labelled("question", question), h("div", { class: "fields" }, Object.entries(fields).map(([name, field]) => labelled(name.replaceAll("_", " "), field))),
      h("p", { class: "line" }, h("button", { type: "button", class: "main", id: "answer", click: ask }, "Ask"), h("label", { class: "line" }, second, "two adapters side by side"))),
    h("div", { class: "even" }, columns.map(({ element }) => element)));
}
