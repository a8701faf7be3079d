// The browser client in Node, driven from outside: a line of JSON in is a call, a line out is an event.
// tests/support/script_client.py speaks with it.

import { createInterface } from "node:readline";

import { connect } from "../../quotepush/static/quotepush.js";

const EVENTS = ["state", "row", "merged", "gap", "hello", "ack", "snapshot", "tick", "heartbeat", "status", "message", "error", "pong"];

const say = (event, payload) => process.stdout.write(`${JSON.stringify([event, payload])}\n`);
const awaited = [];
let quotes;

const actions = {
  connect([url, options]) {
    if (options.token === "ask") {
      options.token = () => {
        say("token");
        return new Promise((resolve, reject) => awaited.push({ resolve, reject }));
      };
    }
    // A shorter way through all pauses.
    if (options.hurry) options.random = () => Math.random() / options.hurry;
    // Another place without a socket of its own, or without streams.
    for (const name of options.without ?? []) options[name] = undefined;
    quotes = connect(url, options);
    for (const event of EVENTS) quotes.on(event, (payload) => say(event, payload));
  },
  token([text]) {
    const { resolve, reject } = awaited.shift();
    if (text === null) reject(new Error("nobody there"));
    else resolve(text);
  },
  async look() {
    await new Promise(setImmediate);
    say("look", { state: quotes.state, merged: quotes.merged, rows: [...quotes.rows.values()] });
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const [name, ...parameters] = JSON.parse(line);
  if (name in actions) await actions[name](parameters);
  else quotes[name](...parameters);
}
process.exit();
