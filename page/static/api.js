// Jobs: queued, followed, cancelled. All goes through this page's own server, which has the key.

export class Failure extends Error {}

const FINAL = ["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"];
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** What failed, in one line, whatever shape the worker gave it. */
function words(error) {
  if (error && typeof error === "object") return `${error.code || "FAILED"}: ${error.message || JSON.stringify(error)}`;
  try {
    const read = JSON.parse(error);
    if (read && typeof read === "object") return words(read.error_message ? String(read.error_message) : read);
  } catch { /* a plain sentence */ }
  return String(error);
}

export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Failure("The page's server does not answer. Is it still running?");
  }
  let found = null;
  try { found = await answer.json(); } catch { /* told below */ }
  if (!answer.ok || found === null) {
    const failure = new Failure(found?.error ? words(found.error) : `HTTP ${answer.status}`);
    failure.status = answer.status;
    throw failure;
  }
  return found;
}

const post = (path, value = {}) => ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });

/** Queues a job; its id. */
export const run = async (input) => (await post("/api/run", { input })).id;
export const cancel = (id) => post(`/api/cancel/${id}`);
export const pieces = (id) => post(`/api/stream/${id}`);
export const health = () => ask("/api/health");
export const about = () => ask("/api/about");
export const readPicture = (file) => ask("/api/read", { method: "POST", body: file });

/** Follows a job to its end; its output. `news` gets each state, with `lost` once a worker died under the job.
    A failure to ask is borne for a while. */
export async function follow(id, news = () => {}) {
  let wait = 40, failures = 0, before = {}, lost = false;
  for (;;) {
    let state;
    try {
      state = await ask(`/api/status/${id}`);
      failures = 0;
    } catch (error) {
      if (error.status === 404 || ++failures > 8) throw error;
      news({ status: "UNKNOWN", said: error.message });
      await pause(1500);
      continue;
    }
    const back = before.status === "IN_PROGRESS" && state.status === "IN_QUEUE";
    if (back || (before.workerId && state.workerId && before.workerId !== state.workerId)) lost = true;
    if (lost) state.lost = "Its worker was lost: the job was given to another one.";
    before = { status: state.status, workerId: state.workerId || before.workerId };
    if (!FINAL.includes(state.status)) {
      news(state);
      await pause(wait);
      wait = Math.min(wait * 1.4, 700);
      continue;
    }
    if (state.status === "COMPLETED" && state.output !== undefined && !state.output?.error) return unwrapped(state.output);
    const failure = new Failure(words(state.error || state.output?.error || { CANCELLED: "The job was cancelled.", TIMED_OUT: "The job took too long." }[state.status] || "The worker gave no answer: it may have been over the platform's limit."));
    failure.job = state.status;
    throw failure;
  }
}

/** A text worker yields every answer: that of an action is the only piece. */
const unwrapped = (output) => (Array.isArray(output) && output.length === 1 && typeof output[0] === "object" ? output[0] : output);

/** An action's answer. */
export async function act(action, fields = {}, news) {
  return follow(await run({ action, ...fields }), news);
}
