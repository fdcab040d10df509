// The LoRAs that a dropped picture names: taken only where name and hash agree, never replaced by another.

import { act } from "./api.js";
import { library, stem } from "./loras.js";
import { fromEntry } from "./stack.js";

/** The start of the hash of nothing, which trainers wrote into thousands of files: it says nothing. */
const OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
const LEAST = 8;

const isHash = (digits) => /^[0-9a-f]+$/.test(digits) && digits.length >= LEAST && !OF_NOTHING.startsWith(digits) && !digits.startsWith(OF_NOTHING.slice(0, 12));

const base = (path) => stem(path).split("/").pop();

/** Whether a hash in a picture is the file's: of the whole file, or of its tensors. */
export const agrees = (digits, hashes) => isHash(digits) && [hashes.sha256, hashes.model_hash, hashes.autov3].some((own) => own && (own.startsWith(digits) || digits.startsWith(own) && own.length >= 12));

async function hashesOf(item, digits) {
  const known = { sha256: item.sha256, autov3: item.autov3 };
  if (agrees(digits, known) || (known.sha256 && known.autov3)) return known;
  return act("library.hashes", { name: item.name });
}

/** The picture's LoRAs as entries of a stack; what does not fit has a `problem` and is not drawn. */
export async function recalled(loras, hashes) {
  return Promise.all((loras || []).map(async (given) => {
    const entry = fromEntry(given), digits = hashes[entry.path] ?? hashes[base(entry.path)];
    const usable = library().filter((item) => item.file);
    const exact = usable.filter((item) => stem(item.file) === stem(entry.path));
    const named = exact.length ? exact : usable.filter((item) => base(item.file) === base(entry.path));
    if (!named.length) {
      entry.problem = "It is not in this library. It is left as it is, and no other one takes its place.";
      const twins = digits && isHash(digits) ? usable.filter((item) => agrees(digits, item)) : [];
      entry.offers = twins.map((item) => ({ text: `Use ${stem(item.file)}, whose hash is the same`, set: { path: stem(item.file) } }));
      return entry;
    }
    if (named.length > 1) {
      entry.problem = "Several files have this name.";
      entry.offers = named.map((item) => ({ text: `Use ${stem(item.file)}`, set: { path: stem(item.file) } }));
      return entry;
    }
    const [item] = named;
    if (!digits || !isHash(digits)) {
      entry.problem = digits ? `The picture's hash ${digits} says nothing: it is no file's.` : "The picture has no hash of it, so only the name agrees.";
      entry.offers = [{ text: `Use ${stem(item.file)} all the same`, set: { path: stem(item.file), remark: "by its name alone" } }];
      return entry;
    }
    let own;
    try {
      own = await hashesOf(item, digits);
    } catch (error) {
      entry.problem = `Its hash cannot be known: ${error.message}`;
      return entry;
    }
    if (agrees(digits, own)) return { ...entry, path: stem(item.file) };
    entry.problem = `A file of this name is here, but it is another one: the picture has ${digits.slice(0, 12)}, the file ${String(own.sha256).slice(0, 12)} (without header ${own.autov3 || "-"}).`;
    entry.offers = [{ text: "Use the file that is here all the same", set: { path: stem(item.file), remark: "another file than the picture's" } }];
    return entry;
  }));
}
