// The official JavaScript client as a consumer: whole, streams and their helper, tools, zod, embeddings, errors.

import assert from "node:assert/strict";
import { setTimeout as pause } from "node:timers/promises";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [MODEL, TINY, ECHO, SLOW, ENCODER] = ["smollm2-135m-instruct", "tiny", "echo", "slow", "all-minilm-l6-v2"];
const messages = [{ role: "user", content: "What is the capital of France?" }];
const ANSWER = "The capital of France is Paris.";
const MANY_WORDS = Array.from({ length: 1000 }, (_, number) => `w${number}`).join(" ");

const Weather = z.object({ city: z.string().max(20), unit: z.enum(["celsius", "kelvin"]) });
const City = z.object({ name: z.string().max(20), is_capital: z.boolean() });
const tools = [zodFunction({ name: "get_weather", parameters: Weather })];
const named = { type: "function", function: { name: "get_weather" } };

const client = new OpenAI({ maxRetries: 0 });

async function checkIdle() {
  const deadline = Date.now() + 10_000;
  for (;;) {
    const status = await (await fetch(client.baseURL.replace(/\/v1$/, "/admin/status"))).json();
    if (status.requests_running + status.requests_waiting === 0) return;
    assert.ok(Date.now() < deadline, "a request still runs");
    await pause(20);
  }
}

async function chat() {
  const whole = await client.chat.completions.create({ model: MODEL, messages, temperature: 0 });
  assert.equal(whole.choices[0].message.content, ANSWER);
  assert.equal(whole.choices[0].finish_reason, "stop");
  assert.deepEqual([whole.usage.prompt_tokens, whole.usage.completion_tokens], [37, 8]);
  assert.match(whole._request_id, /./);
  let text = "";
  let usage = null;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ model: MODEL, messages, temperature: 0, ...options })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, ANSWER);
  assert.equal(usage.completion_tokens, 8);
  const likely = { n: 2, max_tokens: 4, logprobs: true, top_logprobs: 2 };
  const several = await client.chat.completions.create({ model: TINY, messages, ...likely });
  assert.deepEqual(several.choices.map((choice) => choice.index), [0, 1]);
  assert.equal(several.choices[1].logprobs.content[0].top_logprobs.length, 2);
}

async function streamHelper() {
  const said = [];
  const stream = client.chat.completions.stream({ model: TINY, messages, temperature: 0, max_tokens: 12 });
  stream.on("content", (delta) => said.push(delta));
  const final = await stream.finalChatCompletion();
  const whole = await client.chat.completions.create({ model: TINY, messages, temperature: 0, max_tokens: 12 });
  assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
  assert.equal(said.join(""), whole.choices[0].message.content);
}

async function toolCalls() {
  for (const tool_choice of ["required", named]) {
    const body = { model: TINY, messages, temperature: 0, tools, tool_choice };
    const parsed = await client.chat.completions.parse(body);
    Weather.parse(parsed.choices[0].message.tool_calls[0].function.parsed_arguments);
    const streamed = await client.chat.completions.stream(body).finalMessage();
    const [first, second] = [parsed.choices[0].message, streamed].map((message) => message.tool_calls[0].function);
    assert.equal(first.arguments, second.arguments);
  }
}

async function runTools() {
  // A tool that is named is called on every turn, so the runner is given as many turns as it may take.
  const asked = [];
  const weather = zodFunction({
    name: "get_weather",
    parameters: Weather,
    function: (wanted) => (asked.push(wanted), `290 ${wanted.unit}`),
  });
  const body = { model: TINY, messages, temperature: 0, tools: [weather], tool_choice: "required" };
  for (const stream of [false, true]) {
    const runner = client.chat.completions.runTools({ ...body, stream }, { maxChatCompletions: 2 });
    await runner.done();
    assert.equal(runner.messages.filter((message) => message.role === "tool").length, 2);
  }
  assert.equal(asked.length, 4);
  asked.forEach((wanted) => Weather.parse(wanted));
}

async function structured() {
  const body = { model: TINY, messages, temperature: 0, response_format: zodResponseFormat(City, "city") };
  City.parse((await client.chat.completions.parse(body)).choices[0].message.parsed);
  City.parse((await client.chat.completions.stream(body).finalMessage()).parsed);
}

async function others() {
  const text = await client.completions.create({ model: ECHO, prompt: ["one two", "three"], n: 2, best_of: 2 });
  assert.deepEqual(text.choices.map((choice) => choice.text), ["one two", "one two", "three", "three"]);
  // Asked for as base64 by default, and decoded; as numbers where that is wanted.
  const decoded = await client.embeddings.create({ model: ENCODER, input: ["a ship", "a boat"] });
  const numbers = await client.embeddings.create({ model: ENCODER, input: "a ship", encoding_format: "float" });
  assert.deepEqual(decoded.data.map((item) => item.embedding.length), [384, 384]);
  const [one, other] = [decoded.data[0].embedding, numbers.data[0].embedding];
  assert.ok(one.every((number, at) => Math.abs(number - other[at]) < 1e-5));
  const listed = [];
  for await (const model of client.models.list()) listed.push(model.id);
  assert.ok([MODEL, TINY, ECHO, SLOW, ENCODER].every((id) => listed.includes(id)));
  assert.equal((await client.models.retrieve(TINY)).id, TINY);
  const unknown = client.chat.completions.create({ model: "no-such-model", messages });
  await assert.rejects(unknown, (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
}

async function leaveEarly() {
  const many = [{ role: "user", content: MANY_WORDS }];
  for await (const chunk of await client.chat.completions.create({ model: SLOW, messages: many, stream: true })) {
    if (chunk.choices[0].delta.content) break;
  }
  await checkIdle();
  const stream = client.chat.completions.stream({ model: SLOW, messages: many });
  stream.on("content", () => stream.abort());
  await assert.rejects(stream.done(), OpenAI.APIUserAbortError);
  await checkIdle();
}

for (const check of [chat, streamHelper, toolCalls, runTools, structured, others, leaveEarly]) await check();
