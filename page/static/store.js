// What the browser keeps: the history of pictures for all tabs, and the jobs under way of this one.

const NAME = "worker-lora", STORE = "pictures", MOST = 300;
let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function within(mode, work) {
  const store = (await database()).transaction(STORE, mode).objectStore(STORE);
  const request = work(store);
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Keeps an answered job; the oldest go. */
export async function keep(record) {
  await within("readwrite", (store) => store.put(record));
  const keys = await within("readonly", (store) => store.getAllKeys());
  for (const key of keys.sort().slice(0, Math.max(0, keys.length - MOST))) await forget(key);
}
export const forget = (id) => within("readwrite", (store) => store.delete(id));
export const forgetAll = () => within("readwrite", (store) => store.clear());
/** All records, the newest first. */
export const kept = async () => (await within("readonly", (store) => store.getAll())).sort((a, b) => (a.id < b.id ? 1 : -1));

/** A small value of this tab, which a reload keeps and another tab does not see. */
export const own = {
  get(name) { try { return JSON.parse(sessionStorage.getItem(name)); } catch { return null; } },
  set(name, value) {
    try {
      if (value === null) sessionStorage.removeItem(name);
      else sessionStorage.setItem(name, JSON.stringify(value));
    } catch { /* full: a reload forgets it */ }
  },
};
