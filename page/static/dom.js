// Elements from plain values. Text only ever becomes text: nothing here reads HTML.

/** An element. `props`: attributes; functions are listeners (`click`), true and false set properties. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "value" || typeof value === "boolean") element[name] = value;
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An element of SVG. */
export function s(tag, props = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

let count = 0;

/** A field with its name above it. */
export function labelled(name, field, hint = "") {
  if (!field.id) field.id = `f${++count}`;
  return h("label", { for: field.id, title: hint || null }, h("span", { class: "name" }, name), field);
}

/** A range and a number that are one value; `change` gets it. */
export function slider(name, value, [least, most, step], change) {
  const range = h("input", { type: "range", min: least, max: most, step, value: String(value), "aria-label": `${name}, slider` });
  const number = h("input", { type: "number", step, value: String(value), "aria-label": name });
  const set = (given, from) => {
    const wanted = Number(given);
    if (given === "" || !Number.isFinite(wanted)) return;
    if (from !== range) range.value = wanted;
    if (from !== number) number.value = wanted;
    change(wanted);
  };
  range.addEventListener("input", () => set(range.value, range));
  number.addEventListener("input", () => set(number.value, number));
  const element = h("div", { class: "slider" }, h("span", { class: "soft" }, name), range, number);
  element.set = (given) => { range.value = given; number.value = given; };
  return element;
}

/** Says something to the person, also to a screen reader. */
export function say(text, seconds = 6) {
  const line = h("p", {}, String(text).slice(0, 600));
  document.getElementById("says").append(line);
  setTimeout(() => line.remove(), seconds * 1000);
}

/** Runs work of a button, which rests meanwhile; a failure is said. */
export function doing(work) {
  return async (event) => {
    const button = event.currentTarget;
    button.disabled = true;
    try {
      await work(event);
    } catch (error) {
      say(error.message);
    } finally {
      button.disabled = false;
    }
  };
}

/** A button that does something only when it is pressed a second time. */
export function twice(text, question, work) {
  const button = h("button", { type: "button", class: "bad small" }, text);
  let timer = 0;
  button.addEventListener("click", (event) => {
    event.stopPropagation();
    if (button.dataset.sure) {
      clearTimeout(timer);
      delete button.dataset.sure;
      button.textContent = text;
      doing(work)({ currentTarget: button });
      return;
    }
    button.dataset.sure = "1";
    button.textContent = question;
    timer = setTimeout(() => { delete button.dataset.sure; button.textContent = text; }, 6000);
  });
  return button;
}

/** Puts a file on the reader's disk. */
export function save(url, name) {
  h("a", { href: url, download: name }).click();
}

export const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`);

export const size = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`);

/** A stacked bar of named numbers with its key. */
export function bar(values, unit = seconds) {
  const shown = Object.entries(values).filter(([, value]) => typeof value === "number" && value > 0);
  const total = shown.reduce((sum, [, value]) => sum + value, 0);
  const line = h("div", { class: "bar", role: "img", "aria-label": shown.map(([name, value]) => `${name} ${unit(value)}`).join(", ") });
  const keys = h("p", { class: "soft" });
  shown.forEach(([name, value], index) => {
    const part = h("i", { class: `c${index % 10}`, title: `${name} ${unit(value)}` });
    part.style.width = `${(100 * value) / total}%`;
    line.append(part);
    keys.append(h("span", { class: `key c${index % 10}` }), `${name} ${unit(value)}  `);
  });
  return h("div", {}, line, keys, h("p", { class: "soft" }, `together ${unit(total)}`));
}

/** A picture's address if it is data or of this page; others are not shown, only named. */
export const isShowable = (url) => /^(data:image\/(png|jpeg|webp);base64,|blob:)/.test(url);
