// The conversations, kept in the browser's IndexedDB: one record each. A browser that refuses storage (a private
// window) gets them kept in memory until the page closes.

const NAME = "conversations";
const memory = new Map();

const database = await new Promise((resolve) => {
  try {
    const request = indexedDB.open("nanoworks", 1);
    request.onupgradeneeded = () =>
      request.result.createObjectStore(NAME, { keyPath: "id" }).createIndex("list", ["updated", "title"]);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  } catch {
    resolve(null);
  }
});

/** Whether conversations survive the page. */
export const lasting = database !== null;

/** The conversations without their messages, newest first: [{id, title, updated}]. */
export async function list() {
  if (!database) return [...memory.values()].sort((a, b) => b.updated - a.updated);
  const found = [];
  // A key cursor reads the index alone and never the messages.
  const request = objects().index("list").openKeyCursor(null, "prev");
  await new Promise((resolve, reject) => {
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor) return resolve();
      found.push({ id: cursor.primaryKey, updated: cursor.key[0], title: cursor.key[1] });
      cursor.continue();
    };
  });
  return found;
}

/** The record of a conversation, or undefined. */
export async function load(id) {
  return database ? done(objects().get(id)) : memory.get(id);
}

export async function save({ id, title, updated, nodes }) {
  const record = { id, title, updated, nodes };
  if (!database) return void memory.set(id, record);
  const put = objects("readwrite").put(record);
  put.transaction.commit(); // now and not when it is answered, which a page that is being left does not live to see
  await done(put);
}

export async function remove(id) {
  if (database) await done(objects("readwrite").delete(id));
  else memory.delete(id);
}

function objects(mode = "readonly") {
  return database.transaction(NAME, mode).objectStore(NAME);
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
