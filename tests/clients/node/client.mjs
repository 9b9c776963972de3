// Asks a running server everything that the test looks at; prints it as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: process.argv[3], maxRetries: 0, timeout: 60_000 });
const seen = { models: [] };
for await (const model of client.models.list()) seen.models.push(model.id);
const model = seen.models[0];
const messages = [{ role: "user", content: "alpha -> red blue\nbeta -> green stone\nWhat is beta?" }];
const settings = { model, temperature: 0, max_tokens: 12 };

seen.chat = await client.chat.completions.create({ ...settings, messages, logprobs: true, top_logprobs: 2 });
seen.deltas = [];
const stream = await client.chat.completions.create(
  { ...settings, messages, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  if (chunk.choices.length) seen.deltas.push(chunk.choices[0].delta.content ?? "");
  if (chunk.usage) seen.usage = chunk.usage;
}
seen.completion = await client.completions.create({ ...settings, prompt: "def add(a, b):\n    return", n: 2, seed: 1 });

const long = await client.chat.completions.create({ model, messages, stream: true });
let parts = 0;
for await (const chunk of long) if (++parts === 3) long.controller.abort();
seen.aborted = parts;

const caught = async (ask) => ask.then(() => null, (e) => ({ name: e.constructor.name, status: e.status, param: e.param, code: e.code }));
seen.errors = [
  await caught(client.completions.create({ model, prompt: "x", temperature: -1 })),
  await caught(client.chat.completions.create({ model: "other", messages })),
  await caught(new OpenAI({ baseURL: process.argv[2], apiKey: "wrong", maxRetries: 0 }).models.list()),
];
console.log(JSON.stringify(seen));
