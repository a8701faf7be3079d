// The WeChat example without a browser's globals: only the language, timers, and a `wx` whose socket is a real one.
// Run by tests/integration/test_quotepush_js.py with a server's address; says what the page shows.

import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import vm from "node:vm";

const [, , url, ...codes] = process.argv;
const FILES = {
  "../../quotepush.js": "quotepush/static/quotepush.js",
  "../../socket.js": "examples/wechat/socket.js",
  page: "examples/wechat/pages/quotes/quotes.js",
};

const wx = {
  connectSocket({ url, protocols }) {
    const socket = new WebSocket(url, protocols);
    const on = (event, pick) => (fn) => socket.addEventListener(event, (happened) => fn(pick(happened)));
    return {
      onOpen: on("open", () => ({})),
      onMessage: on("message", ({ data }) => ({ data })),
      onClose: on("close", ({ code, reason }) => ({ code, reason })),
      onError: on("error", () => ({ errMsg: "connectSocket:fail" })),
      send: ({ data }) => socket.send(data),
      close: () => socket.close(),
    };
  },
  onNetworkStatusChange() {},
  offNetworkStatusChange() {},
};

let page;
const context = vm.createContext({
  wx,
  setTimeout,
  clearTimeout,
  Page: (definition) => (page = definition),
});

async function load(name) {
  const source = await readFile(new URL(`../../${FILES[name]}`, import.meta.url), "utf8");
  return new vm.SourceTextModule(source, { context, identifier: name });
}

const loaded = new Map();
const example = await load("page");
await example.link(async (name) => {
  if (!loaded.has(name)) loaded.set(name, await load(name));
  return loaded.get(name);
});
await example.evaluate();

for (const name of ["document", "fetch", "EventSource", "WebSocket", "URL", "AbortSignal", "addEventListener"]) {
  if (vm.runInContext(`typeof ${name}`, context) !== "undefined") throw new Error(`${name} is there`);
}

page.setData = (changes) => {
  Object.assign(page.data, changes);
  process.stdout.write(`${JSON.stringify(changes)}\n`);
};
page.onLoad({ url, codes });
page.onShow();
for await (const line of createInterface({ input: process.stdin })) page[line]();
process.exit();
